"""The teacher, and how a batch of requests becomes rows of soft targets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ...storage.errors import RowError
from ...storage.keys import content_key, row_seed
from ...storage.tables.row_builders import target_row
from ..ledger.requests import TargetRequest
from ..models.identity import Identity
from ..targets.alignment import predicting_positions, scored_tokens
from ..workers.job import Job
from ..workers.share import DoneByOthers, Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...storage.tables.soft_targets import SoftTargets

Batch = list[TargetRequest]

T = TypeVar("T")

GPU_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class _Flight:
    """A pass that has begun."""

    batch: Batch
    attempt: int
    targets: Callable[[], list["SoftTargets"]]
    """The targets of each row; waits for the device."""


class Scorer:
    """The teacher, and how a batch becomes rows."""

    def __init__(self, job: Job, teacher: Identity, share: Share[TargetRequest]) -> None:
        self._job = job
        self._share = share
        self._teacher_id = teacher.id
        self._limit = teacher.context_tokens
        self._model = self._load(teacher, job.recipe.teacher.device_map)
        self._flight: _Flight | None = None

    def _load(self, teacher: Identity, device_map: str | None) -> "PreTrainedModel":
        from ..models.head import check_head, split_head
        from ..models.loading import load_causal_lm
        from ..targets.reduce import Reducer

        model = load_causal_lm(teacher, device_map=device_map)
        check_head(model)
        self._reducer = Reducer(split_head(model), kernel=self._job.score.kernel)
        return model

    @property
    def _on_gpu(self) -> bool:
        return self._model.device.type == "cuda"

    @property
    def batch_tokens(self) -> int:
        """Tokens of a pass where the recipe names none."""
        return GPU_BATCH_TOKENS if self._on_gpu else 1

    def score(self, batch: Batch) -> None:
        """Score a batch, apart from what others have scored meanwhile and what the teacher cannot read.

        On a GPU its rows are handed over by the next call, or by `collect`.
        """
        try:
            self._share.heartbeat()
        except DoneByOthers:
            self._share.drop()
            self._flight = None
        for request in [r for r in batch if len(r.token_ids) > self._limit]:
            message = f"{len(request.token_ids)} tokens; the teacher reads {self._limit}"
            self._share.refuse(request, RowError("too_long", message))
        taken = self._share.take([r for r in batch if len(r.token_ids) <= self._limit])
        if taken:
            self._begin(taken, attempt=1)

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
        for row in done:
            self._share.add(row, tokens=row["span_tokens"])

    def _begin(self, batch: Batch, *, attempt: int) -> None:
        """Begin a pass, and collect the one before: on a GPU while this one runs."""
        targets = self._tried(batch, lambda: self._launch(batch))
        self.collect()
        if isinstance(targets, RowError):
            self._halve(batch, targets, attempt=attempt)
            return
        self._flight = _Flight(batch, attempt, targets)
        if not self._on_gpu:
            self.collect()

    def _tried(self, batch: Batch, work: Callable[[], T]) -> T | RowError:
        """What work on a batch gives, or how it failed: returned, so that the tensors of a failed pass are free."""
        import torch

        try:
            with torch.inference_mode():
                return work()
        except torch.OutOfMemoryError:
            return RowError(
                "out_of_memory",
                f"{len(batch[-1].token_ids)} tokens do not fit in memory, even alone",
            )
        except Exception as error:
            return RowError("engine", f"{type(error).__name__}: {error}")

    def _halve(self, batch: Batch, failure: RowError, *, attempt: int) -> None:
        """A batch that fails is halved, until the row that it fails on stands alone."""
        import torch

        from ..models.device import check_device

        if failure.reason == "out_of_memory":
            torch.cuda.empty_cache()
        check_device(self._model.device, str(failure))
        if len(batch) == 1:
            self._share.done(batch)
            self._share.fail(batch[0], failure, attempt)
            return
        tokens = len(batch[-1].token_ids)
        self._job.progress.say(f"{failure.reason} at {len(batch)} rows of {tokens} tokens: halving")
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            self._begin(part, attempt=attempt + 1)
            self.collect()

    def _launch(self, batch: Batch) -> Callable[[], list["SoftTargets"]]:
        """Begin a pass over a batch; only scored positions go through the head, those of all rows together."""
        import torch

        from ..models.head import hidden_states
        from ..targets.draws import Span
        from ..targets.reduce import moved

        longest = max(len(r.token_ids) for r in batch)
        ids, mask = np.zeros((2, len(batch), longest), np.int64)
        places, following, spans = [], [], []
        for row, request in enumerate(batch):
            ids[row, : len(request.token_ids)] = request.token_ids
            mask[row, : len(request.token_ids)] = 1
            span = request.span_start, request.span_tokens
            places.append(
                np.arange(row * longest, (row + 1) * longest)[predicting_positions(*span)]
            )
            following.append(scored_tokens(request.token_ids, *span))
            drawn = request.kept.structure.drawn
            spans.append(
                Span(request.span_tokens, row_seed(row_key(self._job, request)) if drawn else 0)
            )
        with self._job.clock.span("model"):
            there = [moved(torch.from_numpy(array), self._model.device) for array in (ids, mask)]
            hidden = hidden_states(
                self._model, input_ids=there[0], attention_mask=there[1]
            ).flatten(0, 1)
            scored = hidden[moved(torch.from_numpy(np.concatenate(places)), hidden.device)]
            next_ids = torch.from_numpy(np.concatenate(following, dtype=np.int64))
            kept = batch[0].kept
            return self._reducer.launch(
                scored, moved(next_ids, hidden.device), kept=kept, spans=spans
            ).rows

    def _rows(self, flight: _Flight) -> list[dict[str, Any]]:
        with self._job.clock.span("model"):
            found = flight.targets()
        done = []
        for request, targets in zip(flight.batch, found, strict=True):
            if np.isnan(targets.entropy).any():
                raise FloatingPointError("the teacher's numbers are NaN")
            done.append(self._row(request, targets))
        return done

    def _row(self, request: TargetRequest, targets: "SoftTargets") -> dict[str, Any]:
        return target_row(
            key=row_key(self._job, request),
            reuse_key=request.reuse_key,
            tokens_key=request.tokens_key,
            generation_key=request.generation_key,
            prompt_key=request.prompt_key,
            teacher_id=self._teacher_id,
            token_ids=request.token_ids,
            span_start=request.span_start,
            targets=targets,
            mantissa_bits=self._job.recipe.storage.mantissa_bits,
            settings=request.kept.columns(),
            label=request.label,
        )


def row_key(job: Job, request: TargetRequest) -> bytes:
    """The name of the row that a request becomes."""
    bits = job.recipe.storage.mantissa_bits
    return content_key(
        "soft_targets_row", reuse_key=request.reuse_key, mantissa_bits=bits, **request.kept.named()
    )
