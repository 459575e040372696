"""The order of samples: a pure function of snapshot, seed and epoch.

It is made of windows, so that reading stays local.

Groups of samples are permuted and taken `window` at a time; within a window the samples are
permuted. A snapshot that says in which order its samples were asked for says its groups too, and
then it plays no part which shard and which row group has a sample: so several workers of the
teacher give the order that one gives. Of others the groups are the row groups. World size, workers
and clocks play no part either, so a run goes on exactly where it stopped, on any number of
machines.

Samples are numbered through all epochs: number n is sample n % rows of epoch n // rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..keys import content_key
from .snapshot import Snapshot

WINDOW = 16
"""Groups that are shuffled together."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """The n samples of some groups, in training order."""

    first: int
    """Number of the first sample."""
    groups: np.ndarray
    """[n] the row group of each sample: an index into `Order.shards` and `Order.numbers`."""
    rows: np.ndarray
    """[n] index of each sample in its row group."""

    @property
    def stop(self) -> int:
        """Number of the sample after the last."""
        return self.first + len(self.rows)


class Order:
    """The G row groups of a snapshot that hold chosen rows, and the order of their samples."""

    def __init__(self, snapshot: Snapshot, *, window: int = WINDOW) -> None:
        self._snapshot, self._window = snapshot, window
        # All row groups of all shards, one after another; rows are counted through all of them.
        counts = np.array([len(shard.row_groups) for shard in snapshot.shards], np.int64)
        sizes = np.array([rows for shard in snapshot.shards for rows in shard.row_groups], np.int64)
        shards = np.repeat(np.arange(len(counts)), counts)  # shard of each row group
        starts = np.cumsum(sizes) - sizes  # first row of each row group
        first = np.cumsum(counts) - counts  # first row group of each shard
        bases = starts[first]  # first row of each shard

        # Row group g holds the chosen rows edges[g] to edges[g + 1].
        chosen = [shard.rows + base for shard, base in zip(snapshot.shards, bases, strict=True)]
        every = np.concatenate([np.empty(0, np.int64), *chosen])
        edges = np.searchsorted(every, np.append(starts, sizes.sum()))
        kept = np.flatnonzero(np.diff(edges))  # row groups with chosen rows
        self.shards = shards[kept]
        """[G] index of the shard in the snapshot."""
        self.numbers = kept - first[self.shards]
        """[G] number of the row group in its shard."""
        # The same within the shard: its first row, and which of the shard's chosen rows it holds.
        self._starts = (starts - bases[shards])[kept]
        before = np.cumsum([0, *map(len, chosen)])[self.shards]
        self._chosen = np.stack([edges[kept] - before, edges[kept + 1] - before], axis=1)
        self._firsts = edges[kept]  # number of its first row among the snapshot's own
        self.rows = int(edges[-1])
        """Samples of an epoch."""
        sizes = np.diff(edges)[kept] if snapshot.order is None else snapshot.order.groups
        self._edges = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # of the groups

    def windows(self, *, seed: int, start: int = 0) -> Iterator[Window]:
        """The windows from the one that holds sample `start` on, without end.

        Those before it are not made.
        """
        while self.rows:
            epoch, offset = divmod(start, self.rows)
            name = self._name | {"seed": seed, "epoch": epoch, "window": self._window}
            groups = _permutation(len(self._edges) - 1, part="groups", **name)
            edges = self._edges_of_windows(groups)
            skipped = int(np.searchsorted(edges, offset, side="right")) - 1
            left = pairwise(edges[skipped:].tolist())
            for number, (first, stop) in enumerate(left, start=skipped):
                part = groups[number * self._window : (number + 1) * self._window]
                shuffled = _permutation(stop - first, part=number, **name)
                yield self._made(epoch * self.rows + first, part, shuffled)
            start = (epoch + 1) * self.rows

    def numbered(self, group: int, rows: np.ndarray) -> np.ndarray:
        """The numbers of a row group's rows among the snapshot's own, shard after shard.

        They do not depend on the seed.

        Args:
            group: Index into the row groups.
            rows: Ascending indices of chosen rows in it.
        """
        numbers: np.ndarray = self._firsts[group] + np.searchsorted(self._rows_of(group), rows)
        return numbers

    def group_of(self, numbers: np.ndarray) -> np.ndarray:
        """The row group that has each sample, by its number among the snapshot's own."""
        groups: np.ndarray = np.searchsorted(self._firsts, numbers, side="right") - 1
        return groups

    @property
    def _name(self) -> dict[str, Any]:
        """What the permutations are named by; not by the shards, where these play no part."""
        if self._snapshot.order is None:
            return {"snapshot": self._snapshot.id}
        return {"order": "as asked for", "rows": self.rows}

    def _edges_of_windows(self, groups: np.ndarray) -> np.ndarray:
        """The samples of an epoch that window w holds: those from `edges[w]` to `edges[w + 1]`."""
        lengths = np.diff(self._edges)[groups]
        firsts = np.arange(0, len(groups), self._window)
        sums = np.add.reduceat(lengths, firsts)
        return np.concatenate([[0], np.cumsum(sums)])

    def _made(self, first: int, groups: np.ndarray, shuffled: np.ndarray) -> Window:
        numbers = np.concatenate([self._samples_of(group) for group in groups])[shuffled]
        row_groups, rows = self.group_of(numbers), np.empty_like(numbers)
        for group in np.unique(row_groups):
            mine = row_groups == group
            rows[mine] = self._rows_of(group)[numbers[mine] - self._firsts[group]]
        return Window(first, row_groups, rows)

    def _samples_of(self, group: int) -> np.ndarray:
        """The samples of a group, by their numbers among the snapshot's own."""
        first, stop = self._edges[group : group + 2]
        if self._snapshot.order is None:
            return np.arange(first, stop)
        return self._snapshot.order.samples[first:stop].astype(np.int64)

    def _rows_of(self, group: int) -> np.ndarray:
        """The chosen rows of a row group, counted from its own first."""
        shard = self._snapshot.shards[self.shards[group]]
        low, high = self._chosen[group]
        own: np.ndarray = shard.rows[low:high] - self._starts[group]
        return own


def _permutation(length: int, **name: Any) -> np.ndarray:
    """[length] a permutation that its name alone decides."""
    if not length:
        return np.empty(0, np.int64)
    # numpy promises that a bit generator's raw stream never changes; it does not promise that of
    # `permutation`.
    stream = np.random.PCG64(int.from_bytes(content_key("order", **name), "big"))
    return np.argsort(stream.random_raw(length), kind="stable")
