"""A snapshot: an immutable, ordered choice of rows, named by the hash of that choice.

What a training run reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import IntegrityError, UsageError
from ..keys import content_id, seal, unseal
from ..store.store import Store
from ..tables.schema import RECORD_VERSION, TableName


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotShard:
    """The chosen rows of one shard."""

    sha256: str
    name: str
    row_groups: tuple[int, ...]
    """Rows of each row group of the shard."""
    rows: np.ndarray
    """[R] int32 indices of the chosen rows, ascending."""
    source: str = ""
    """Name of the read-only source that the shard was in (`joined.py`); empty: the store itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Chosen rows of one table; shards in commit order."""

    id: str
    table: TableName
    shards: tuple[SnapshotShard, ...]
    about: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """How many rows are chosen."""
        return sum(len(shard.rows) for shard in self.shards)


def make_snapshot(
    store: Store,
    table: TableName,
    places: Mapping[str, Sequence[int] | np.ndarray],
    about: Mapping[str, Any],
) -> Snapshot:
    """Choose rows by shard sha256 and row index. Writes nothing; equal choices have equal ids."""
    commits = {commit.shard.sha256: commit for commit in store.commits(table)}
    if unknown := sorted(set(places) - set(commits)):
        raise UsageError(
            f"snapshot of {table}: no commit has the shard {unknown[0]}. Choose rows with "
            "`Store.index`."
        )
    shards = []
    for sha256, commit in commits.items():
        rows = np.unique(np.asarray(places.get(sha256, ()), dtype=np.int64))
        if not rows.size:
            continue
        if not 0 <= rows[0] <= rows[-1] < commit.shard.rows:
            raise UsageError(
                f"snapshot of {table}: shard {sha256} has {commit.shard.rows} rows (asked: "
                f"{rows[-1]})."
            )
        chosen = SnapshotShard(
            sha256=sha256,
            name=commit.shard.name,
            row_groups=commit.shard.row_groups,
            rows=rows.astype(np.int32),
            source=store.source_of(table, sha256),
        )
        shards.append(chosen)
    runs = [[shard.sha256, _runs(shard.rows)] for shard in shards]
    return Snapshot(_snapshot_id(table, runs), table, tuple(shards), dict(about))


def save_snapshot(store: Store, snapshot: Snapshot) -> None:
    """Keep a snapshot under its id; the first `about` of an id stays."""
    record = {
        "format_version": RECORD_VERSION,
        "id": snapshot.id,
        "table": snapshot.table,
        "shards": [
            {
                "sha256": shard.sha256,
                "name": shard.name,
                "row_groups": list(shard.row_groups),
                "rows": _runs(shard.rows),
            }
            | ({"source": shard.source} if shard.source else {})
            for shard in snapshot.shards
        ],
        "about": dict(snapshot.about),
    }
    store.files.put_if_absent(f"snapshots/{snapshot.id}.json", seal(record))


def load_snapshot(store: Store, snapshot_id: str) -> Snapshot:
    """Read a snapshot that was kept, here or in a source."""
    name = f"snapshots/{snapshot_id}.json"
    files = next((part.files for part, _ in store.parts if part.files.exists(name)), None)
    if files is None:
        known = [
            name.removesuffix(".json")
            for part, _ in store.parts
            for name in part.files.names("snapshots")
        ]
        raise UsageError(
            f"{store.root}: no snapshot {snapshot_id}. Known: {', '.join(known[:10]) or 'none'}. "
            "Check the id."
        )
    record = unseal(files.read(name), name)
    runs = [[shard["sha256"], shard["rows"]] for shard in record["shards"]]
    if not snapshot_id == record["id"] == _snapshot_id(record["table"], runs):
        raise IntegrityError(
            f"{name}: the snapshot is not the one its name says. Restore the file or make it again."
        )
    rows_of_each = _rows([runs for _, runs in runs])
    shards = tuple(
        SnapshotShard(
            sha256=shard["sha256"],
            name=shard["name"],
            row_groups=tuple(shard["row_groups"]),
            rows=rows,
            source=shard.get("source", ""),
        )
        for shard, rows in zip(record["shards"], rows_of_each, strict=True)
    )
    return Snapshot(snapshot_id, record["table"], shards, record["about"])


def _snapshot_id(table: TableName, shards: Sequence[Sequence[Any]]) -> str:
    """Hash of [shard sha256, runs of rows] of every shard."""
    return content_id("snapshot", table=table, shards=shards)


def _runs(rows: np.ndarray) -> list[list[int]]:
    """Ascending rows as half-open runs: 0, 1, 2, 5 -> [[0, 3], [5, 6]]."""
    gaps = np.flatnonzero(np.diff(rows) != 1) + 1  # where a run begins, but for the first
    edges = np.concatenate([[0], gaps, [len(rows)]])
    firsts = rows[edges[:-1]]
    lasts = rows[edges[1:] - 1]
    runs: list[list[int]] = np.stack([firsts, lasts + 1], axis=1).tolist()
    return runs


def _rows(shards: Sequence[list[list[int]]]) -> list[np.ndarray]:
    """The rows of each shard's runs; of all shards at once, for a snapshot may hold thousands of them."""
    if not len(shards):
        return []
    runs = np.array([run for runs in shards for run in runs], dtype=np.int64).reshape(-1, 2)
    firsts, stops = runs[:, 0], runs[:, 1]
    lengths = stops - firsts
    ends = np.cumsum(lengths)
    # The j-th row of all belongs to the run that starts at j = ends - lengths.
    shifts = firsts - (ends - lengths)
    rows = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
    # Cut after the last run of each shard but the last shard.
    runs_so_far = np.cumsum([len(runs) for runs in shards], dtype=np.int64)
    cuts = ends[runs_so_far[:-1] - 1]
    return np.split(rows.astype(np.int32), cuts)
