"""The samples of a snapshot as training steps of whole samples.

Only the snapshot and the seed decide the order. Where the reading stands is a `Cursor`, four
integers; from any of them the same steps follow. No torch is imported here.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise, repeat

import numpy as np

from ...storage.errors import UsageError
from ...storage.snapshots.reader import SnapshotReader
from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.store import Store
from ...storage.tables.rows import Rows
from ...storage.tables.soft_targets import LISTS, SoftTargets, normalised_targets
from ...storage.tables.spans import SPAN_COLUMNS, spans_of
from ..recipe.features import Name
from .features import FeatureSource
from .teachers import TeacherSource

_SPAN = {
    "soft_targets": ("span_start", "span_tokens", "spans"),
    "generations": SPAN_COLUMNS,
}


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
    """One sequence and what it is asked for.

    Its arrays are parts of its row group's: read only, and kept together.
    """

    token_ids: np.ndarray
    """[T] int32."""
    spans: np.ndarray
    """[S, 2] start and tokens of each scored span."""
    targets: SoftTargets | None
    """[N] at the positions that predict the spans' tokens, summing to 1; None: cross-entropy
    only."""
    label: int | None = None
    """Gold class of a labelled text; None: it has none."""
    labels: np.ndarray | None = None
    """[N] int32 gold class of each target, -1 where it has none; None: nowhere."""
    image: bytes | None = None
    """As the teacher read it, a PNG file; None: it is a text."""
    number: int = 0
    """Its place in the snapshot's own order."""
    features: FeatureSource | None = None
    """Where the teacher's states of it are; None: it has none."""
    teachers: TeacherSource | None = None
    """Where the targets of several teachers are; None: it has one teacher, or none."""

    def of_teachers(self) -> list[tuple[int, SoftTargets]]:
        """Number of each of several teachers that has scored it, and the targets.

        Without several they are those of the first.
        """
        if self.targets is None:
            return []
        if self.teachers is None:
            return [(0, self.targets)]
        return self.teachers.of_text(self.number, self.token_ids, self.spans, self.targets)

    def states(self) -> dict[Name, np.ndarray]:
        """[T, D] float32 of each of its features."""
        return {} if self.features is None else self.features.states(self.number, self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def scored_tokens(self) -> int:
        """N, of all spans."""
        return int(self.spans[:, 1].sum())


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
        return sum(sample.scored_tokens for sample in self.samples)

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
    shortest: int = 1
    """Tokens; 1 where nobody wrote it down."""


class Samples:
    """The samples of a snapshot, in training order.

    They are numbered through all epochs, which follow one another.
    """

    def __init__(
        self,
        store: Store,
        snapshot: Snapshot,
        *,
        soft: bool,
        seed: int = 0,
        features: FeatureSource | None = None,
        teachers: TeacherSource | None = None,
    ) -> None:
        """`soft`: read the teacher's targets too (the snapshot must be of soft_targets)."""
        if not snapshot.rows:
            raise UsageError(
                f"snapshot {snapshot.id}: holds no rows, so there is nothing to train on. Add data."
            )
        if soft and snapshot.table != "soft_targets":
            raise UsageError(
                f"snapshot {snapshot.id}: holds {snapshot.table}, which have no soft targets. "
                "Name a snapshot of soft_targets, or set loss.soft_weight to 0."
            )
        self.snapshot, self.seed = snapshot, seed
        self._store, self._length = store, snapshot.rows
        self.soft = soft
        """Whether the teacher's targets are read."""
        self.features = features
        """Where the teacher's states of the samples are; None: nobody needs them."""
        self.teachers = teachers
        """Where the targets of several teachers are; None: there is one, or nobody needs them."""
        self._span, self._label = _SPAN[snapshot.table], snapshot.table == "soft_targets"

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self._length

    def lengths(self) -> Lengths:
        """Counts over the whole snapshot: those that it was made with, or from its rows."""
        if known := self.snapshot.about.get("lengths"):
            return Lengths(**{"shortest": self.snapshot.about.get("shortest", 1)} | known)
        samples = tokens = scored = longest = 0
        shortest = 2**31
        for sample in self.read(0, self._length):
            samples += 1
            tokens += len(sample)
            scored += sample.scored_tokens
            longest, shortest = max(longest, len(sample)), min(shortest, len(sample))
        return Lengths(
            samples=samples,
            tokens=tokens,
            scored_tokens=scored,
            longest=longest,
            shortest=shortest,
        )

    def read(self, start: int, stop: int | None = None) -> Generator[Sample, None, None]:
        """Samples `start` to `stop`; without end if `stop` is None."""
        return self._reader().samples(seed=self.seed, start=start, stop=stop)

    def batches(self, ranges: Iterable[range]) -> Generator[list[Sample], None, None]:
        """The samples of each range of numbers; ranges ascend."""
        return self._reader().batches(ranges, seed=self.seed)

    def _reader(self) -> SnapshotReader:
        columns = ["token_ids", *self._span, *(("k", *LISTS) if self.soft else ())]
        # A shard of texts has no column of images: it is null, and nothing is read for it.
        columns += ["label", "labels", "image"] * self._label
        return SnapshotReader(self._store, self.snapshot, columns, decode=self._decode)

    def _decode(self, rows: Rows, numbers: np.ndarray) -> list[Sample]:
        targets: Iterable[SoftTargets | None] = (
            normalised_targets(rows) if self.soft else repeat(None, len(rows))
        )
        offsets, ids = rows.flat("token_ids")
        labels: Iterable[int | None] = (
            rows.values("label") if self._label else repeat(None, len(rows))
        )
        of_targets = _lists(rows, "labels") if self._label else repeat(None, len(rows))
        images = rows.values("image") if self._label else repeat(None, len(rows))
        samples = []
        for edges, spans, target, label, each, image, number in zip(
            pairwise(offsets),
            self._spans(rows),
            targets,
            labels,
            of_targets,
            images,
            numbers.tolist(),
            strict=True,
        ):
            sample = Sample(
                token_ids=ids[slice(*edges)],
                spans=spans,
                targets=target,
                label=label,
                labels=each,
                image=image,
                number=number,
                features=self.features,
                teachers=self.teachers,
            )
            samples.append(sample)
        return samples

    def _spans(self, rows: Rows) -> list[np.ndarray]:
        """What each row is asked for."""
        # All rows at once as if each had one span, for most have; then those that have several.
        found = list(spans_of({name: rows.numbers(name) for name in self._span[:2]}))
        edges, several = rows.flat("spans")
        for row in np.flatnonzero(np.diff(edges)):
            found[row] = spans_of({"spans": several[edges[row] : edges[row + 1]]})
        return found


def _lists(rows: Rows, name: str) -> Iterator[np.ndarray | None]:
    """A list column, row by row; None where one is null."""
    offsets, values = rows.flat(name)
    for edges, there in zip(pairwise(offsets), rows.present(name), strict=True):
        yield values[slice(*edges)] if there else None


def steps(
    samples: Samples,
    cursor: Cursor,
    *,
    tokens_per_step: int,
    stop_tokens: int | None = None,
    stop_samples: int | None = None,
) -> Generator[Step, None, None]:
    """Give steps from a cursor on: samples in order until the next would exceed `tokens_per_step`.

    A step has one sample at least. Epochs follow one another without a seam. Steps end before the
    first one that starts at `stop_tokens` or more, and after `stop_samples` samples of all epochs
    together.
    """
    held: list[Sample] = []
    with closing(_stream(samples, cursor, stop_samples)) as stream:
        for sample, following in stream:
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


def in_company(steps: Generator[Step, None, None]) -> Generator[Step, None, None]:
    """The same steps, what is left for a step of a single sample joined to the step before it.

    Raises:
        UsageError: there is a single sample in all.
    """
    held = None
    with closing(steps):
        for step in steps:
            if held is None or len(step.samples) > 1:
                if held is not None:
                    yield held
                held = step
                continue
            after = replace(step.after, step=held.after.step)
            held = Step(samples=[*held.samples, *step.samples], after=after)
        if held is not None and len(held.samples) == 1:
            raise UsageError(
                "train.epochs: this training is of one sample in all, and the student's batch "
                "norms cannot be had of one. Add data."
            )
        if held is not None:
            yield held


def _stream(
    samples: Samples, cursor: Cursor, stop_samples: int | None
) -> Generator[tuple[Sample, Cursor], None, None]:
    start = cursor.epoch * len(samples) + cursor.sample
    with closing(samples.read(start, stop_samples)) as found:
        for number, sample in enumerate(found, start):
            epoch, before = divmod(number, len(samples))
            cursor = replace(
                cursor, epoch=epoch, sample=before + 1, tokens=cursor.tokens + len(sample)
            )
            yield sample, cursor
