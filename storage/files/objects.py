"""Files on an object store, through fsspec.

Uploads are whole or not at all, and `mode="create"` has one winner.

An upload may be done although its answer never came. So every answer to a create but a plain yes is
settled by reading the name back: our bytes mean that we won, other bytes that we lost, nothing that
we try again. Commit records carry the uuid of their writer, so no two writers put the same one.
"""

import errno
import hashlib
import io
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typing_extensions import override

from ..credentials import hide_password
from ..errors import StillroomError, UsageError
from .base import Content, Files, content_of, explained, user_cache
from .local import LocalFiles

CREATE_PAUSES = (0.0, 0.1, 0.4, 1.6, 6.4)
"""Seconds before each attempt to create a name. Drivers try again by themselves, so these are for
what they give up."""
_BUCKETS = ("s3:", "s3a:", "gs:", "gcs:")
_PROBE = ".probe"
_HASH_BYTES = 16 << 20
_AGAIN = "what was committed is kept. Run the same command again"


class ObjectFiles(Files):
    """Files below a URL (`s3://bucket/path`). May be used after a fork and by several threads."""

    root: str

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        if "://" not in self.root:  # fsspec would take it for a folder called `s3:`
            raise UsageError(f"{root}: names no place. Expected a URL such as s3://bucket/path.")
        if hide_password(self.root) and self.root.startswith(_BUCKETS):
            raise UsageError(
                f"{self.root}: was given with a password, and drivers of buckets read none there. "
                "Give them the key as they ask for it (AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, a profile)."
            )
        self._exclusive = False
        _, self._path = self._open()

    @property
    @override
    def cache(self) -> LocalFiles:
        own = hashlib.sha256(self.root.encode()).hexdigest()[:32]  # each URL has its own
        return LocalFiles(user_cache() / own)

    @property
    def system(self) -> Any:
        """The fsspec filesystem of this process. It never answers from a listing seen before."""
        return self._open()[0]

    def address(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.root}/{name}"

    @override
    def empty(self) -> bool:
        return all(entry.startswith(".") for entry, _ in self._list(""))

    @override
    def exists(self, name: str) -> bool:
        try:
            # One request, where asking for the size of what is not there takes two.
            self.read_range(name, 0, 1)
        except FileNotFoundError:
            return False
        return True

    @override
    def read(self, name: str) -> bytes:
        return self.read_range(name, 0, None)

    def read_range(self, name: str, start: int, end: int | None) -> bytes:
        """Some bytes of a file, in one request."""
        with self._explained("cannot read", name):
            try:
                return bytes(self.system.cat_file(self._key(name), start=start, end=end))
            except OSError as error:
                # An empty file has no range of bytes.
                if error.errno == errno.EINVAL and self.size(name) == 0:
                    return b""
                raise

    @override
    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        if not names:
            return {}
        keys = {self._key(name): name for name in names}
        found = {}
        for key, data in self.system.cat(list(keys), on_error="return", start=0).items():
            if isinstance(data, FileNotFoundError):
                continue
            with suppress(FileNotFoundError):
                found[keys[key]] = bytes(data) if isinstance(data, bytes) else self.read(keys[key])
        return found

    @override
    def source(self, name: str) -> "ObjectReader":
        return ObjectReader(self, name, self.size(name))

    @override
    def local(self, name: str) -> Path:
        if not self.cache.exists(name):
            self.cache.put_if_absent(name, self.read(name))
        return self.cache.path(name)

    @override
    def size(self, name: str) -> int:
        return int(self._info(name)["size"])

    @override
    def stamp(self, name: str) -> list[Any]:
        info = self._info(name)
        changed = info.get("LastModified") or info.get("mtime")
        return [self.address(name), info["size"], str(info.get("ETag")), str(changed)]

    def _info(self, name: str) -> Any:
        with self._explained("cannot read", name):
            info = self.system.info(self._key(name))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.address(name))
        return info

    @override
    def sha256(self, name: str) -> str:
        digest, size = hashlib.sha256(), self.size(name)
        for start in range(0, size, _HASH_BYTES):
            digest.update(self.read_range(name, start, min(start + _HASH_BYTES, size)))
        return digest.hexdigest()

    @override
    def names(self, folder: str, prefix: str = "") -> list[str]:
        files = (name for name, kind in self._list(folder, prefix) if kind == "file")
        return sorted(n for n in files if n.startswith(prefix) and not n.startswith("."))

    @override
    def walk(self, folder: str = "") -> Iterator[tuple[str, int, float]]:
        with self._explained("cannot list", folder):
            found = self.system.find(self._key(folder), detail=True)
        for key, info in sorted(found.items()):
            changed = info.get("LastModified") or info["mtime"]
            yield key.removeprefix(f"{self._path}/"), int(info["size"]), changed.timestamp()

    @override
    def prove_exclusive(self) -> None:
        """Create a probe twice; the name of it stays.

        Raises:
            UsageError: the service ignores that the name was to be absent.
        """
        if self._exclusive:
            return
        # The first create makes the probe where there is none yet; the second is one too many
        # everywhere.
        if self._make_probe() and self._make_probe():
            raise UsageError(
                f"{self.root}: this service overwrites an object that was to be created only if "
                "absent (it ignores If-None-Match). Two writers would lose each other's rows "
                "without an error, so nothing is written there. Write to a service that does "
                "not, or to a local folder, and copy the finished store."
            )
        self._exclusive = True

    def _make_probe(self) -> bool:
        return self.put_if_absent(_PROBE, uuid.uuid4().bytes)

    @override
    def put_if_absent(self, name: str, data: bytes) -> bool:
        """As the protocol says; and a writer that finds its own content there gets True too.

        It may be its own upload, whose answer was lost.
        """
        failed: Exception | None = None
        for pause in CREATE_PAUSES:
            time.sleep(pause)
            try:
                self._create(self._key(name), data)
                return True
            except (PermissionError, ImportError):
                with self._explained("cannot write", name):
                    raise
            except Exception as error:  # drivers raise what they like: what is there decides
                failed = error
            try:
                return self.read(name) == data
            except FileNotFoundError:
                continue
        raise self._failure("cannot write", name, failed) from failed

    def _create(self, key: str, data: bytes) -> None:
        self.system.pipe_file(key, data, mode="create")

    @override
    def put_content(self, folder: str, write: Callable[[Path], object], *, suffix: str) -> Content:
        with TemporaryDirectory(prefix="stillroom-") as temporary:
            path = Path(temporary) / "content"
            with explained("cannot write", path):
                write(path)
                content = content_of(path, folder, suffix=suffix)
            fresh = not self.exists(content.name)
            with self._explained("cannot write", content.name):
                self.system.put_file(str(path), self._key(content.name))
        return replace(content, fresh=fresh)

    @override
    def replace(self, name: str, data: bytes) -> None:
        with self._explained("cannot write", name):
            self.system.pipe_file(self._key(name), data)
        self.cache.remove(name)

    @override
    def remove(self, name: str) -> None:
        with self._explained("cannot delete", name):
            try:
                self.system.rm_file(self._key(name))
            except FileNotFoundError:
                pass
        self.cache.remove(name)

    def _key(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _list(self, folder: str, prefix: str = "") -> list[tuple[str, str]]:
        """(name, `file` or `directory`) of what lies in a folder.

        It is at least what begins with a prefix.
        """
        with self._explained("cannot list", folder):
            try:
                entries = self._entries(self._key(folder), prefix)
            except FileNotFoundError:
                return []
        found = ((entry["name"].rstrip("/"), entry["type"]) for entry in entries)
        # What a web console makes for an empty folder is an object with the folder's own name.
        return [(key.rpartition("/")[2], kind) for key, kind in found if key != self._key(folder)]

    def _entries(self, key: str, prefix: str) -> Iterable[Any]:
        if not prefix:
            return self.system.ls(key, detail=True)  # type: ignore[no-any-return]
        # Drivers of buckets hand the prefix on; those that know none list all.
        found = self.system.find(key, detail=True, prefix=prefix).values()
        return [entry for entry in found if entry["name"].rpartition("/")[0] == key]

    def _open(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            # fsspec keeps one system per process.
            system, path = url_to_fs(self.root, use_listings_cache=False)
        except ImportError as error:
            raise UsageError(
                f"{self.root}: {error}. `pip install 'stillroom[s3]'` (or `[gcs]`) brings it."
            ) from error
        except ValueError as error:
            raise UsageError(
                f"{self.root}: {error}. Name a folder, or a URL such as s3://bucket/path."
            ) from error
        except OSError as error:  # some drivers connect at once
            raise self._failure("cannot connect", "", error) from error
        return system, path.rstrip("/")

    @contextmanager
    def _explained(self, doing: str, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StillroomError):
            raise
        except Exception as error:  # drivers raise what they like
            raise self._failure(doing, name, error) from error

    def _failure(self, doing: str, name: str, error: Exception | None) -> StillroomError:
        if isinstance(error, PermissionError):
            advice = "Check the credentials and that they may list, read, write and delete there"
        elif isinstance(error, FileNotFoundError):
            advice = "Check the bucket's name, or create it"
        else:
            advice = f"The service refused or did not answer; {_AGAIN}"
        return StillroomError(
            f"{self.address(name)}: {doing}: {type(error).__name__}: {error}. {advice}."
        )


class ObjectReader(io.RawIOBase):
    """A file on an object store, open for reading by position: each read is one request.

    fsspec's own would do, but what it raises looks like a damaged file when only the network
    failed.
    """

    def __init__(self, files: ObjectFiles, name: str, size: int) -> None:
        self._files, self._name = files, name
        self._size, self._position = size, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = origins[whence] + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Bytes from here on; fewer at the end only."""
        end = self._size if size < 0 else min(self._position + size, self._size)
        if end <= self._position:
            return b""
        data = self._files.read_range(self._name, self._position, end)
        self._position += len(data)
        return data
