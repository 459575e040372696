"""A snapshot: an immutable, ordered choice of rows, named by the hash of that choice. What a training run reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import IntegrityError, UsageError
from .keys import content_id, seal, unseal
from .schema import FORMAT_VERSION, TableName
from .store import Store


@dataclass(frozen=True, slots=True)
class SnapshotShard:
    """The chosen rows of one shard."""

    sha256: str
    name: str
    row_groups: tuple[int, ...]
    """Rows of each row group of the shard."""
    rows: tuple[int, ...]
    """Indices of the chosen rows, ascending."""


@dataclass(frozen=True, slots=True)
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
    store: Store, table: TableName, places: Mapping[str, Sequence[int]], about: Mapping[str, Any]
) -> Snapshot:
    """Choose rows by shard sha256 and row index. Writes nothing; equal choices have equal ids."""
    commits = {commit.shard.sha256: commit for commit in store.commits(table)}
    if unknown := sorted(set(places) - set(commits)):
        raise UsageError(f"snapshot of {table}: no commit has the shard {unknown[0]}. Choose rows with `Store.index`.")
    shards = []
    for sha256, commit in commits.items():
        rows = tuple(sorted({int(row) for row in places.get(sha256, ())}))
        if rows and not 0 <= rows[0] <= rows[-1] < commit.shard.rows:
            raise UsageError(f"snapshot of {table}: shard {sha256} has {commit.shard.rows} rows (asked: {rows[-1]}).")
        if rows:
            shards.append(SnapshotShard(sha256, commit.shard.name, commit.shard.row_groups, rows))
    return Snapshot(_snapshot_id(table, shards), table, tuple(shards), dict(about))


def save_snapshot(store: Store, snapshot: Snapshot) -> None:
    """Keep a snapshot under its id; the first `about` of an id stays."""
    record = {
        "format_version": FORMAT_VERSION,
        "id": snapshot.id,
        "table": snapshot.table,
        "shards": [
            {
                "sha256": shard.sha256,
                "name": shard.name,
                "row_groups": list(shard.row_groups),
                "rows": _runs(shard.rows),
            }
            for shard in snapshot.shards
        ],
        "about": dict(snapshot.about),
    }
    store.files.put_if_absent(f"snapshots/{snapshot.id}.json", seal(record))


def load_snapshot(store: Store, snapshot_id: str) -> Snapshot:
    """Read a snapshot that was kept."""
    name = f"snapshots/{snapshot_id}.json"
    if not store.files.exists(name):
        known = [name.removesuffix(".json") for name in store.files.names("snapshots")]
        raise UsageError(
            f"{store.root}: no snapshot {snapshot_id}. Known: {', '.join(known[:10]) or 'none'}. Check the id."
        )
    record = unseal(store.files.read(name), name)
    shards = [
        SnapshotShard(
            shard["sha256"],
            shard["name"],
            tuple(shard["row_groups"]),
            tuple(row for start, stop in shard["rows"] for row in range(start, stop)),
        )
        for shard in record["shards"]
    ]
    if not snapshot_id == record["id"] == _snapshot_id(record["table"], shards):
        raise IntegrityError(f"{name}: the snapshot is not the one its name says. Restore the file or make it again.")
    return Snapshot(snapshot_id, record["table"], tuple(shards), record["about"])


def _snapshot_id(table: TableName, shards: Sequence[SnapshotShard]) -> str:
    return content_id("snapshot", table=table, shards=[[shard.sha256, _runs(shard.rows)] for shard in shards])


def _runs(rows: Sequence[int]) -> list[list[int]]:
    """Ascending rows as half-open runs: 0, 1, 2, 5 -> [[0, 3], [5, 6]]."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    return runs
