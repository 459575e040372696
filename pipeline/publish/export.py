"""`export`: a snapshot as a dataset folder that others load.

A version is built beside its place, moved in, and only then does the card point at it; so a reader
of the folder sees the old version or the new one, wherever this stops. The same command goes on; a
finished version is not built again.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...stages.recipe.load import recorded
from ...stages.recipe.sections import Recipe
from ...storage.bounds import mapping, parsed, seen, understood
from ...storage.errors import IntegrityError, UsageError
from ...storage.files.base import explained, make_folder
from ...storage.files.local import LocalFiles
from ...storage.keys import content_id
from ...storage.published.choice import Choice
from ...storage.published.export import Made, make_tables, place, put
from ...storage.published.export_rows import PUBLISHED, chosen_columns
from ...storage.published.manifest import (
    CARD,
    Manifest,
    PublishedFile,
    current_version,
    damaged_files,
    read_manifest,
)
from ...storage.snapshots.snapshot import load_snapshot
from ...storage.store.bindings import all_bindings
from ...storage.store.matrices import FOLDER as MATRICES
from ...storage.store.store import MARKER, TEACHER_FILES, Store
from ...storage.words import counted
from ..printing.text import one_line
from .dataset_card import Published, dataset_card
from .features import chosen_features
from .provenance import (
    PROVENANCE,
    Licenses,
    check_licenses,
    check_stated,
    make_provenance,
    public_recipe,
    read_recipe,
    source_names,
    without_paths,
)
from .selection import selected

_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_WORK = ".part"  # a leading dot: no reader looks into it


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishRequest:
    """What a user asked to be published, and what was said about it."""

    store: str
    license: str | None
    rows_of: Recipe | None = None
    """The recipe whose rows are meant, of this store."""
    model_licenses: tuple[str, ...] = ()
    source_licenses: tuple[str, ...] = ()
    snapshot: str | None = None
    choice: Choice = field(default_factory=Choice)
    """Its features are not asked: `features` says which."""
    features: bool | None = None
    """Whether the teacher's features go along. None: those that the recipe's student learns
    from."""
    name: str | None = None
    """What the dataset is called; None: as its folder or repository."""
    teacher: str | None = None
    """What the teacher is called."""
    languages: tuple[str, ...] = ()
    run: Path | None = None
    """Folder of a run, for its recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A published folder after an export."""

    folder: Path
    manifest: Manifest
    card: str
    built: bool
    """Whether the version was built now; else it was there."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "dir": str(self.folder),
            "version": self.manifest.version,
            "built": self.built,
            "rows": {
                table: {
                    name: sum(f.rows for f in self.manifest.tables_of(table, name))
                    for name in self.manifest.splits
                }
                for table in self.manifest.tables
            },
            "files": len(self.manifest.files),
            "bytes": sum(file.bytes for file in self.manifest.files),
        }


def export(
    request: PublishRequest,
    folder: Path,
    *,
    say: Callable[[str], None],
    strict: bool = False,
    repo: str | None = None,
) -> Exported:
    """Write a dataset into a folder.

    Args:
        request: What to publish.
        folder: Where; may hold older versions.
        say: Told what is being done.
        strict: Refuse while the licence of a model or a source is not given.
        repo: USER/NAME on the Hub, if the folder is on its way there.

    Raises:
        UsageError: a licence, snapshot, column or folder is wrong.
        IntegrityError: a shard is damaged.
    """
    work = _Export(request, folder, strict=strict, repo=repo)
    manifest = work.finished()
    built = manifest is None
    if manifest is None:
        rows = sum(snapshot.rows for snapshot in work.snapshots.values())
        say(f"writing up to {counted(rows, 'row')} ({', '.join(work.snapshots)}) into {folder}")
        manifest = work.build()
    if built and (others := work.others()):
        say(others)
    if built and (left := work.left_in_the_store(manifest)):
        say(left)
    for split, snapshot in work.snapshots.items():
        taken = manifest.splits[split].rows if split in manifest.splits else 0
        if taken < snapshot.rows:
            say(f"{split}: {taken:,} of {counted(snapshot.rows, 'row')}")
    card = work.point(manifest, repo)
    return Exported(folder=folder, manifest=manifest, card=card, built=built)


class _Export:
    """One export: what was asked, checked, before anything is written."""

    def __init__(
        self, request: PublishRequest, folder: Path, *, strict: bool, repo: str | None
    ) -> None:
        self._request, self._files, self._strict = request, LocalFiles(folder), strict
        self._licenses = check_licenses(
            request.license, request.model_licenses, request.source_licenses, strict=strict
        )
        self._store = Store.open(request.store)
        _refuse_unknown_source(self._store, self._licenses)
        chosen_columns(request.choice.columns)
        _refuse_foreign(self._files)
        if request.rows_of is None:
            self._recipe = read_recipe(request.run)
        else:
            self._recipe = public_recipe(recorded(request.rows_of))
        self.snapshots = selected(self._store, request.snapshot, request.rows_of)
        self._choice = replace(
            request.choice,
            features=chosen_features(
                self._store,
                next(iter(self.snapshots.values())),
                request.rows_of,
                asked=request.features,
                columns=request.choice.columns,
            ),
        )
        self._name = _title(request.name, (repo or str(folder.resolve())).rpartition("/")[2])
        _refuse_unprintable("--teacher", request.teacher)
        _refuse_no_languages(request.languages)
        licenses = [
            self._licenses.dataset,
            list(self._licenses.models),
            list(self._licenses.sources),
        ]
        self._content_id = content_id(
            "export",
            snapshots={split: snapshot.id for split, snapshot in self.snapshots.items()},
            chosen=self._choice.to_json(),
            licenses=licenses,
            said=[self._name, request.teacher, self._recipe],
            versions={package: version(package) for package in ("stillroom", "pyarrow")},
        )

    def left_in_the_store(self, manifest: Manifest) -> str:
        """What to say of features that do not go along; empty: there are none."""
        rows = sum(commit.shard.rows for commit in self._store.commits("features"))
        rows -= sum(file.rows for file in manifest.files if file.table == "features")
        if not rows:
            return ""
        return (
            f"features that stay in {self._store.root}: {counted(rows, 'row')}. --features takes "
            "all that it has of these texts, a recipe whose student learns from some takes those"
        )

    def others(self) -> str:
        """What is said of rows that stay in the store, where no recipe says which are meant."""
        table = next(iter(self.snapshots.values())).table
        there = sum(shard.rows for shard in self._store.shards(table))
        stay = there - sum(snapshot.rows for snapshot in self.snapshots.values())
        if not stay or self._request.rows_of is not None:
            return ""
        return (
            f"other rows of {table} that stay in the store: {stay}. A recipe in its place takes "
            "what it selects"
        )

    def finished(self) -> Manifest | None:
        """The version that the folder's card points at, if it is this one and whole."""
        try:
            manifest = read_manifest(self._files)
        except (UsageError, IntegrityError):
            return None
        if manifest.request != self._content_id or damaged_files(self._files, manifest):
            return None
        check_stated(self._licenses, self._provenance(manifest), strict=self._strict)
        return manifest

    def build(self) -> Manifest:
        """Build the version in a working folder and move it in."""
        work = self._files.root / _WORK
        new = not self._files.root.exists()
        with explained("cannot write", work):
            if work.exists():
                shutil.rmtree(work)  # of an export that was stopped
            make_folder(work)
        try:
            made = make_tables(self._store, self.snapshots, work, self._choice)
            small = self._small_files(made)
            hashed = [
                PublishedFile(name=n, sha256=_sha256(c), bytes=len(c))
                for n, c in sorted(small.items())
            ]
            manifest = Manifest(
                name=self._name,
                splits=made.splits,
                tables=made.tables,
                about=made.about,
                chosen=self._choice.to_json(),
                statistics=made.statistics,
                request=self._content_id,
                files=[*sorted(made.files.values(), key=lambda file: file.name), *hashed],
            )
            place(
                self._files, manifest, {path: file.name for path, file in made.files.items()}, small
            )
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if new:
                with suppress(OSError):  # a version is in it: only what is left empty goes again
                    self._files.root.rmdir()
        return manifest

    def _small_files(self, made: Made) -> dict[str, bytes]:
        """Names below the version's folder -> contents of its small files.

        These are provenance, whole snapshots and their recipes, and models.
        """
        provenance = make_provenance(
            self._store, made, self._licenses, teacher=self._request.teacher, recipe=self._recipe
        )
        check_stated(self._licenses, provenance, strict=self._strict)
        found = {
            PROVENANCE: json.dumps(
                provenance, indent=1, sort_keys=True, ensure_ascii=False
            ).encode()
            + b"\n"
        }
        whole = {split.snapshot for split in made.splits.values() if split.whole}
        names = [f"snapshots/{snapshot}.json" for snapshot in sorted(whole)]
        data_ids = {load_snapshot(self._store, name).about.get("data_id") for name in whole}
        bindings = all_bindings(self._store.files)
        names += [name for name, found in bindings.items() if found.data_id in data_ids]
        for model_id in sorted(made.authors):
            names += [
                f"teachers/{model_id}/{name}"
                for name in self._store.files.names(f"teachers/{model_id}")
                if name != TEACHER_FILES  # the manifest has the hashes of what is exported
            ]
        read = self._store.files.read
        _refuse_links(self._store, names)
        found |= made.records
        return found | {name: without_paths(read(name), name.rpartition("/")[2]) for name in names}

    def point(self, manifest: Manifest, repo: str | None) -> str:
        """Let the card point at a version; returns the card."""
        published = Published(
            folder=self._files.root,
            manifest=manifest,
            provenance=self._provenance(manifest),
            languages=self._request.languages,
            repo=repo,
        )
        # A version that was there may be somebody else's.
        with understood(f"{manifest.version}: MANIFEST.json or {PROVENANCE}", "published version"):
            card = dataset_card(published)
        put(self._files, CARD, card.encode())
        return card

    def _provenance(self, manifest: Manifest) -> dict[str, Any]:
        name = f"{manifest.version}/{PROVENANCE}"
        with understood(name, "provenance"):
            return mapping(parsed(self._files.read(name)))


def _title(name: str | None, place: str) -> str:
    """What the dataset is called, as it was said, else after its folder or repository.

    `my-targets` is shown as My targets.
    """
    if name is not None:
        _refuse_unprintable("--name", name)
        return name
    words = one_line(re.sub(r"[-_\s]+", " ", place).strip() or place)
    return words[:1].upper() + words[1:]


def _refuse_unprintable(option: str, name: str | None) -> None:
    """Names of many lines, or with characters that nobody sees, are somebody's trick or mistake."""
    if name is not None and not (name.strip() and seen(name)):
        raise UsageError(
            f"{option} {name!r}: not one line of printable characters. Give it a name of these."
        )


def _refuse_no_languages(codes: Sequence[str]) -> None:
    for code in codes:
        if not _LANGUAGE.fullmatch(code):
            raise UsageError(f"--language {code!r}: no code of a language, as en, de or pt-BR.")


def _refuse_unknown_source(store: Store, licenses: Licenses) -> None:
    names = source_names(store)
    for name, _, value in (text.rpartition("=") for text in licenses.sources):
        if name and name not in names:
            raise UsageError(
                f"--source-license {name}={value}: the store has no source {name}. It has: "
                f"{', '.join(sorted(names))}."
            )


def _refuse_links(store: Store, names: Sequence[str]) -> None:
    """What lies elsewhere on this machine is no part of the store, and must not leave with it."""
    for name in names:
        if isinstance(store.files, LocalFiles) and store.files.leads_out(name):
            raise IntegrityError(
                f"{store.root}/{name}: a link that leads out of the store, so it is not published. "
                "Put the file itself in its place."
            )


def _refuse_foreign(files: LocalFiles) -> None:
    """What is not ours belongs to somebody: it is neither overwritten nor deleted."""
    root = files.root
    if Path(root).is_file():
        raise UsageError(f"{root}: is a file. Name a folder for the dataset.")
    if files.exists(MARKER):
        raise UsageError(f"{root}: is a store. Name another folder for the dataset.")
    work = Path(root) / _WORK
    if work.exists() and not (
        work.is_dir() and {path.name for path in work.iterdir()} <= {*PUBLISHED, MATRICES}
    ):
        raise UsageError(
            f"{root}: holds a {_WORK} that no export made. Name another folder, or move it away."
        )
    if files.exists(CARD) and current_version(files.read(CARD).decode(errors="replace")) is None:
        raise UsageError(
            f"{files.root}: holds a {CARD} that no export wrote. Name another folder, or move it "
            "away."
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
