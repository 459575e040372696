"""Files by name, put in place whole or not at all: what a store asks of the place it lies in, and the local one.

The only module that links, replaces or syncs. Every file is written under a temporary name, synced,
and then linked to its final name, so that a name that exists has its complete content. `os.link`
fails where the name exists already: that is the one atomic step on which exactly-once rests.
Temporary names start with a dot and mean nothing.
`objects.py` does the same on object stores.
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

from .base import Content, content_of, explained, file_sha256, make_folder, sync


class LocalFiles:
    """Files below one folder of a filesystem with hard links."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._durable: set[Path] = set()

    @property
    def cache(self) -> "LocalFiles":
        """These files themselves."""
        return self

    def path(self, name: str) -> Path:
        """Where a name lies on disk."""
        return self.root / name

    def empty(self) -> bool:
        """Whether the folder is not there or holds temporary files at most."""
        with explained("cannot list", self.root):
            return not self.root.is_dir() or all(
                entry.name.startswith(".") for entry in self.root.iterdir()
            )

    def exists(self, name: str) -> bool:
        """Whether the name is there."""
        return self.path(name).exists()

    def read(self, name: str) -> bytes:
        """The content of a file; FileNotFoundError if the name is not there."""
        with explained("cannot read", self.path(name)):
            return self.path(name).read_bytes()

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """The content of those files that are there, by name."""
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    def source(self, name: str) -> Any:
        """The file's path."""
        return str(self.path(name))

    def local(self, name: str) -> Path:
        """The file's path."""
        if not self.exists(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path(name)))
        return self.path(name)

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError if the name is not there."""
        with explained("cannot read", self.path(name)):
            return self.path(name).stat().st_size

    def sha256(self, name: str) -> str:
        """Hex sha256 of a file's bytes; FileNotFoundError if the name is not there."""
        with explained("cannot read", self.path(name)):
            return file_sha256(self.path(name))

    def walk(self, folder: str = "") -> Iterator[tuple[str, int, float]]:
        """(name, bytes, time of last change) of every file below a folder, sorted, temporary ones too."""
        for path in sorted(self.path(folder).rglob("*")):
            try:
                state = path.lstat()
            except FileNotFoundError:  # a temporary file of somebody who writes
                continue
            if stat.S_ISREG(state.st_mode):
                yield path.relative_to(self.root).as_posix(), state.st_size, state.st_mtime

    def remove(self, name: str) -> None:
        """Delete a file, if it is there. Only for what no record names."""
        path = self.path(name)
        with explained("cannot delete", path):
            if path.exists():
                self._unlink(path)
                self._sync_folder(path.parent)

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none if the folder is not there.

        Temporary files are left out.
        """
        with explained("cannot list", self.path(folder)):
            try:
                entries = list(os.scandir(self.path(folder)))
            except FileNotFoundError:
                return []
            return sorted(
                entry.name
                for entry in entries
                if entry.is_file() and not entry.name.startswith(".")
            )

    def prove_exclusive(self) -> None:
        """Nothing to prove: a link fails where the name exists."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Give `name` this content unless it exists.

        Of any number of racing processes exactly one gets True.

        Either way the name survives a power cut once this returns.
        """
        final = self.path(name)
        with explained("cannot write", final):
            won = not final.exists() and self._put(final, data)
            self._sync_folder(final.parent)
            return won

    def _put(self, final: Path, data: bytes) -> bool:
        with self._temporary(final.parent) as temp:
            self._write(temp, lambda path: path.write_bytes(data))
            self._sync_file(temp)
            return self._linked(temp, final)

    def put_content(self, folder: str, write: Callable[[Path], object], *, suffix: str) -> Content:
        """Put what `write` writes under `<folder>/<2 hex>/<32 hex><suffix>`, named by its sha256.

        A name that exists already is left as it is if it holds these very bytes. If it does not (a
        damaged file, being made again), it is replaced: the name says what its bytes must be.
        """
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

    def replace(self, name: str, data: bytes) -> None:
        """Give `name` this content whatever it had; readers see the old or the new.

        Not for anything of a store.
        """
        final = self.path(name)
        with explained("cannot write", final), self._temporary(final.parent) as temp:
            self._write(temp, lambda path: path.write_bytes(data))
            self._sync_file(temp)
            self._replace(temp, final)
            self._sync_folder(final.parent)

    def move_in(self, path: Path, name: str) -> None:
        """Move a finished file of this filesystem to `name`, whatever it had; readers see the old or the new."""
        final = self.path(name)
        with explained("cannot write", final):
            self._make_folder(final.parent)
            self._sync_file(path)
            self._replace(path, final)
            self._sync_folder(final.parent)

    def point(self, name: str, target: str) -> None:
        """Make `name` a symbolic link to a neighbour, in place of the one it was; readers see the old or the new."""
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
        """Make a folder that survives a power cut; it may be there since a moment ago, made by another process."""
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
            if (
                error.errno != errno.EINVAL
            ):  # what network filesystems say that cannot sync a folder
                raise
