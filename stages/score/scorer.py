"""The teacher, and how a batch of requests becomes rows of soft targets."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ...storage.errors import RowError, StillroomError
from ...storage.keys import row_seed
from ...storage.store.store import Store
from ...storage.tables.row_builders import feature_row, target_row
from ...storage.tables.schema import TableName
from ...storage.words import counted
from ..ledger.features import feature_key, feature_row_key
from ..ledger.requests import TargetRequest, target_key, target_row_key
from ..models.identity import Identity
from ..models.inputs.reads import too_long
from ..recipe.features import Feature, Name, captured, embedding_bits
from ..recipe.kinds import HF
from ..recipe.tasks import TASKS
from ..workers.job import Job
from ..workers.share import DoneByOthers, MadeRows, RowKeys, Share
from .embeddings import keep_embeddings

if TYPE_CHECKING:
    import torch

    from ...storage.tables.features import Layout, Projected
    from ...storage.tables.soft_targets import SoftTargets
    from ..targets.features.capture import Found, Projections, Taken

Batch = list[TargetRequest]

T = TypeVar("T")

GPU_BATCH_TOKENS = 8192
GPU_BATCH_IMAGES = 64


@dataclass(frozen=True, slots=True)
class Read:
    """What a teacher says of one row."""

    targets: "SoftTargets"
    features: "Found"
    """Those that some row of its pass asks for."""
    layouts: "Mapping[Name, Layout]"
    """Of the features."""
    projected: "Mapping[Name, Projected]"
    """Of those that were made narrower."""
    tail_bound: np.ndarray | None = None
    """[N] how far off the tails may be; None: they are exact."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A pass that has begun."""

    batch: Batch
    attempt: int
    read: Callable[[], list[Read]]
    """What is said of each row; waits for the device."""


class Neighbours(Protocol):
    """Which rows may share a pass."""

    apart: str
    """Why some may not, for messages."""

    def may_share(self, lengths: Iterable[int]) -> bool:
        """Whether rows of so many tokens may."""


class Teacher(Protocol):
    """A task's teacher, ready to be asked.

    It is the class of this name in the module that bears the task's name.
    """

    device: "torch.device"
    model: Any
    company: Neighbours
    projections: "Projections"
    """What makes its vectors narrower; set before the first batch."""

    def begin(self, batch: Batch) -> Callable[[], list[Read]]:
        """Begin a forward pass over a batch.

        Returns:
            Waits for the device and gives targets and features of each row.
        """


@dataclass(frozen=True, slots=True)
class Opened:
    """A teacher that is ready to be asked."""

    identity: Identity
    engine: str
    """What runs it."""
    teacher: Teacher

    @property
    def named(self) -> dict[str, str]:
        """What shards say of it: nothing of the engine that was the only one at first."""
        return {} if self.engine == HF else {"engine": self.engine}


class Scorer:
    """How batches become rows, whatever the task."""

    def __init__(self, job: Job, share: Share[TargetRequest], opened: Opened) -> None:
        self._job, self._share, self._opened = job, share, opened
        self._teacher_id, self._limit = opened.identity.id, opened.identity.context_tokens
        self._teacher = opened.teacher
        self._images = TASKS[job.recipe.run.task].structure.images
        self._flight: _Flight | None = None
        self._said_alone = False

    @property
    def _on_gpu(self) -> bool:
        return self._teacher.device.type == "cuda"

    @property
    def batch_tokens(self) -> int:
        """Tokens of a pass where the recipe names none."""
        most = GPU_BATCH_IMAGES if self._images else GPU_BATCH_TOKENS
        return most if self._on_gpu or self._opened.named else 1

    def keep_matrices(self, store: Store) -> None:
        """Put into the store what rows or losses are read with.

        It is done where the recipe asks for it and the store has none.
        """
        from .projections import keep_projections

        asked = captured(self._job.score.features)
        self._teacher.projections = keep_projections(store, self._teacher.model, asked)
        bits = embedding_bits(self._job.score.features)
        if bits is not None:
            keep_embeddings(store, self._teacher.model, teacher_id=self._teacher_id, bits=bits)

    def score(self, batch: Batch) -> None:
        """Score a batch, apart from what others have scored and what the teacher cannot read.

        Others may have scored rows of it meanwhile.

        On a GPU its rows are handed over by the next call, or by `collect`.
        """
        try:
            self._share.heartbeat()
        except DoneByOthers:
            self._share.drop()
            self._flight = None
        for request in [r for r in batch if len(r.token_ids) > self._limit]:
            error = too_long(len(request.token_ids), self._limit, limit="the teacher reads")
            self._share.refuse(request, error)
        taken = self._share.take([r for r in batch if len(r.token_ids) <= self._limit])
        for part in self._parts(taken):
            self._begin(part, attempt=1)

    def _parts(self, batch: Batch) -> list[Batch]:
        """The rows that may share a pass: all, or each alone."""
        if len(batch) < 2:
            return [batch] if batch else []
        asked = self._tried(
            batch, lambda: self._teacher.company.may_share(len(r.token_ids) for r in batch)
        )
        if asked is True:
            return [batch]
        if not self._said_alone:
            self._said_alone = True
            why = asked if isinstance(asked, RowError) else self._teacher.company.apart
            self._job.progress.say(f"rows are read alone by this teacher: {why}")
        return [[request] for request in batch]

    def collect(self) -> None:
        """Hand over the rows of the pass that has begun."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        done = self._tried(flight.batch, lambda: self._rows(flight))
        if isinstance(done, RowError):
            self._halve(flight.batch, done, attempt=flight.attempt)
            return
        self._share.done(flight.batch)
        for request, rows in zip(flight.batch, done, strict=True):
            self._share.add(rows, tokens=request.span_tokens)

    def _begin(self, batch: Batch, *, attempt: int) -> None:
        """Begin a pass, and collect the one before: on a GPU while this one runs."""
        read = self._tried(batch, lambda: self._teacher.begin(batch))
        self.collect()
        if isinstance(read, RowError):
            self._halve(batch, read, attempt=attempt)
            return
        self._flight = _Flight(batch, attempt, read)
        if not self._on_gpu:
            self.collect()

    def _tried(self, batch: Batch, work: Callable[[], T]) -> T | RowError:
        """What work on a batch gives, or how it failed.

        The failure is returned, so that the tensors of a failed pass are free.
        """
        import torch

        try:
            with torch.inference_mode():
                return work()
        except torch.OutOfMemoryError:
            return RowError(
                "out_of_memory",
                f"{len(batch[-1].token_ids)} tokens do not fit in memory, even alone",
            )
        except StillroomError:  # a signal; an engine that died
            raise
        except RowError as error:
            return error
        except Exception as error:
            return RowError("engine", f"{type(error).__name__}: {error}")

    def _halve(self, batch: Batch, failure: RowError, *, attempt: int) -> None:
        """A batch that fails is halved, until the row that it fails on stands alone."""
        import torch

        from ..models.device import check_device

        if failure.reason == "out_of_memory":
            torch.cuda.empty_cache()
        check_device(self._teacher.device, str(failure))
        if len(batch) == 1:
            self._share.done(batch)
            self._share.fail(batch[0], failure, attempt)
            return
        tokens = len(batch[-1].token_ids)
        self._job.progress.say(
            f"{failure.reason} at {len(batch)} rows of {counted(tokens, 'token')}: halving"
        )
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            self._begin(part, attempt=attempt + 1)
            self.collect()

    def _rows(self, flight: _Flight) -> list[MadeRows]:
        with self._job.clock.span("model"):
            found = flight.read()
        done: list[MadeRows] = []
        for request, read in zip(flight.batch, found, strict=True):
            if np.isnan(read.targets.entropy).any():
                raise FloatingPointError("the teacher's numbers are NaN")
            made: dict[TableName, list[dict[str, Any]]] = {}
            if request.targets:
                made["soft_targets"] = [self._target_row(request, read)]
            if request.features:
                made["features"] = list(self._feature_rows(request, read))
            done.append(made)
        return done

    def _target_row(self, request: TargetRequest, read: Read) -> dict[str, Any]:
        return target_row(
            key=_target_row_key(self._job, request, self._opened.engine),
            reuse_key=target_key(self._teacher_id, request.tokens_key),
            tokens_key=request.tokens_key,
            generation_key=request.generation_key,
            prompt_key=request.prompt_key,
            teacher_id=self._teacher_id,
            token_ids=request.token_ids,
            spans=request.spans,
            targets=read.targets,
            mantissa_bits=self._job.recipe.storage.mantissa_bits,
            settings=request.kept.columns(),
            label=request.label,
            labels=request.labels,
            image=request.image,
            tail_bound=read.tail_bound,
            engine=self._opened.named.get("engine"),
        )

    def _feature_rows(self, request: TargetRequest, read: Read) -> Iterator[dict[str, Any]]:
        from ..targets.features.rounding import check_rounding

        check_rounding(request.features, read.features, read.layouts)
        for feature in request.features:
            name = feature.kind, feature.layer
            yield feature_row(
                key=feature_row_key(self._teacher_id, request.text_key, feature),
                reuse_key=feature_key(self._teacher_id, request.text_key, feature),
                text_key=request.text_key,
                teacher_id=self._teacher_id,
                kind=feature.kind,
                layer=feature.layer,
                states=read.features[name],
                dtype=feature.dtype,
                layout=read.layouts[name],
                projected=read.projected.get(name),
            )


def reads(targets: "Iterable[SoftTargets]", taken: "Taken", lengths: Sequence[int]) -> list[Read]:
    """What is said of each row of a pass; waits for the device."""
    rows, layouts, projected = taken.rows(lengths), taken.layouts(), taken.projected(lengths)
    of_each = zip(targets, rows, projected, strict=True)
    return [Read(said, found, layouts, narrowed) for said, found, narrowed in of_each]


def asked_of(batch: Batch) -> set[Feature]:
    """What is captured of a batch: what some row is to have, and what its rounding is seen by."""
    from ..targets.features.rounding import with_counterparts

    return with_counterparts({feature for request in batch for feature in request.features})


def row_keys(job: Job, request: TargetRequest, *, engine: str = HF) -> RowKeys:
    """The names of the rows that a request becomes."""
    keys: dict[TableName, list[bytes]] = {"soft_targets": [], "features": []}
    if request.targets:
        keys["soft_targets"].append(_target_row_key(job, request, engine))
    for feature in request.features:
        keys["features"].append(feature_row_key(job.teacher_id, request.text_key, feature))
    return {table: found for table, found in keys.items() if found}


def target_seed(job: Job, request: TargetRequest) -> int:
    """The seed of the draws of a request, where its kind has some: that of the row it becomes."""
    return row_seed(_target_row_key(job, request)) if request.kept.structure.drawn else 0


def _target_row_key(job: Job, request: TargetRequest, engine: str = HF) -> bytes:
    bits = job.recipe.storage.mantissa_bits
    return target_row_key(
        job.teacher_id, request.tokens_key, request.kept, bits=bits, engine=engine
    )
