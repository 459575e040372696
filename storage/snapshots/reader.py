"""The reading of a snapshot in training order. A few threads decode row groups ahead.

Row groups of the current window stay decoded until its last sample is handed out, and at most a
window of them is read ahead: at most two windows exist at once, 2 x 16 row groups of 24 MiB (more
only where a single row is larger), and of these only the rows that were asked for. How large the
store is plays no part.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count, tee
from typing import Any

import numpy as np

from ..errors import IntegrityError
from ..store.store import Store
from ..tables.rows import Rows
from .order import WINDOW, Order, Window
from .snapshot import Snapshot

THREADS = min(4, os.cpu_count() or 1)
"""That decode, each a row group at a time."""
THREAD_NAME = "stillroom-read-ahead"
"""First part of their names."""


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What is asked for of one window: its row groups, and where each sample is in them.

    The row groups are in the order of first need.
    """

    groups: list[tuple[int, np.ndarray]]
    """Index into the order's row groups; the rows wanted of it, ascending."""
    places: list[tuple[int, int]]
    """Per sample: index into `groups`, index into its wanted rows."""


class SnapshotReader:
    """Samples of a snapshot in training order, by number through all epochs (see `order`)."""

    def __init__(
        self,
        store: Store,
        snapshot: Snapshot,
        columns: Sequence[str],
        *,
        decode: Callable[[Rows, np.ndarray], Any] = lambda rows, numbers: rows,
    ) -> None:
        """`decode` makes a list of samples of a row group's rows, in a thread that reads.

        Without it samples are dicts.

        It is told the numbers of the rows too, as `Order.numbered` counts them.
        """
        self._store, self._snapshot, self._columns = store, snapshot, list(columns)
        self._decode = decode
        self._order = Order(snapshot)

    def samples(
        self, *, seed: int, start: int = 0, stop: int | None = None
    ) -> Generator[Any, None, None]:
        """Samples `start` to `stop`, one at a time; without end if `stop` is None."""
        numbers = count(start) if stop is None else range(start, stop)
        with closing(
            self.batches((range(number, number + 1) for number in numbers), seed=seed)
        ) as batches:
            for (sample,) in batches:
                yield sample

    def batches(self, ranges: Iterable[range], *, seed: int) -> Generator[list[Any], None, None]:
        """The samples of each range of numbers; ranges ascend. Page checksums are verified.

        Nothing is read ahead before the first batch is handed out, so a run that resumes opens the
        files of that batch and no other. The threads end with the iterator.

        Raises:
            IntegrityError: a file is damaged or not the one that was chosen; names file, column and
                row group.
        """
        if not self._order.rows:
            return
        wanted, ranges = tee(ranges)
        parts, ahead = tee(self._parts(wanted, seed))
        loads = _ReadAhead(self._load, (group for part in ahead for group in part.groups))
        try:
            samples = _samples(parts, loads)
            for numbers in ranges:
                yield [next(samples) for _ in numbers]
                loads.start()
        finally:
            loads.close()

    def _parts(self, ranges: Iterator[range], seed: int) -> Iterator[_Part]:
        asked = next(ranges, None)
        if asked is None:
            return
        for window in self._order.windows(seed=seed, start=asked.start):
            numbers = []  # of the samples asked for that this window holds
            while asked is not None and asked.start < window.stop:
                numbers.append(np.arange(asked.start, min(asked.stop, window.stop)))
                in_next_window = range(window.stop, asked.stop)
                asked = in_next_window if in_next_window else next(ranges, None)
            if numbers:
                yield _part(window, np.concatenate(numbers) - window.first)
            if asked is None:
                return

    def _load(self, group: int, rows: np.ndarray) -> Any:
        shard = self._snapshot.shards[self._order.shards[group]]
        number = int(self._order.numbers[group])
        file = self._store.shard(self._snapshot.table, shard.sha256)
        if file.rows_per_group != shard.row_groups:
            raise IntegrityError(
                f"{shard.name}: row groups of {file.rows_per_group} rows, the snapshot says "
                f"{shard.row_groups}. Run `stillroom verify`."
            )
        # Groups are read side by side, so the columns of one need not be.
        table = file.select(file.starts[number] + rows, self._columns, threads=False)
        try:
            return self._decode(Rows(table), self._order.numbered(group, rows))
        except IntegrityError as error:
            raise IntegrityError(f"{shard.name}: row group {number}: {error}") from error


def _part(window: Window, wanted: np.ndarray) -> _Part:
    """`wanted`: ascending indices into the window's samples."""
    groups, rows = window.groups[wanted], window.rows[wanted]
    # `slots`: the sample's row group, counted in the order in which they are first needed.
    distinct, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    needed = np.argsort(first)
    slots = np.argsort(needed)[inverse]
    # `index`: where the sample's row stands among those wanted of its row group, ascending.
    by_row = np.lexsort((rows, slots))
    edges = np.cumsum(np.bincount(slots))[:-1]
    starts = np.concatenate([[0], edges])
    index = np.empty_like(slots)
    index[by_row] = np.arange(len(slots)) - starts[slots[by_row]]
    loads = zip(distinct[needed].tolist(), np.split(rows[by_row], edges), strict=True)
    places = zip(slots.tolist(), index.tolist(), strict=True)
    return _Part(list(loads), list(places))


def _samples(parts: Iterable[_Part], loads: "_ReadAhead") -> Iterator[Any]:
    for part in parts:
        decoded: list[Any] = []
        for slot, index in part.places:
            if slot == len(decoded):
                decoded.append(loads.next())
            yield decoded[slot][index]


class _ReadAhead:
    """The results of some loads, in order, made by `THREADS`.

    Once started, at most `WINDOW` of them wait.
    """

    def __init__(self, load: Callable[..., Any], jobs: Iterator[tuple[int, np.ndarray]]) -> None:
        self._load, self._jobs = load, jobs
        self._pool = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix=THREAD_NAME)
        self._waiting: deque[Future[Any]] = deque()
        self._ahead = 0

    def start(self) -> None:
        """From now on, read ahead."""
        if not self._ahead:
            self._ahead = WINDOW
            self._submit(WINDOW)

    def next(self) -> Any:
        """The next result; what its load raised is raised here."""
        self._submit(1)
        result = self._waiting.popleft().result()
        self._submit(self._ahead)
        return result

    def _submit(self, most: int) -> None:
        while len(self._waiting) < most and (job := next(self._jobs, None)) is not None:
            self._waiting.append(self._pool.submit(self._load, *job))

    def close(self) -> None:
        """Drop what waits and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
