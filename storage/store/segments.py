"""Index segments: a few columns of the rows of 256 commits in one Parquet file.

So a plan opens no shard twice.

They are a cache: made from records and shards, made again when missing, damaged or out of date. A
segment's name holds the hash of the commits it covers and the sha256 of its own bytes, so one that
is not what it should be is never used.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import IntegrityError
from ..files.base import Files, file_sha256
from ..files.local import LocalFiles
from ..keys import content_id
from ..tables.schema import SCHEMAS, TableName
from ..tables.shard import ShardFile
from .commits import Commit, CommitLog

SEGMENT = 256
"""Commits to a segment."""

_READERS = 8  # shards read side by side: on an object store each is a few round trips

INDEXED: dict[TableName, tuple[str, ...]] = {
    "prompts": ("key", "prompt_key", "label", "labels"),
    "generations": (
        "key",
        "prompt_key",
        "source_key",
        "tokens_key",
        "author_id",
        "sampling_id",
        "sample_index",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "spans",
    ),
    "soft_targets": (
        "tokens_key",
        "teacher_id",
        "kind",
        "k",
        "mantissa_bits",
        "p",
        "k_min",
        "draw",
        "proposal",
        "temperatures",
        "engine",
    ),
    "features": ("key", "text_key", "teacher_id", "kind", "layer", "dtype"),
    "rejects": ("context_id", "prompt_key", "sample_index", "tokens_key", "limit_tokens", "reason"),
}
"""What a plan asks of a row."""


def segment_schema(table: TableName) -> pa.Schema:
    """`place` (`place_of`) and the indexed columns."""
    columns = [SCHEMAS[table].field(name).remove_metadata() for name in INDEXED[table]]
    return pa.schema([pa.field("place", pa.int64(), nullable=False), *columns])


def place_of(seq: int, row: int) -> int:
    """Where a row is, in one number: its commit above 32 bits, its index in the shard below."""
    return seq << 32 | row


def complete(commits: Sequence[Commit]) -> Iterator[Sequence[Commit]]:
    """The live commits, oldest first, by segment.

    The last segment is left out while it is not full.
    """
    last = commits[-1].seq if commits else -1
    start = 0
    for number in range((last + 1) // SEGMENT):
        stop = start
        while stop < len(commits) and commits[stop].seq < (number + 1) * SEGMENT:
            stop += 1
        if stop > start:
            yield commits[start:stop]
        start = stop


@dataclass(frozen=True, slots=True)
class Indexed:
    """What a plan asks of the rows of one table."""

    commits: list[Commit]
    """The live ones; `place` names them by their numbers."""
    newest: pa.Table
    """Rows that are in no segment, as `segment_schema` has them."""
    segments: list[Path]
    """Files with the others."""


def indexed(
    files: Files, table: TableName, commits: list[Commit], *, write: bool, scratch: Path
) -> Indexed:
    """The rows of these commits.

    Args:
        files: Where the store lies.
        table: Whose rows.
        commits: The live ones.
        write: Keep the segments that are missing.
        scratch: A folder that they are made in else: in memory are few rows, whatever there is.
    """
    known = Segments(files, table)
    into = files if write else LocalFiles(scratch)
    segments: list[Path] = []
    covered: set[int] = set()
    for part in complete(commits):
        name = known.find(part)
        segments.append(files.local(name) if name else into.local(known.put(part, into=into)))
        covered.update(commit.seq for commit in part)
    newest = read_columns(files, table, [commit for commit in commits if commit.seq not in covered])
    return Indexed(commits, newest, segments)


class Segments:
    """The segments of one table."""

    def __init__(self, files: Files, table: TableName) -> None:
        self._files, self._table = files, table
        self._folder = f"cache/index/{table}"
        self._names: dict[str, list[str]] = {}
        for name in files.names(self._folder):
            self._names.setdefault(name.split("-")[0], []).append(name)

    def find(self, commits: Sequence[Commit]) -> str | None:
        """The file of these commits' segment; None if there is none, or none that is whole."""
        names = (f"{self._folder}/{name}" for name in self._names.get(self._id(commits), ()))
        return next((name for name in names if self._is_whole(name, commits)), None)

    def _is_whole(self, name: str, commits: Sequence[Commit]) -> bool:
        digest = name.partition("-")[2].removesuffix(".parquet")
        try:
            path = self._files.local(name)
            return file_sha256(path)[:32] == digest and self._is_of(path, commits)
        except (FileNotFoundError, pa.ArrowException):  # vacuumed meanwhile; no Parquet file
            return False

    def _is_of(self, path: Path, commits: Sequence[Commit]) -> bool:
        """Whether a file has, by its footer, the rows of these commits and places within them."""
        metadata = pq.read_metadata(path)
        if metadata.num_rows != sum(commit.shard.rows for commit in commits):
            return False
        if not metadata.schema.to_arrow_schema().equals(segment_schema(self._table)):
            return False
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        found = [group.column(0).statistics for group in groups]
        first = place_of(commits[0].seq, 0)
        last = place_of(commits[-1].seq, commits[-1].shard.rows - 1)
        return all(s is not None and first <= s.min and s.max <= last for s in found)

    def put(self, commits: Sequence[Commit], *, into: Files | None = None) -> str:
        """Make a segment, in the store or elsewhere; returns its name."""
        rows = read_columns(self._files, self._table, commits)
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, compression="zstd", compression_level=1)
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()[:32]
        name = f"{self._folder}/{self._id(commits)}-{digest}.parquet"
        (into or self._files).replace(name, data)
        return name

    def _id(self, commits: Sequence[Commit]) -> str:
        covered = [[commit.seq, commit.shard.sha256] for commit in commits]
        return content_id(
            "segment", table=self._table, columns=INDEXED[self._table], commits=covered
        )


def keep_last_segment(files: Files, log: CommitLog) -> None:
    """Make the segment that the newest commit completes, if any, so that a plan finds it."""
    if log.next % SEGMENT:
        return
    commits = log.live(log.next - SEGMENT)
    if not commits:
        return
    try:
        Segments(files, log.table).put(commits)
    except IntegrityError:
        # Somebody's shard is damaged: that is for the next plan to say, not for this writer.
        return


def read_columns(files: Files, table: TableName, commits: Sequence[Commit]) -> pa.Table:
    """The segment's rows, from the shards themselves, page checksums verified."""
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda commit: _read(files, table, commit), commits))
    return pa.concat_tables([segment_schema(table).empty_table(), *parts])


def _read(files: Files, table: TableName, commit: Commit) -> pa.Table:
    shard = ShardFile(files, commit.shard.name)
    if shard.rows_per_group != commit.shard.row_groups:
        raise IntegrityError(
            f"{shard.name}: row groups {shard.rows_per_group}, committed {commit.shard.row_groups}."
        )
    data = shard.read_all(INDEXED[table])
    places = place_of(commit.seq, 0) + np.arange(data.num_rows, dtype=np.int64)
    return pa.Table.from_arrays(
        [pa.chunked_array([places]), *data.columns], schema=segment_schema(table)
    )
