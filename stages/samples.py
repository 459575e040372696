"""The samples of a snapshot as training steps: whole samples, in an order that only the snapshot and the seed decide.

Where the reading stands is a `Cursor`, four integers; from any of them the same steps follow. No torch here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..storage.codec import SoftTargets
from ..storage.errors import UsageError
from ..storage.order import SnapshotReader
from ..storage.snapshot import Snapshot
from ..storage.store import Store
from .alignment import scored_span

_SPAN = {"soft_targets": ("span_start", "span_tokens"), "generations": ("prompt_tokens", "completion_tokens")}
_TARGETS = ("k", "ids", "logprobs", "tail_logprob", "token_logprob", "entropy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where the reading stands: what has been consumed so far."""

    epoch: int = 0
    sample: int = 0
    """Samples consumed in this epoch."""
    step: int = 0
    tokens: int = 0
    """Positions consumed, over all epochs."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One sequence and what it is asked for."""

    token_ids: np.ndarray
    """[T] int32."""
    span_start: int
    span_tokens: int
    targets: SoftTargets | None
    """At the span's positions, summing to 1; None: cross-entropy only."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """The samples of one optimizer step, and where the reading stands after it."""

    samples: list[Sample]
    after: Cursor

    @property
    def tokens(self) -> int:
        """Positions fed."""
        return sum(len(sample) for sample in self.samples)

    @property
    def scored_tokens(self) -> int:
        """N of the whole step: what its losses are divided by."""
        return sum(sample.span_tokens for sample in self.samples)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(len(sample) for sample in self.samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """How much a snapshot holds."""

    samples: int
    tokens: int
    scored_tokens: int
    longest: int


class Samples:
    """The samples of a snapshot, in training order."""

    def __init__(self, store: Store, snapshot: Snapshot, *, soft: bool, seed: int = 0) -> None:
        """`soft`: read the teacher's targets too (the snapshot must be of soft_targets)."""
        if not snapshot.rows:
            raise UsageError(f"snapshot {snapshot.id}: holds no rows, so there is nothing to train on. Add data.")
        if soft and snapshot.table != "soft_targets":
            raise UsageError(
                f"snapshot {snapshot.id}: holds {snapshot.table}, which have no soft targets. Name a snapshot of "
                "soft_targets, or set loss.soft_weight to 0."
            )
        self._store, self._snapshot, self._soft, self._seed = store, snapshot, soft, seed
        self._span = _SPAN[snapshot.table]

    def __len__(self) -> int:
        return self._snapshot.rows

    def lengths(self) -> Lengths:
        """Counts over the whole snapshot, from two integer columns."""
        rows = SnapshotReader(self._store, self._snapshot, self._span).samples(seed=0, epoch=0)
        spans = np.array([[row[name] for name in self._span] for row in rows], dtype=np.int64)
        totals = spans.sum(axis=1)
        return Lengths(
            samples=len(spans),
            tokens=int(totals.sum()),
            scored_tokens=int(spans[:, 1].sum() - (spans[:, 0] == 0).sum()),
            longest=int(totals.max()),
        )

    def read(self, *, epoch: int, start: int = 0) -> Iterator[Sample]:
        """The samples of an epoch from number `start` on."""
        columns = ["token_ids", *self._span, *(_TARGETS if self._soft else ())]
        reader = SnapshotReader(self._store, self._snapshot, columns)
        for row in reader.samples(seed=self._seed, epoch=epoch, start=start):
            yield self._sample(row)

    def _sample(self, row: Mapping[str, Any]) -> Sample:
        start, span = scored_span(int(row[self._span[0]]), len(row["token_ids"]))
        targets = SoftTargets.from_row(row).normalised() if self._soft else None
        return Sample(token_ids=row["token_ids"], span_start=start, span_tokens=span, targets=targets)


def steps(
    samples: Samples,
    cursor: Cursor,
    *,
    tokens_per_step: int,
    stop_tokens: int | None = None,
    stop_samples: int | None = None,
) -> Iterator[Step]:
    """Steps from a cursor on: samples in order until the next one would exceed `tokens_per_step`, at least one.

    Epochs follow one another without a seam. Ends before the first step that starts at `stop_tokens` or more, and after
    `stop_samples` samples of all epochs together.
    """
    held: list[Sample] = []
    for sample, following in _stream(samples, cursor, stop_samples):
        if held and sum(map(len, held)) + len(sample) > tokens_per_step:
            cursor = replace(cursor, step=cursor.step + 1)
            yield Step(samples=held, after=cursor)
            held = []
        if not held and stop_tokens is not None and cursor.tokens >= stop_tokens:
            return
        held.append(sample)
        cursor = replace(following, step=cursor.step)
    if held:
        yield Step(samples=held, after=replace(cursor, step=cursor.step + 1))


def _stream(samples: Samples, cursor: Cursor, stop_samples: int | None) -> Iterator[tuple[Sample, Cursor]]:
    while True:
        for sample in samples.read(epoch=cursor.epoch, start=cursor.sample):
            if stop_samples is not None and cursor.epoch * len(samples) + cursor.sample >= stop_samples:
                return
            cursor = replace(cursor, sample=cursor.sample + 1, tokens=cursor.tokens + len(sample))
            yield sample, cursor
        if stop_samples is not None and (cursor.epoch + 1) * len(samples) >= stop_samples:
            return
        cursor = replace(cursor, epoch=cursor.epoch + 1, sample=0)
