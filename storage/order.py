"""The order of samples: a pure function of snapshot, seed and epoch, made of windows so that reading stays local.

Row groups are permuted and taken `window` at a time; within a window the chosen samples are permuted. World size,
workers and clocks play no part, so a run goes on exactly where it stopped, on any number of machines.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .keys import content_key
from .shard import Rows
from .snapshot import Snapshot
from .store import Store

WINDOW = 16
"""Row groups that are shuffled together."""


def epoch_order(snapshot: Snapshot, *, seed: int, epoch: int, window: int = WINDOW) -> Iterator[list[tuple[int, int]]]:
    """Windows of (index of the shard in the snapshot, row); together every chosen row once."""
    groups = _groups(snapshot)
    name = {"snapshot": snapshot.id, "seed": seed, "epoch": epoch, "window": window}
    shuffled = [groups[i] for i in _permutation(len(groups), part="groups", **name)]
    for number, start in enumerate(range(0, len(shuffled), window)):
        samples = [sample for group in shuffled[start : start + window] for sample in group]
        yield [samples[i] for i in _permutation(len(samples), part=number, **name)]


def _groups(snapshot: Snapshot) -> list[list[tuple[int, int]]]:
    """Chosen samples by row group, empty groups left out."""
    groups = []
    for index, shard in enumerate(snapshot.shards):
        edges = np.searchsorted(shard.rows, np.cumsum(shard.row_groups))
        groups += [[(index, int(row)) for row in part] for part in np.split(np.array(shard.rows), edges[:-1])]
    return [group for group in groups if group]


def _permutation(length: int, **name: Any) -> np.ndarray:
    # numpy promises that a bit generator's raw stream never changes; it does not promise that of `permutation`.
    stream = np.random.PCG64(int.from_bytes(content_key("order", **name), "big"))
    return np.argsort(stream.random_raw(length), kind="stable") if length else np.empty(0, np.int64)


class SnapshotReader:
    """Samples of a snapshot in training order."""

    def __init__(self, store: Store, snapshot: Snapshot, columns: Sequence[str]) -> None:
        self._store = store
        self._snapshot = snapshot
        self._columns = list(columns)

    def samples(self, *, seed: int, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """Samples of an epoch from number `start` on; windows before it are not read. Pages are checked."""
        for window in epoch_order(self._snapshot, seed=seed, epoch=epoch):
            if start < len(window):
                yield from self._read(window[start:])
            start = max(0, start - len(window))

    def _read(self, places: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        shards = {
            index: self._store.shard(self._snapshot.table, self._snapshot.shards[index].sha256) for index, _ in places
        }
        loaded: dict[tuple[int, int], Rows] = {}
        for index, row in places:
            shard = shards[index]
            group = shard.group_of(row)
            if (index, group) not in loaded:
                loaded[index, group] = Rows(shard.read(group, self._columns))
            yield loaded[index, group][int(row - shard.starts[group])]
