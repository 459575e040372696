"""Stage `score`: one forward pass of the teacher over prompt + completion; soft targets at every completion position.

Rows of like length share a forward pass on a GPU. On a CPU, where that gains nothing, each row is alone: its bits then
do not depend on the rows beside it, and a run that was killed writes what one that was not would have written.

A GPU is kept busy: a pass is begun before what the one before it gave is collected, made into rows and added, and the
writer makes its shards in a thread of its own.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ...storage.joined import open_store
from ...storage.keys import content_key, row_seed
from ...storage.store.store import Store
from ..engines.base import check_device
from ..ledger.books import Books, Ledger, Pending
from ..ledger.generations import generation_ledger
from ..ledger.requests import TargetRequest, reject_key, sampling_settings
from ..ledger.targets import choose_generations, pending_targets, target_ledger
from ..models.identity import Identity
from ..models.rendering import RowError
from ..targets.alignment import predicting_positions, scored_tokens
from ..targets.spec import Kept, wanted
from ..workers.claims import Claims
from ..workers.job import Job, StageResult
from ..workers.journal import Journal, find_suspects, new_journal
from ..workers.rejects import Rejects
from ..workers.shard_about import about, commit_limits
from ..workers.share import DoneByOthers, Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...storage.tables.soft_targets import SoftTargets

Batch = list[TargetRequest]
T = TypeVar("T")
GPU_BATCH_TOKENS = 8192
BATCH_BYTES = 256 * 2**20  # of the entries of a batch


def run(job: Job, teacher: Identity) -> StageResult:
    """Score what the store does not have yet.

    Raises:
        UsageError: the teacher does not load, or its head is not understood.
        EngineDied: the teacher's device does, on one of the rows in flight.
    """
    recipe, score = job.recipe, job.recipe.score
    assert score is not None
    with job.clock.span("start"):
        store = open_store(recipe.storage.dir, recipe.storage.sources)
        ledger, pending = _asked(job, teacher, store)
        kept = wanted(score, teacher.outcomes(recipe.run.task))
        shard_about, limits = _about(job, teacher, kept), commit_limits(recipe)
        run_dir = Path(recipe.run.dir)
        suspects = find_suspects(run_dir, "score")
    with (
        Journal(job.journal or new_journal(run_dir, "score")) as journal,
        store.writer("soft_targets", about=shard_about, limits=limits) as rows,
        store.writer("rejects", about=shard_about, limits=limits) as rejects,
    ):
        share = Share(
            job=job,
            rows=rows,
            rejects=rejects,
            failed=Rejects(rejects, proven=ledger.committed > 0),
            claims=_claims(job, teacher, store),
            pending=pending,
            journal=journal,
            suspects=suspects,
            limit_tokens=teacher.context_tokens,
            row_key=lambda request: _row_key(job, request),
            reject=lambda request, error, attempts: _reject(request, teacher, error, attempts),
        )
        job.progress.say(f"loading {teacher.folder}")
        if score.targets in ("topk", "topp") and kept.k < score.k:
            job.progress.say(f"score.k: {score.k} is above the teacher's vocabulary, all {kept.k} entries are kept")
        with job.clock.span("start"):
            scorer = (_Classifier if recipe.run.task == "classification" else _Scorer)(job, teacher, share)
        job.progress.start(total=ledger.planned, unit="rows", done=ledger.committed)
        _score_all(share, scorer, score.batch_tokens or scorer.batch_tokens)
        share.finish()
    return StageResult(rows=rows.rows, tokens=rows.tokens, rejected=rejects.rows)


def _score_all(share: Share[TargetRequest], scorer: "_Scorer", batch_tokens: int) -> None:
    for claims, block in share.blocks():
        cut = list(batches(block, batch_tokens))
        if claims:
            random.shuffle(cut)  # the one who is at this block too goes through it in order
        for batch in cut:
            scorer.score(batch)
    scorer.collect()
    for request in share.one_by_one():
        scorer.score([request])
        scorer.collect()


def _about(job: Job, teacher: Identity, kept: Kept) -> dict[str, Any]:
    return about(
        "score",
        job.recipe,
        kept.named(),
        teacher_id=teacher.id,
        tokenizer_id=teacher.tokenizer_id,
        vocab_size=teacher.vocab_size,
        class_names=list(teacher.class_names) or None,
        mantissa_bits=job.recipe.storage.mantissa_bits,
    )


def _asked(job: Job, teacher: Identity, store: Store) -> tuple[Ledger, Pending[TargetRequest]]:
    with Books(store, job.recipe, data_id=job.data_id) as books:
        if job.recipe.generate is not None:
            generation_ledger(books, author_id=job.author_id, context_tokens=job.context_tokens)
        choose_generations(books, author_id=job.author_id)
        vocab_size, limit = teacher.outcomes(job.recipe.run.task), teacher.context_tokens
        ledger = target_ledger(books, teacher_id=teacher.id, vocab_size=vocab_size, limit=limit)
        return ledger, pending_targets(books, teacher_id=teacher.id, vocab_size=vocab_size)


def _claims(job: Job, teacher: Identity, store: Store) -> Claims:
    recipe = job.recipe
    assert recipe.score is not None
    text: dict[str, Any] = {"data": job.data_id, "author": job.author_id, "context": job.context_tokens}
    if recipe.generate is not None:
        text["sampling"] = sampling_settings(recipe.generate, recipe.data)
        text |= {"samples": recipe.generate.samples, "max_tokens": recipe.generate.max_tokens}
    chosen = {"where": recipe.select.where, "held_out": recipe.evaluate.tokens}
    targets = recipe.score.model_dump(mode="json", exclude={"engine", "batch_tokens", "kernel"})
    bits = recipe.storage.mantissa_bits
    return Claims(store.files, "score", teacher=teacher.id, text=text, chosen=chosen, targets=targets, bits=bits)


def batches(requests: list[TargetRequest], batch_tokens: int) -> Iterator[Batch]:
    """Rows of one kind and like length, at most `batch_tokens` and `BATCH_BYTES` together, padding counted."""
    batch: Batch = []
    for request in sorted(requests, key=lambda r: (r.kept.kind, len(r.token_ids), r.reuse_key)):
        same_kind = not batch or batch[0].kept.kind == request.kept.kind
        tokens = (len(batch) + 1) * len(request.token_ids)
        if batch and (not same_kind or tokens > batch_tokens or tokens * 4 * request.kept.k > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class _Flight:
    """A pass that has begun."""

    batch: Batch
    attempt: int
    targets: Callable[[], list["SoftTargets"]]
    """The targets of each row; waits for the device."""


class _Scorer:
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

        assert self._job.recipe.score is not None
        model = load_causal_lm(teacher, device_map=device_map)
        check_head(model)
        self._reducer = Reducer(split_head(model), kernel=self._job.recipe.score.kernel)
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
            return RowError("out_of_memory", f"{len(batch[-1].token_ids)} tokens do not fit in memory, even alone")
        except Exception as error:
            return RowError("engine", f"{type(error).__name__}: {error}")

    def _halve(self, batch: Batch, failure: RowError, *, attempt: int) -> None:
        """A batch that fails is halved, until the row that it fails on stands alone."""
        import torch

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
        from ..targets.reduce import Span, moved

        longest = max(len(r.token_ids) for r in batch)
        ids, mask = np.zeros((2, len(batch), longest), np.int64)
        places, following, spans = [], [], []
        for row, request in enumerate(batch):
            ids[row, : len(request.token_ids)] = request.token_ids
            mask[row, : len(request.token_ids)] = 1
            span = request.span_start, request.span_tokens
            places.append(np.arange(row * longest, (row + 1) * longest)[predicting_positions(*span)])
            following.append(scored_tokens(request.token_ids, *span))
            drawn = request.kept.kind == "sampled"
            spans.append(Span(request.span_tokens, row_seed(_row_key(self._job, request)) if drawn else 0))
        with self._job.clock.span("model"):
            there = [moved(torch.from_numpy(array), self._model.device) for array in (ids, mask)]
            hidden = hidden_states(self._model, input_ids=there[0], attention_mask=there[1]).flatten(0, 1)
            scored = hidden[moved(torch.from_numpy(np.concatenate(places)), hidden.device)]
            next_ids = torch.from_numpy(np.concatenate(following, dtype=np.int64))
            kept = batch[0].kept
            return self._reducer.launch(scored, moved(next_ids, hidden.device), kept=kept, spans=spans).rows

    def _rows(self, flight: _Flight) -> list[dict[str, Any]]:
        with self._job.clock.span("model"):
            found = flight.targets()
        done = []
        for request, targets in zip(flight.batch, found, strict=True):
            if np.isnan(targets.entropy).any():
                raise FloatingPointError("the teacher's numbers are NaN")
            done.append(self._row(request) | targets.columns(self._bits) | request.kept.columns())
        return done

    @property
    def _bits(self) -> int:
        return self._job.recipe.storage.mantissa_bits

    def _row(self, request: TargetRequest) -> dict[str, Any]:
        return {
            "key": _row_key(self._job, request),
            "reuse_key": request.reuse_key,
            "tokens_key": request.tokens_key,
            "generation_key": request.generation_key,
            "prompt_key": request.prompt_key,
            "teacher_id": self._teacher_id,
            "token_ids": request.token_ids,
            "span_start": request.span_start,
            "label": request.label,
        }


class _Classifier(_Scorer):
    """The same for a teacher that classifies: one target a text, over its classes."""

    def _load(self, teacher: Identity, device_map: str | None) -> "PreTrainedModel":
        from ..models.classifier import Inputs, load_teacher

        model = load_teacher(teacher, device_map=device_map)
        self._inputs = Inputs.of(model, teacher.folder)
        return model

    def _launch(self, batch: Batch) -> Callable[[], list["SoftTargets"]]:
        from ..models.classifier import class_logits, class_targets

        inputs = self._inputs.tensors([request.token_ids for request in batch])
        with self._job.clock.span("model"):
            there = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
            logits = class_logits(self._model, there)
        return lambda: class_targets(logits, [request.label for request in batch])


def _row_key(job: Job, request: TargetRequest) -> bytes:
    bits = job.recipe.storage.mantissa_bits
    return content_key("soft_targets_row", reuse_key=request.reuse_key, mantissa_bits=bits, **request.kept.named())


def _reject(request: TargetRequest, teacher: Identity, error: RowError, attempts: int) -> dict[str, Any]:
    return {
        "key": reject_key(request.reuse_key, teacher.context_tokens),
        "stage": "score",
        "prompt_key": request.prompt_key,
        "context_id": teacher.id,
        "tokens_key": request.tokens_key,
        "limit_tokens": teacher.context_tokens,
        "reason": error.reason,
        "message": str(error),
        "attempts": attempts,
    }
