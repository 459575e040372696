"""A snapshot: an immutable, ordered choice of rows, named by the hash of that choice.

What a training run reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..bounds import MOST_ROWS, hexdigest, inside, integer, mapping, row_groups, string, understood
from ..errors import IntegrityError, UsageError
from ..keys import content_id, seal, unseal
from ..store.store import Store
from ..tables.schema import RECORD_VERSION, SCHEMAS, TableName
from ..tables.shard import ShardFile

_UNPROVED = 1 << 24
"""A snapshot that lists more rows is compared with the records of its shards before its runs are
unrolled."""

_AGAIN = "Restore the file or make it again."
_NONE = np.empty(0, np.int32)


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
class AskedOrder:
    """In which order the N samples were asked for, whoever committed which of them when."""

    samples: np.ndarray
    """[N] int32: each by its number among the snapshot's own, shard after shard."""
    groups: np.ndarray
    """[G] int32: how many of them are read together."""

    def said(self) -> dict[str, Any]:
        """In a record, and in the snapshot's name."""
        return {"order": _runs(self.samples), "groups": self.groups.tolist()}


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Chosen rows of one table; shards in commit order."""

    id: str
    table: TableName
    shards: tuple[SnapshotShard, ...]
    about: Mapping[str, Any]
    order: "AskedOrder | None" = None
    """None: nobody asks (features, partners), or a snapshot of before there was one."""

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
    return Snapshot(_snapshot_id(table, _named(shards)), table, tuple(shards), dict(about))


def with_order(snapshot: Snapshot, order: AskedOrder) -> Snapshot:
    """The same choice with an order, which is a part of its name."""
    found = _snapshot_id(snapshot.table, _named(snapshot.shards), **order.said())
    return replace(snapshot, id=found, order=order)


def is_kept(store: Store, snapshot: Snapshot) -> bool:
    """Whether the store, or a source of it, has the record."""
    return any(part.files.exists(f"snapshots/{snapshot.id}.json") for part, _ in store.parts)


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
    if snapshot.order is not None:
        record |= snapshot.order.said()
    store.files.put_if_absent(f"snapshots/{snapshot.id}.json", seal(record))


def load_snapshot(store: Store, snapshot_id: str, *, most: int | None = None) -> Snapshot:
    """Read a snapshot that was kept, here or in a source.

    Args:
        store: The store.
        snapshot_id: Its id.
        most: Rows that it can have; None: as many as its shards.

    Raises:
        UsageError: there is none of this id, or a long one lists rows of a source that is not open.
        IntegrityError: its record was changed, or says what cannot be.
    """
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
    with understood(name, "snapshot"):
        table, runs = _checked(record)
        shards = [
            SnapshotShard(
                sha256=hexdigest(shard["sha256"]),
                name=inside(shard["name"]),
                row_groups=tuple(shard["row_groups"]),
                rows=_NONE,
                source=string(shard.get("source", "")),
            )
            for shard in record["shards"]
        ]
        about = mapping(record["about"])
        wanted = sum(stop - first for of_shard in runs for first, stop in of_shard)
        said = _checked_order(record, wanted)
    named = [[shard.sha256, of_shard] for shard, of_shard in zip(shards, runs, strict=True)]
    if not snapshot_id == record["id"] == _snapshot_id(table, named, **said):
        raise IntegrityError(f"{name}: the snapshot is not the one its name says. {_AGAIN}")
    if most is not None and wanted > most:
        raise IntegrityError(f"{name}: it lists {wanted} rows, there are {most}. {_AGAIN}")
    if most is None and wanted > _UNPROVED:
        _prove_lengths(store, table, shards, name=name)
    filled = (replace(shard, rows=rows) for shard, rows in zip(shards, _rows(runs), strict=True))
    order = (
        AskedOrder(_rows([said["order"]])[0], np.array(said["groups"], np.int32)) if said else None
    )
    return Snapshot(snapshot_id, table, tuple(filled), about, order)


def _checked(record: Mapping[str, Any]) -> tuple[TableName, list[list[list[int]]]]:
    """The table, and the runs of each shard: ascending, and none beyond the row groups."""
    if record["table"] not in SCHEMAS:
        raise ValueError(f"there is no table {record['table']!a}")
    for shard in record["shards"]:
        size = sum(integer(rows, most=MOST_ROWS) for rows in shard["row_groups"])
        row_groups(shard["row_groups"], rows=integer(size, most=MOST_ROWS))
        # [first, stop] of each run, one after another
        edges = [
            integer(edge, most=size) for first, stop in shard["rows"] for edge in (first, stop)
        ]
        full = all(first < stop for first, stop in shard["rows"])
        if not edges or not full or edges != sorted(edges):
            raise ValueError(f"the runs of rows of {shard['name']!a} do not ascend")
    return record["table"], [shard["rows"] for shard in record["shards"]]


def _prove_lengths(
    store: Store, table: TableName, shards: Sequence[SnapshotShard], *, name: str
) -> None:
    """See that shards have as many rows as a record says, before its rows are listed."""
    known = {commit.shard.sha256: commit.shard.row_groups for commit in store.commits(table)}
    for shard in shards:
        if shard.source and shard.sha256 not in known:
            raise UsageError(
                f"{name}: it lists more than {_UNPROVED} rows, of the read-only source "
                f"{shard.source} too, and how many that one has cannot be asked of this store "
                "alone. Name a recipe with storage.sources."
            )
        # The shard of a commit that was withdrawn stays readable for those who name it.
        found = known.get(shard.sha256) or ShardFile(store.files, shard.name).rows_per_group
        if found != shard.row_groups:
            raise IntegrityError(
                f"{name}: it says that {shard.name} has {sum(shard.row_groups)} rows, and it has "
                f"{sum(found)}. {_AGAIN}"
            )


def _checked_order(record: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """What a record says of an order: each sample is there once, in one group."""
    if "order" not in record:
        return {}
    runs, groups = record["order"], record["groups"]
    row_groups(groups, rows=rows)
    edges = sorted((integer(first), integer(stop, most=rows)) for first, stop in runs)
    together = [0, *(stop for _, stop in edges)]
    if [first for first, _ in edges] != together[:-1] or together[-1] != rows:
        raise ValueError("its order has not each sample once")
    if any(first >= stop for first, stop in edges):
        raise ValueError("a run of its order is empty")
    return {"order": runs, "groups": groups}


def _named(shards: Sequence[SnapshotShard]) -> list[list[Any]]:
    return [[shard.sha256, _runs(shard.rows)] for shard in shards]


def _snapshot_id(table: TableName, shards: Sequence[Sequence[Any]], **order: Any) -> str:
    """Hash of [shard sha256, runs of rows] of every shard, and of the order where there is one."""
    return content_id("snapshot", table=table, shards=shards, **order)


def _runs(rows: np.ndarray) -> list[list[int]]:
    """Rows as half-open runs: 0, 1, 2, 5 -> [[0, 3], [5, 6]]."""
    gaps = np.flatnonzero(np.diff(rows) != 1) + 1  # where a run begins, but for the first
    edges = np.concatenate([[0], gaps, [len(rows)]])
    firsts = rows[edges[:-1]]
    lasts = rows[edges[1:] - 1]
    runs: list[list[int]] = np.stack([firsts, lasts + 1], axis=1).tolist()
    return runs


def _rows(shards: Sequence[list[list[int]]]) -> list[np.ndarray]:
    """The rows of each shard's runs, of all shards at once: a snapshot may hold thousands."""
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
