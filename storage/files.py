"""The store's files: immutable, put in place whole or not at all.

The only module that links, replaces or syncs. Every file is written under a temporary name, synced, and then linked to
its final name, so that a name that exists has its complete content. `os.link` fails where the name exists already:
that is the one atomic step on which exactly-once rests. Temporary names start with a dot and mean nothing.
"""

import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import StillroomError

_ADVICE = {
    errno.ENOSPC: "the disk is full. Free space and run the same command again; what was committed is kept",
    errno.EDQUOT: "the disk quota is used up. Free space and run the same command again; what was committed is kept",
    errno.EACCES: "permission denied. Give this user write access to the folder, or choose another one",
    errno.EPERM: "not permitted; a filesystem without hard links cannot hold a store. Choose another folder",
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


class Files:
    """Files below one root folder. Names are relative to it and use forward slashes."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._durable: set[Path] = set()

    def path(self, name: str) -> Path:
        """Where a name lies on disk."""
        return self.root / name

    def exists(self, name: str) -> bool:
        """Whether the name is there."""
        return self.path(name).exists()

    def read(self, name: str) -> bytes:
        """The content of a file; FileNotFoundError if the name is not there."""
        with _explained("cannot read", self.path(name)):
            return self.path(name).read_bytes()

    def source(self, name: str) -> Any:
        """What pyarrow opens to read the file: a path, or an open binary file."""
        return str(self.path(name))

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError if the name is not there."""
        with _explained("cannot read", self.path(name)):
            return self.path(name).stat().st_size

    def sha256(self, name: str) -> str:
        """Hex sha256 of a file's bytes; FileNotFoundError if the name is not there."""
        with _explained("cannot read", self.path(name)):
            return file_sha256(self.path(name))

    def walk(self, folder: str = "") -> Iterator[tuple[str, int, float]]:
        """(name, bytes, time of last change) of every file below a folder, sorted, temporary ones too."""
        for path in sorted(self.path(folder).rglob("*")):
            if path.is_file() and not path.is_symlink():
                state = path.stat()
                yield path.relative_to(self.root).as_posix(), state.st_size, state.st_mtime

    def remove(self, name: str) -> None:
        """Delete a file, if it is there. Only for what no record names."""
        with _explained("cannot delete", self.path(name)):
            self._unlink(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none if the folder is not there. Temporary files are left out."""
        with _explained("cannot list", self.path(folder)):
            try:
                entries = list(os.scandir(self.path(folder)))
            except FileNotFoundError:
                return []
            return sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Give `name` this content unless it exists. Of any number of racing processes exactly one gets True.

        Either way the name survives a power cut once this returns.
        """
        final = self.path(name)
        with _explained("cannot write", final):
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
        with _explained("cannot write", self.path(folder)), self._temporary(self.path(folder)) as temp:
            self._write(temp, write)
            self._sync_file(temp)
            sha256 = file_sha256(temp)
            content = Content(f"{folder}/{sha256[:2]}/{sha256[:32]}{suffix}", sha256, temp.stat().st_size)
            final = self.path(content.name)
            self._make_folder(final.parent)
            if not self._linked(temp, final) and file_sha256(final) != sha256:
                self._replace(temp, final)
            self._sync_folder(final.parent)
            return content

    def replace(self, name: str, data: bytes) -> None:
        """Give `name` this content whatever it had; readers see the old or the new. Not for anything of a store."""
        final = self.path(name)
        with _explained("cannot write", final), self._temporary(final.parent) as temp:
            self._write(temp, lambda path: path.write_bytes(data))
            self._sync_file(temp)
            self._replace(temp, final)
            self._sync_folder(final.parent)

    def point(self, name: str, target: str) -> None:
        """Make `name` a symbolic link to a neighbour, in place of the one it was; readers see the old or the new."""
        final = self.path(name)
        with _explained("cannot write", final), self._temporary(final.parent) as temp:
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
        folder.mkdir(parents=True, exist_ok=True)
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(doing: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Check the disk and the folder, then run the same command again")
        raise StillroomError(f"{error.filename or path}: {doing}: {error.strerror or error}; {advice}.") from error
