"""Files by name, put in place whole or not at all: what a store asks of the place it lies in, and the local one.

The only module that links, replaces or syncs. Every file is written under a temporary name, synced, and then linked to
its final name, so that a name that exists has its complete content. `os.link` fails where the name exists already:
that is the one atomic step on which exactly-once rests. Temporary names start with a dot and mean nothing.
`objects.py` does the same on object stores.
"""

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import StillroomError

DISK_FULL = "the disk is full. Free space and run the same command again; what was committed is kept"
_ADVICE = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: "the disk quota is used up. Free space and run the same command again; what was committed is kept",
    errno.EACCES: "give this user write access to the folder, or choose another one",
    errno.EPERM: "a filesystem that takes no new files or no hard links cannot hold a store. Choose another folder",
    errno.EOPNOTSUPP: "the filesystem has no hard links, so it cannot hold a store. Choose another folder",
    errno.EROFS: "the filesystem is read-only. Mount it writable, or choose another folder",
    errno.EIO: "the disk reported an input/output error. Check the disk; `stillroom verify` says what is intact",
}


@dataclass(frozen=True, slots=True)
class Content:
    """A file named by its content."""

    name: str
    """Path below the root, with forward slashes."""
    sha256: str
    bytes: int
    fresh: bool = field(default=True, compare=False)
    """Whether this call made the file; else there was one of this name before."""


class Files(Protocol):
    """Where a store lies. Names are relative to its root, with forward slashes; those with a leading dot do not count.

    Every method raises StillroomError, with what to do, where the place itself fails.
    """

    @property
    def root(self) -> Path | str:
        """The folder, or the URL."""

    @property
    def cache(self) -> "LocalFiles":
        """Files of this machine, below `cache/`, that only save work and may be lost at any time."""

    def empty(self) -> bool:
        """Whether nothing is there: no root, or no name in it."""

    def exists(self, name: str) -> bool:
        """Whether the name is there."""

    def read(self, name: str) -> bytes:
        """The content of a file; FileNotFoundError if the name is not there."""

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """The content of those files that are there, by name."""

    def source(self, name: str) -> Any:
        """What pyarrow opens to read the file: a path, or an open binary file; FileNotFoundError may come then."""

    def local(self, name: str) -> Path:
        """A path with the content of a file, for who reads nothing else; FileNotFoundError if it is not there."""

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError if the name is not there."""

    def sha256(self, name: str) -> str:
        """Hex sha256 of a file's bytes; FileNotFoundError if the name is not there."""

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none if the folder is not there. Temporary files are left out."""

    def walk(self, folder: str = "") -> Iterator[tuple[str, int, float]]:
        """(name, bytes, time of last change) of every file below a folder, sorted, temporary ones too."""

    def prove_exclusive(self) -> None:
        """Make sure that `put_if_absent` has one winner here; UsageError where it has not."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Give `name` this content unless it exists. Of racing writers with different contents exactly one gets True.

        Once this returns the name has a content, and keeps it.
        """

    def put_content(self, folder: str, write: Callable[[Path], object], *, suffix: str) -> Content:
        """Put what `write` writes under `<folder>/<2 hex>/<32 hex><suffix>`, named by its sha256.

        A file of that name with other bytes is a damaged one: it is replaced, the name says what its bytes must be.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Give `name` this content whatever it had; readers see the old or the new. Not for anything of a store."""

    def remove(self, name: str) -> None:
        """Delete a file, if it is there. Only for what no record names."""


def open_files(root: Path | str) -> Files:
    """Files below a folder, or below a URL that fsspec knows (`s3://bucket/path`).

    Raises:
        UsageError: nothing installed can read such a URL.
    """
    address = str(root).removeprefix("file://")
    if "://" not in address:
        return LocalFiles(address)
    from .objects import ObjectFiles

    return ObjectFiles(address)


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
            return not self.root.is_dir() or all(entry.name.startswith(".") for entry in self.root.iterdir())

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
        """Names of the files in a folder, sorted; none if the folder is not there. Temporary files are left out."""
        with explained("cannot list", self.path(folder)):
            try:
                entries = list(os.scandir(self.path(folder)))
            except FileNotFoundError:
                return []
            return sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))

    def prove_exclusive(self) -> None:
        """Nothing to prove: a link fails where the name exists."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Give `name` this content unless it exists. Of any number of racing processes exactly one gets True.

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

        A name that exists already is left as it is if it holds these very bytes. If it does not (a damaged file, being
        made again), it is replaced: the name says what its bytes must be.
        """
        with explained("cannot write", self.path(folder)), self._temporary(self.path(folder)) as temp:
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
        """Give `name` this content whatever it had; readers see the old or the new. Not for anything of a store."""
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
            # A network filesystem may do the link and lose the answer: the inode tells whose file it is.
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
        _sync(path)

    def _link(self, temp: Path, final: Path) -> None:
        os.link(temp, final)

    def _replace(self, temp: Path, final: Path) -> None:
        os.replace(temp, final)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _sync_folder(self, folder: Path) -> None:
        try:
            _sync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what network filesystems say that cannot sync a folder
                raise


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(path: Path, folder: str, *, suffix: str) -> Content:
    """The name by content that a finished file gets in a folder."""
    sha256 = file_sha256(path)
    return Content(f"{folder}/{sha256[:2]}/{sha256[:32]}{suffix}", sha256, path.stat().st_size)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; StillroomError, with what to do, where that cannot be."""
    try:
        with explained("cannot make this folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # what /proc says of a new name
        raise StillroomError(f"{folder}: no folder can be made there. Choose another place.") from error


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Errors of the operating system as messages that say what to do; FileNotFoundError stays itself."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Check the disk and the folder, then run the same command again")
        raise StillroomError(f"{error.filename or path}: {doing}: {error.strerror or error}; {advice}.") from error
