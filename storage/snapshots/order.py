"""The order of samples: a pure function of snapshot, seed and epoch, made of windows so that reading stays local.

Row groups are permuted and taken `window` at a time; within a window the chosen samples are
permuted. World size, workers and clocks play no part, so a run goes on exactly where it stopped, on
any number of machines.

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
"""Row groups that are shuffled together."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """The n samples of some row groups, in training order."""

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
    """The row groups of a snapshot that hold chosen rows (G of them), and the order of their samples."""

    def __init__(self, snapshot: Snapshot, *, window: int = WINDOW) -> None:
        self._snapshot, self._window = snapshot, window
        counts = np.array([len(shard.row_groups) for shard in snapshot.shards], np.int64)
        sizes = np.array([rows for shard in snapshot.shards for rows in shard.row_groups], np.int64)
        shards = np.repeat(np.arange(len(counts)), counts)
        starts = np.cumsum(sizes) - sizes  # in rows of all shards together
        first = np.cumsum(counts) - counts  # row group of each shard
        bases = starts[first]
        chosen = [shard.rows + base for shard, base in zip(snapshot.shards, bases, strict=True)]
        edges = np.searchsorted(
            np.concatenate([np.empty(0, np.int64), *chosen]), np.append(starts, sizes.sum())
        )
        kept = np.flatnonzero(np.diff(edges))
        self.shards = shards[kept]
        """[G] index of the shard in the snapshot."""
        self.numbers = kept - first[self.shards]
        """[G] number of the row group in its shard."""
        self._starts = (starts - bases[shards])[kept]
        before = np.cumsum([0, *map(len, chosen)])[self.shards]
        self._chosen = np.stack(
            [edges[kept] - before, edges[kept + 1] - before], axis=1
        )  # of the shard's chosen rows
        self.rows = int(edges[-1])
        """Samples of an epoch."""

    def windows(self, *, seed: int, start: int = 0) -> Iterator[Window]:
        """From the window that holds sample `start` on, without end; those before it are not made."""
        while self.rows:
            epoch, offset = divmod(start, self.rows)
            name = {
                "snapshot": self._snapshot.id,
                "seed": seed,
                "epoch": epoch,
                "window": self._window,
            }
            groups = _permutation(len(self.shards), part="groups", **name)
            lengths = np.add.reduceat(
                np.diff(self._chosen)[groups, 0], np.arange(0, len(groups), self._window)
            )
            edges = np.concatenate([[0], np.cumsum(lengths)])
            skipped = int(np.searchsorted(edges, offset, side="right")) - 1
            for number, (first, stop) in enumerate(
                pairwise(edges[skipped:].tolist()), start=skipped
            ):
                shuffled = _permutation(stop - first, part=number, **name)
                part = groups[number * self._window : (number + 1) * self._window]
                yield self._made(epoch * self.rows + first, part, shuffled)
            start = (epoch + 1) * self.rows

    def _made(self, first: int, groups: np.ndarray, shuffled: np.ndarray) -> Window:
        rows = [
            self._snapshot.shards[self.shards[group]].rows[slice(*self._chosen[group])]
            - self._starts[group]
            for group in groups
        ]
        of = np.repeat(groups, [len(part) for part in rows])
        return Window(first, of[shuffled], np.concatenate(rows)[shuffled])


def _permutation(length: int, **name: Any) -> np.ndarray:
    # numpy promises that a bit generator's raw stream never changes; it does not promise that of
    # `permutation`.
    stream = np.random.PCG64(int.from_bytes(content_key("order", **name), "big"))
    return np.argsort(stream.random_raw(length), kind="stable") if length else np.empty(0, np.int64)
