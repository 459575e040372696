"""sha256 of files of this machine, so that none is read twice.

They are kept in a store's cache under path, size, mtime and inode.
"""

import hashlib
from pathlib import Path
from typing import ClassVar

from ..bounds import hexdigest, mapping, parsed
from ..credentials import shown
from ..files.opening import open_files
from ..keys import canonical_json, content_id
from .store import MARKER


class FileHashes:
    """sha256 of files, remembered by a store's `cache`. `remember=False` only reads there.

    What was hashed before there is a store is remembered by `keep`, once there is one: a command
    that is refused makes none.
    """

    _waiting: ClassVar[dict[str, dict[str, bytes]]] = {}
    """By store: what this process is to remember there."""

    def __init__(self, store_dir: str | Path, *, remember: bool) -> None:
        self._store = open_files(store_dir)
        self._files = self._store.cache
        self._remember = remember
        self._seen: dict[str, str] = {}
        waiting = self._waiting.setdefault(str(store_dir), {}) if remember else {}
        self._unkept: dict[str, bytes] = waiting

    def sha256(self, path: Path) -> str:
        """Hex digest of a file's bytes."""
        stat = path.stat()
        mark = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        name = f"cache/sha256/{content_id('file', mark=mark)}.json"
        if name not in self._seen:
            self._seen[name] = self._cached(name) or self._hash(path, name)
        return self._seen[name]

    def _cached(self, name: str) -> str | None:
        record = self._unkept.get(name)
        if record is None and not self._files.exists(name):
            return None
        try:
            return hexdigest(mapping(parsed(record or self._files.read(name)))["sha256"])
        except (ValueError, KeyError):
            return None  # a cache: what is damaged is made again

    def _hash(self, path: Path, name: str) -> str:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._unkept[name] = canonical_json({"path": shown(str(path)), "sha256": digest})
        if self._remember and self._store.exists(MARKER):
            self.keep()
        return digest

    def keep(self) -> None:
        """Let the store remember what was hashed before it was there."""
        for name, record in self._unkept.items():
            self._files.put_if_absent(name, record)
        self._unkept.clear()
