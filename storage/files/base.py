"""What a store asks of the place it lies in: files by name, put in place whole or not at all."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import StillroomError, name_too_long

DISK_FULL = (
    "the disk is full. Free space and run the same command again; what was committed is kept"
)

_ADVICE = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: (
        "the disk quota is used up. Free space and run the same command again; what was committed "
        "is kept"
    ),
    errno.EACCES: "give this user write access to the folder, or choose another one",
    errno.EPERM: (
        "a filesystem that takes no new files or no hard links cannot hold a store. Choose another "
        "folder"
    ),
    errno.EOPNOTSUPP: (
        "the filesystem has no hard links, so it cannot hold a store. Choose another folder"
    ),
    errno.EROFS: "the filesystem is read-only. Mount it writable, or choose another folder",
    errno.EIO: (
        "the disk reported an input/output error. Check the disk; `stillroom verify` says what is "
        "intact"
    ),
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
    """Where a store lies.

    Names are relative to its root, with forward slashes; those with a leading dot do not count.

    Every method raises StillroomError, with what to do, where the place itself fails.
    """

    root: Path | str
    """The folder, or the URL."""

    @property
    def cache(self) -> "FilesOnDisk":
        """Files of this machine, below `cache/`, that only save work and may be lost any time."""

    def empty(self) -> bool:
        """Whether nothing is there: no root, or no name in it."""

    def exists(self, name: str) -> bool:
        """Whether the name is there."""

    def read(self, name: str) -> bytes:
        """The content of a file; FileNotFoundError if the name is not there."""

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """The content of those files that are there, by name."""

    def source(self, name: str) -> Any:
        """What pyarrow opens to read the file: a path, or an open binary file.

        Either this call or reading raises FileNotFoundError if it is not there.
        """

    def local(self, name: str) -> Path:
        """A path with the content of a file, for libraries that read nothing else.

        Raises:
            FileNotFoundError: the file is not there.
        """

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError if the name is not there."""

    def sha256(self, name: str) -> str:
        """Hex sha256 of a file's bytes; FileNotFoundError if the name is not there."""

    def stamp(self, name: str) -> list[Any]:
        """What changes when a file is changed, found without reading it.

        Raises:
            FileNotFoundError: the file is not there.
        """

    def names(self, folder: str, prefix: str = "") -> list[str]:
        """Names of the files in a folder that begin with a prefix, sorted.

        There are none if the folder is not there. Temporary files are left out. An object store
        lists no others than those.
        """

    def walk(self, folder: str = "") -> Iterator[tuple[str, int, float]]:
        """(name, bytes, time of last change) of every file below a folder, sorted.

        Temporary files are among them.

        The time is by the place's own clock.
        """

    def prove_exclusive(self) -> None:
        """Make sure that `put_if_absent` has one winner here; UsageError where it has not."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Give `name` this content unless it exists.

        Of racing writers with different contents exactly one gets True.

        Once this returns the name has a content, and keeps it.
        """

    def put_content(self, folder: str, write: Callable[[Path], object], *, suffix: str) -> Content:
        """Put what `write` writes under `<folder>/<2 hex>/<32 hex><suffix>`, named by its sha256.

        A file of that name with other bytes is a damaged one: it is replaced, the name says what
        its bytes must be.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Give `name` this content whatever it had; readers see the old or the new.

        Nothing of a store is put in place so.
        """

    def remove(self, name: str) -> None:
        """Delete a file, if it is there. Only for what no record names."""


class FilesOnDisk(Files, Protocol):
    """Files that lie on a disk of this machine."""

    def path(self, name: str) -> Path:
        """Where a name lies on disk."""


def user_cache() -> Path:
    """The folder of this user's files that only save work.

    It is `$XDG_CACHE_HOME/stillroom`, else `~/.cache/stillroom`.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillroom"


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(path: Path, folder: str, *, suffix: str) -> Content:
    """The name by content that a finished file gets in a folder."""
    sha256 = file_sha256(path)
    return Content(f"{folder}/{sha256[:2]}/{sha256[:32]}{suffix}", sha256, path.stat().st_size)


def sync(path: Path) -> None:
    """Have the disk hold a file or folder before anything rests on it."""
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
        raise StillroomError(
            f"{folder}: no folder can be made there. Choose another place."
        ) from error


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Errors of the operating system as messages that say what to do.

    FileNotFoundError goes on as it is.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if too_long := name_too_long(error, path):
            raise too_long from error
        advice = _ADVICE.get(
            error.errno or 0, "Check the disk and the folder, then run the same command again"
        )
        raise StillroomError(
            f"{error.filename or path}: {doing}: {error.strerror or error}; {advice}."
        ) from error
