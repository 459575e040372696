"""Which files of a folder or a glob are data, and which are left out and why."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path, PurePath

from ....storage.credentials import as_written, shown
from ....storage.errors import UsageError
from .names import (
    IMAGES,
    IN_FOLDERS,
    IN_GLOBS,
    PACKED,
    TABLES,
    TEXTS,
    ending,
    is_image,
    no_data,
    readable,
)
from .splits import ALL, known_split, refuse_either, split_of, split_of_image

_NAMED = 5
"""Files that a sentence names; more are counted."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files of a source."""

    source: str
    field: str
    root: Path
    """The folder that names of records are relative to."""
    files: list[Path]
    left_out: dict[Path, str]
    """Files of a folder or glob that are not read, and why."""
    saved: bool = False
    """Whether `datasets` saved the folder, and reads it."""
    one: bool = False
    """Whether the recipe names the file itself."""
    images: bool = False
    """Whether each file is an image, in a folder that names its class."""

    def name_of(self, file: Path) -> str:
        """A file's path in its source, as it is shown and recorded.

        Of `${FILE}` that is shown, not the file's name.
        """
        if self.one:
            return PurePath(as_written(self.source)).name
        return shown(file.relative_to(self.root).as_posix())

    def of_split(self, split: str, *, field: str, asked: bool) -> "Found":
        """These files without those of other splits.

        Args:
            split: train, validation, test, another word for one of them, or `ALL`.
            field: The field of the recipe that names it.
            asked: Whether the recipe does name it.

        Raises:
            UsageError: no file is of this split.
        """
        if self.saved or split == ALL or (self.one and not asked):
            return self
        wanted = known_split(split, field=field)
        named = {file: self._split_of(file) for file in self.files}
        others = sorted({name for name in named.values() if name and name != wanted})
        if self.one:
            if others:
                raise UsageError(
                    f"{field}: {wanted}, but {self.source} names the split {others[0]}. Leave the "
                    "split out to read the file as it is, or name another file."
                )
            return self
        if not any(named.values()):
            # So the folder itself says it, or nothing does.
            if not asked or wanted == (
                split_of(PurePath(self.root.name), field=self.field) or "train"
            ):
                return self
            raise UsageError(
                f"{field}: no file of {self.source} names a split, so none is of {wanted}. Name "
                "the files themselves, or put them into folders train and test."
            )
        chosen = [file for file, name in named.items() if name == wanted]
        if not chosen:
            raise UsageError(
                f"{field}: no file of {self.source} is of the split {wanted}: found "
                f"{' and '.join(others)}. Name one of these, or {ALL!r} to read every file."
            )
        # What names no split may well be missed, so it is said first.
        why = {file: "names no split" for file, name in named.items() if name is None}
        why |= {f: f"split {name}" for f, name in named.items() if name not in (None, wanted)}
        return replace(self, files=chosen, left_out=why | self.left_out)

    def _split_of(self, file: Path) -> str | None:
        path = file.relative_to(self.root)
        return split_of_image(path) if self.images else split_of(path, field=self.field)

    def left_out_note(self, read: set[Path]) -> str | None:
        """A sentence that names what is left out, or None. Of long lists it names the beginning."""
        left = {file: why for file, why in self.left_out.items() if file not in read}
        if not left:
            return None
        names = [f"{self.name_of(file)} ({why})" for file, why in left.items()]
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        return f"left out of {as_written(self.source)}: {', '.join(names[:_NAMED])}{more}"


def find_files(source: str, *, field: str, images: bool = False) -> Found | None:
    """The local files that a source names, in a fixed order; None if it is a Hub id.

    `images`: records are images, so a file may be one.

    Raises:
        UsageError: it looks like a path and nothing is there, or a file cannot be read.
    """
    if re.match(r"https?://", source):
        raise UsageError(
            f"{field}: {shown(source)} is an address, and data are not read over the web. Fetch "
            "the file, and name it here."
        )
    path = Path(source).expanduser()
    if path.is_file():
        found = Found(
            source=source, field=field, root=path.parent, files=[path], left_out={}, one=True
        )
    elif path.is_dir():
        found = _in_folder(path, source, field, images=images)
    else:
        found = _of_glob(path, source, field, images=images)
    for file in found.files:
        _refuse_unreadable(file, field, images=found.images)
    if found.images:
        _refuse_mixed(found)
        refuse_either((file.relative_to(found.root) for file in found.files), field=field)
    if found.files:
        return found
    # A Hub id is owner/name: anything else was meant as a path.
    looks_local = source.startswith((".", "/", "~")) or readable(path) or has_magic(source)
    if looks_local or source.count("/") != 1 or path.is_dir():
        said = found.left_out_note(set())
        raise UsageError(
            f"{field}: nothing to read at {source} (looked in {Path.cwd()}"
            f"{f'; {said}' if said else ''}). Name a file, a glob or a folder of "
            f"{', '.join(IN_FOLDERS)} (.md only by file or glob), texts also as "
            f"{', '.join(PACKED)}, or a Hub dataset id."
        )
    return None


def _refuse_mixed(found: Found) -> None:
    """Refuse images beside tables, for both may hold records that are images.

    Raises:
        UsageError: there are both; names one of each.
    """
    tables = [file for file in found.left_out if no_data(file, found.root, TABLES) is None]
    if not tables:
        return
    table, image = found.name_of(tables[0]), found.name_of(found.files[0])
    raise UsageError(
        f"{found.field}: {as_written(found.source)} has tables ({table}) and images ({image}), and "
        "the records may be those of either. Name one kind by a glob, or put the other elsewhere."
    )


def _in_folder(path: Path, source: str, field: str, *, images: bool) -> Found:
    inside = sorted(_walk(path))
    images = images and any(is_image(file) for file in inside)
    why = {file: no_data(file, path, IMAGES if images else IN_FOLDERS) for file in inside}
    files = [file for file in inside if why[file] is None]
    saved = any(ending(file) == ".arrow" for file in files)
    if saved:  # `datasets` wrote it, with what it knows about it
        beside = {file: "not saved by `datasets`" for file in files if ending(file) != ".arrow"}
        files = [file for file in sorted(path.rglob("*")) if file.suffix in IN_FOLDERS]
        return Found(
            source=source, field=field, root=path, files=files, left_out=beside, saved=True
        )
    left_out = _first_what_looks_like_data({file: said for file, said in why.items() if said})
    return Found(
        source=source, field=field, root=path, files=files, left_out=left_out, images=images
    )


def _of_glob(path: Path, source: str, field: str, *, images: bool) -> Found:
    root = Path(*_until_magic(path))
    matched = [Path(name) for name in sorted(glob(str(path), recursive=True))]
    folders = {folder for file in matched for folder in file.parents}
    inside = [file for file in matched if file not in folders]
    literal = not has_magic(path.name)  # such a file is asked for by its name
    images = images and any(is_image(file) for file in inside)
    endings = IMAGES if images else IN_GLOBS
    why = {
        file: None if literal and file.is_file() else no_data(file, root, endings)
        for file in inside
    }
    files = [file for file in inside if why[file] is None]
    left_out = _first_what_looks_like_data({file: said for file, said in why.items() if said})
    saved = any(ending(file) == ".arrow" for file in files)
    if images and all(file.parent == root for file in files):
        _refuse_without_class(root, source, field)
    return Found(
        source=source,
        field=field,
        root=root,
        files=files,
        left_out=left_out,
        saved=saved,
        images=images,
    )


def _refuse_without_class(folder: Path, source: str, field: str) -> None:
    """Refuse a glob over the images of one folder: whether that is a class, nothing says.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"{field}: {as_written(source)} are the images of one folder, and may be of a class "
        f"{folder.name!r} or of none. Expected a glob over the folders of all classes (*/*.png), "
        "or the folder itself, for images without a label."
    )


def _until_magic(path: Path) -> Iterator[str]:
    for part in path.parent.parts:
        if has_magic(part):
            return
        yield part


def _walk(path: Path) -> Iterator[Path]:
    """Every file below a folder, and links to folders, which are not followed."""
    for folder, folders, names in os.walk(path):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder, name) for name in (*names, *links))


def _first_what_looks_like_data(left_out: dict[Path, str]) -> dict[Path, str]:
    """The same, with what somebody may miss at the beginning."""
    return dict(sorted(left_out.items(), key=lambda item: not readable(item[0])))


def _refuse_unreadable(file: Path, field: str, *, images: bool) -> None:
    if not file.is_file():
        problem = "is a broken link or no regular file. Remove it, or name the files to read"
    elif not (is_image(file) if images else readable(file)):
        expected = ", ".join((*TEXTS, *TABLES))
        problem = (
            f"has an ending that nothing here reads. Expected {expected}; texts also as "
            f"{', '.join(PACKED)}"
        )
    elif not os.access(file, os.R_OK):
        problem = "cannot be read. Check its permissions"
    else:
        return
    raise UsageError(f"{field}: {file} {problem}.")
