"""The writer of one table: it gathers rows and commits them as shards.

A shard is due every so many rows, seconds or bytes.

A shard is made (encoded, hashed, synced, read back) in a thread of the writer, while its owner goes
on with the next rows; Arrow, the hash and the disk leave Python to others meanwhile. The commit
record, and all that is known of other writers, is the owner's thread's alone. At most one shard is
in the making.
"""

import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ..files.base import Files
from ..tables.features import feature_statistics
from ..tables.invariants import check_shape
from ..tables.rows import check_row, row_bytes
from ..tables.schema import TableName
from ..tables.shard import ShardInfo, write_shard
from ..tables.statistics import statistics
from .commits import CommitLog
from .segments import keep_last_segment

TOKENS_COLUMN = {
    "generations": "completion_tokens",
    "soft_targets": "span_tokens",
    "features": "vectors",
}
"""What a commit record counts as tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitLimits:
    """A shard is made when any of these is reached."""

    rows: int = 256
    seconds: float = 30.0
    """Since the oldest row that waits."""
    bytes: int = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Making:
    """A shard in the making."""

    rows: dict[bytes, dict[str, Any]]
    shard: Future[ShardInfo]


class ShardWriter:
    """Adds rows to a table, each key once, whoever else writes.

    A writer is for one thread: open one per thread.

    Use as a context manager: leaving the block commits what is finished, also when an exception
    leaves it. What goes wrong while a shard is made is raised by the next call of `add`, `tick` or
    `flush`; none of its rows is committed.
    """

    def __init__(
        self, files: Files, log: CommitLog, *, about: Mapping[str, Any], limits: CommitLimits
    ) -> None:
        self._files = files
        self._log = log
        self._about = dict(about)
        self._limits = limits
        self._writer = str(uuid.uuid4())
        self._waiting: dict[bytes, dict[str, Any]] = {}
        self._waiting_bytes = 0
        self._oldest = 0.0
        self._making: _Making | None = None
        self._maker = ThreadPoolExecutor(1, thread_name_prefix=f"shards of {log.table}")
        self._last_commit = time.monotonic()
        self._failed = False
        self._first: list[ShardWriter] = []
        self._begun = self._own = 0
        self.rows = 0
        """Rows committed by this writer."""
        self.tokens = 0
        """Tokens committed by this writer."""
        self.bytes = 0
        """Bytes of the shards committed by this writer."""
        self.skipped = 0
        """Rows that were there already."""

    def __enter__(self) -> Self:
        self._log.refresh()
        self._begun = self._log.next
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self._failed:
                self.flush()
        finally:
            self._maker.shutdown()

    def add(self, row: Mapping[str, Any]) -> bool:
        """Take a row; False if its key is committed or waiting already.

        A row that does not fit is refused.
        """
        checked = check_row(self._log.table, row)
        check_shape(self._log.table, checked, self._about)
        key = checked["key"]
        making = () if self._making is None else self._making.rows
        if key in self._log.keys or key in self._waiting or key in making:
            self.skipped += 1
            return False
        if not self._waiting:
            self._oldest = time.monotonic()
        self._waiting[key] = checked
        self._waiting_bytes += row_bytes(checked)
        if len(self._waiting) >= self._limits.rows or self._waiting_bytes >= self._limits.bytes:
            self._make()
        self.tick()
        return True

    def follows(self, other: "ShardWriter") -> None:
        """Commit what another one was given before a row of this one, before that row.

        So whoever has the row has what was given before it.
        """
        self._first.append(other)

    def committed(self, key: bytes) -> bool:
        """Whether a key is in the table, as far as this writer knows."""
        return key in self._log.keys

    @property
    def others(self) -> int:
        """Commits of others since this writer was opened, as far as it knows."""
        return self._log.next - self._begun - self._own

    def refresh(self) -> None:
        """Read what others have committed meanwhile."""
        self._log.advance()

    def tick(self) -> None:
        """Commit a shard that is made, and make one if the time is up.

        It is called while waiting for rows.
        """
        if self._making is not None and self._making.shard.done():
            self._commit()
        if self._waiting and time.monotonic() - self._oldest >= self._limits.seconds:
            self._make()

    def flush(self) -> None:
        """Commit the rows that wait; returns when they are."""
        if self._waiting:
            self._make()
        self._commit()

    def _make(self) -> None:
        """Let the thread make a shard of the rows that wait, once the one before is committed."""
        self._commit()
        rows = {key: row for key, row in self._waiting.items() if key not in self._log.keys}
        self.skipped += len(self._waiting) - len(rows)
        self._waiting, self._waiting_bytes = {}, 0
        if rows:
            self._making = _Making(rows, self._maker.submit(self._write, list(rows.values())))

    def _commit(self) -> None:
        """Commit the shard in the making, if there is one, when it is made."""
        if self._making is None:
            return
        for other in self._first:
            other.flush()
        self._failed = True
        rows = list(self._making.rows.values())
        committed = self._appended(rows, self._making.shard)
        self._failed = False
        self._making = None
        self.rows += len(committed)
        self.tokens += _count_tokens(self._log.table, committed)
        self.skipped += len(rows) - len(committed)

    def _appended(
        self, rows: list[dict[str, Any]], shard: Future[ShardInfo]
    ) -> list[dict[str, Any]]:
        """Those of the rows that are committed now, by this writer."""
        while True:
            made = shard.result()
            left = [row for row in rows if row["key"] not in self._log.keys]
            if not left:
                return []
            if len(left) < len(rows):  # others have committed some meanwhile: a shard without them
                rows = left
                shard = self._maker.submit(self._write, rows)
                continue
            now = time.monotonic()
            fields = {
                "writer": self._writer,
                "tokens": _count_tokens(self._log.table, rows),
                "seconds": round(now - self._last_commit, 3),
                "stage": self._about.get("stage", ""),
                "versions": self._about.get("versions", {}),
            }
            if self._log.append(fields, made, (row["key"] for row in rows)) is not None:
                self._last_commit = now
                self._own += 1
                self.bytes += made.bytes
                keep_last_segment(self._files, self._log)
                return rows

    def _write(self, rows: list[dict[str, Any]]) -> ShardInfo:
        about = self._about
        if self._log.table == "soft_targets":
            about = {"head": "lm", **about, "statistics": statistics(rows)}
        if self._log.table == "features":
            about = {**about, "statistics": feature_statistics(rows)}
        return write_shard(self._files, self._log.table, rows, about=about)


def _count_tokens(table: TableName, rows: list[dict[str, Any]]) -> int:
    column = TOKENS_COLUMN.get(table)
    return 0 if column is None else sum(int(row[column]) for row in rows)
