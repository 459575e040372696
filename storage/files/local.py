"""Files on a disk of this machine, put in place whole or not at all.

A link does it, which fails where the name exists.

The only module that links, replaces or syncs. Every file is written under a temporary name, synced,
and then linked to its final name, so that a name that exists has its complete content. `os.link`
fails where the name exists already: that is the one atomic step on which exactly-once rests.
Temporary names start with a dot and mean nothing.
`base.py` says what each method promises; `objects.py` keeps the same promises on object stores.
"""

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from ..errors import UsageError
from .base import Content, FilesOnDisk, content_of, explained, file_sha256, make_folder, sync


class LocalFiles(FilesOnDisk):
    """Files below one folder of a filesystem with hard links."""

    root: Path

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._durable: set[Path] = set()

    @property
    @override
    def cache(self) -> "LocalFiles":
        return self

    @override
    def path(self, name: str) -> Path:
        return self.root / name

    @override
    def empty(self) -> bool:
        for place in (self.root, *self.root.parents):
            if place.exists() and not place.is_dir():
                below = "" if place == self.root else f"below {place}, which is "
                raise UsageError(
                    f"{self.root}: it is {below}a file, expected a folder. Name a folder, there or "
                    "to be made."
                )
        with explained("cannot list", self.root):
            return not self.root.is_dir() or all(
                entry.name.startswith(".") for entry in self.root.iterdir()
            )

    @override
    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    @override
    def read(self, name: str) -> bytes:
        with explained("cannot read", self.path(name)):
            return self.path(name).read_bytes()

    @override
    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    @override
    def source(self, name: str) -> Any:
        return str(self.path(name))

    @override
    def local(self, name: str) -> Path:
        if not self.exists(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path(name)))
        return self.path(name)

    def leads_out(self, name: str) -> bool:
        """Whether links lead from a name out of this folder.

        Links of the Hub's cache lead to its blobs: these are no way out.
        """
        root, found = self.root.resolve(), self.path(name).resolve()
        blobs = [folder.parent / "blobs" for folder in root.parents if folder.name == "snapshots"]
        return not any(found.is_relative_to(place) for place in (root, *blobs))

    @override
    def size(self, name: str) -> int:
        with explained("cannot read", self.path(name)):
            return self.path(name).stat().st_size

    @override
    def sha256(self, name: str) -> str:
        with explained("cannot read", self.path(name)):
            return file_sha256(self.path(name))

    @override
    def stamp(self, name: str) -> list[Any]:
        path = self.path(name)
        with explained("cannot read", path):
            state = path.stat()
        # The time of change, unlike that of writing, cannot be set by who writes.
        times = [state.st_mtime_ns, state.st_ctime_ns]
        return [str(path.resolve()), state.st_dev, state.st_ino, state.st_size, *times]

    @override
    def walk(self, folder: str = "") -> Iterator[tuple[str, int, float]]:
        for path in sorted(self.path(folder).rglob("*")):
            try:
                state = path.lstat()
            except FileNotFoundError:  # a temporary file of somebody who writes
                continue
            if stat.S_ISREG(state.st_mode):
                yield path.relative_to(self.root).as_posix(), state.st_size, state.st_mtime

    @override
    def remove(self, name: str) -> None:
        path = self.path(name)
        with explained("cannot delete", path):
            if path.exists():
                self._unlink(path)
                self._sync_folder(path.parent)

    @override
    def names(self, folder: str, prefix: str = "") -> list[str]:
        with explained("cannot list", self.path(folder)):
            try:
                entries = list(os.scandir(self.path(folder)))
            except FileNotFoundError:
                return []
            return sorted(
                entry.name
                for entry in entries
                if entry.name.startswith(prefix)
                and not entry.name.startswith(".")
                and entry.is_file()
            )

    @override
    def prove_exclusive(self) -> None:
        """Nothing to prove: a link fails where the name exists."""

    @override
    def put_if_absent(self, name: str, data: bytes) -> bool:
        final = self.path(name)
        with explained("cannot write", final):
            won = not final.exists() and self._put(final, data)
            # Whoever won, the name must survive a power cut from here on.
            self._sync_folder(final.parent)
            return won

    def _put(self, final: Path, data: bytes) -> bool:
        with self._temporary(final.parent) as temp:
            self._write(temp, lambda path: path.write_bytes(data))
            self._sync_file(temp)
            return self._linked(temp, final)

    @override
    def put_content(self, folder: str, write: Callable[[Path], object], *, suffix: str) -> Content:
        with (
            explained("cannot write", self.path(folder)),
            self._temporary(self.path(folder)) as temp,
        ):
            self._write(temp, write)
            self._sync_file(temp)
            content = content_of(temp, folder, suffix=suffix)
            final = self.path(content.name)
            self._make_folder(final.parent)
            fresh = self._linked(temp, final)
            if not fresh and file_sha256(final) != content.sha256:
                self._replace(temp, final)
            self._sync_folder(final.parent)
            return replace(content, fresh=fresh)

    @override
    def replace(self, name: str, data: bytes) -> None:
        final = self.path(name)
        with explained("cannot write", final), self._temporary(final.parent) as temp:
            self._write(temp, lambda path: path.write_bytes(data))
            self._sync_file(temp)
            self._replace(temp, final)
            self._sync_folder(final.parent)

    def move_in(self, path: Path, name: str) -> None:
        """Move a finished file of this filesystem to `name`, and replace what was there.

        Readers see the old file or the new one.
        """
        final = self.path(name)
        with explained("cannot write", final):
            self._make_folder(final.parent)
            self._sync_file(path)
            self._replace(path, final)
            self._sync_folder(final.parent)

    def point(self, name: str, target: str) -> None:
        """Make `name` a symbolic link to a neighbour, in place of the one it was.

        Readers see the old link or the new one.
        """
        final = self.path(name)
        with explained("cannot write", final), self._temporary(final.parent) as temp:
            temp.symlink_to(target)
            self._replace(temp, final)

    def _linked(self, temp: Path, final: Path) -> bool:
        try:
            self._link(temp, final)
        except OSError as error:
            # A network filesystem may do the link and lose the answer: the inode tells whose file
            # it is.
            if final.exists() and os.path.samefile(temp, final):
                return True
            if isinstance(error, FileExistsError):
                return False
            raise
        return True

    @contextmanager
    def _temporary(self, folder: Path) -> Iterator[Path]:
        self._make_folder(folder)
        temp = folder / f".tmp-{uuid.uuid4().hex}"
        try:
            yield temp
        finally:
            self._unlink(temp)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder that survives a power cut.

        Another process may have made it a moment ago.
        """
        if folder in self._durable:
            return
        below_root = folder != self.root
        if below_root:
            self._make_folder(folder.parent)
        existed = folder.is_dir()
        make_folder(folder)
        if below_root or not existed:
            self._sync_folder(folder.parent)
        self._durable.add(folder)

    # The primitive steps, one method each, so that a test can make any of them fail.

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        write(path)

    def _sync_file(self, path: Path) -> None:
        sync(path)

    def _link(self, temp: Path, final: Path) -> None:
        os.link(temp, final)

    def _replace(self, temp: Path, final: Path) -> None:
        os.replace(temp, final)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _sync_folder(self, folder: Path) -> None:
        try:
            sync(folder)
        except OSError as error:
            # EINVAL is what network filesystems say that cannot sync a folder.
            if error.errno != errno.EINVAL:
                raise
