"""Stage `score`: one forward pass of the teacher over prompt + completion; soft targets at every completion position.

Rows of like length share a forward pass on a GPU. On a CPU, where that gains nothing, each row is alone: its bits then
do not depend on the rows beside it, and a run that was killed writes what one that was not would have written.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..storage.keys import content_key
from ..storage.store import Store
from .alignment import predicting_positions
from .identity import Identity
from .job import Job, StageResult
from .requests import TargetRequest, reject_key, selected_generations, target_ledger
from .writing import about, commit_limits

if TYPE_CHECKING:
    from ..storage.writer import ShardWriter
    from .head import Head

Batch = list[TargetRequest]
GPU_BATCH_TOKENS = 8192


def run(job: Job, teacher: Identity) -> StageResult:
    """Score what the store does not have yet.

    Raises:
        UsageError: the teacher does not load, or its head is not understood.
    """
    recipe, score = job.recipe, job.recipe.score
    assert score is not None
    store = Store.open(recipe.storage.dir)
    generations = selected_generations(
        store, recipe, author_id=job.author_id, data_id=job.data_id, context_tokens=job.context_tokens
    )
    limit = teacher.context_tokens
    ledger, _ = target_ledger(
        store, recipe, teacher_id=teacher.id, vocab_size=teacher.vocab_size, generations=generations, limit=limit
    )
    settings = {"targets": score.targets, "k": score.k, "temperatures": list(score.temperatures)}
    shard_about = about(
        "score",
        recipe,
        settings,
        teacher_id=teacher.id,
        tokenizer_id=teacher.tokenizer_id,
        vocab_size=teacher.vocab_size,
        mantissa_bits=recipe.storage.mantissa_bits,
    )
    limits = commit_limits(recipe)
    with (
        store.writer("soft_targets", about=shard_about, limits=limits) as rows,
        store.writer("rejects", about=shard_about, limits=limits) as rejects,
    ):
        job.progress.say(f"loading {teacher.folder}")
        scorer = _Scorer(job, teacher)
        job.progress.start(total=ledger.planned, unit="rows", done=len(ledger.committed))
        for batch in batches(ledger.pending, score.batch_tokens or scorer.batch_tokens):
            for request in [r for r in batch if len(r.token_ids) > limit]:
                message = f"{len(request.token_ids)} tokens; the teacher reads {limit}"
                rejects.add(_reject(request, teacher.id, limit, "too_long", message))
            scorer.score([r for r in batch if len(r.token_ids) <= limit], rows, rejects)
            job.stop.check()
    return StageResult(rows=rows.rows, tokens=rows.tokens, rejected=rejects.rows)


def batches(requests: list[TargetRequest], batch_tokens: int) -> Iterator[Batch]:
    """Rows of one kind and like length, at most `batch_tokens` together, padding counted."""
    batch: Batch = []
    for request in sorted(requests, key=lambda r: (r.kind, len(r.token_ids), r.reuse_key)):
        same_kind = not batch or batch[0].kind == request.kind
        if batch and (not same_kind or (len(batch) + 1) * len(request.token_ids) > batch_tokens):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


class _Scorer:
    """The teacher, and how a batch becomes rows."""

    def __init__(self, job: Job, teacher: Identity) -> None:
        from .head import check_head, split_head
        from .teacher import load_causal_lm

        self._job = job
        self._teacher_id = teacher.id
        self._limit = teacher.context_tokens
        self._model = load_causal_lm(teacher, device_map=job.recipe.teacher.device_map)
        check_head(self._model)
        self._head: Head = split_head(self._model)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a pass where the recipe names none."""
        return GPU_BATCH_TOKENS if self._model.device.type == "cuda" else 1

    def score(self, batch: Batch, rows: "ShardWriter", rejects: "ShardWriter") -> None:
        """Score and hand over a batch; out of memory is answered by halving it and going on."""
        import torch

        if not batch:
            return
        try:
            done = self._forward(batch)
        except torch.OutOfMemoryError:
            done = None  # and no more in here: the handler keeps the failed pass's tensors alive
        if done is not None:
            for row in done:
                rows.add(row)
                self._job.progress.advance(tokens=row["span_tokens"])
            rows.tick()
            return
        torch.cuda.empty_cache()
        if len(batch) == 1:
            message = f"{len(batch[0].token_ids)} tokens do not fit in memory, even alone"
            rejects.add(_reject(batch[0], self._teacher_id, self._limit, "out_of_memory", message))
            return
        self._job.progress.say(f"out of memory at {len(batch)} rows of {len(batch[-1].token_ids)} tokens: halving")
        half = len(batch) // 2
        self.score(batch[:half], rows, rejects)
        self.score(batch[half:], rows, rejects)

    def _forward(self, batch: Batch) -> list[dict[str, Any]]:
        import torch

        from .head import hidden_states
        from .targets import soft_targets

        longest = max(len(r.token_ids) for r in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, : len(request.token_ids)] = torch.tensor(request.token_ids)
            mask[row, : len(request.token_ids)] = 1
        device = self._model.device
        done = []
        with torch.inference_mode():
            hidden = hidden_states(self._model, input_ids=ids.to(device), attention_mask=mask.to(device))
            for row, request in enumerate(batch):
                states = hidden[row, predicting_positions(request.span_start, request.span_tokens)]
                following = ids[row, request.span_start : len(request.token_ids)].to(states.device)
                targets = soft_targets(states, self._head, following, kind=request.kind, k=request.k)
                done.append(self._row(request) | targets.columns(self._bits))
        return done

    @property
    def _bits(self) -> int:
        return self._job.recipe.storage.mantissa_bits

    def _row(self, request: TargetRequest) -> dict[str, Any]:
        kept = {"targets": request.kind, "k": request.k, "mantissa_bits": self._bits}
        return {
            "key": content_key("soft_targets_row", reuse_key=request.reuse_key, **kept),
            "reuse_key": request.reuse_key,
            "tokens_key": request.tokens_key,
            "generation_key": request.generation_key,
            "prompt_key": request.prompt_key,
            "teacher_id": self._teacher_id,
            "kind": request.kind,
            "token_ids": request.token_ids,
            "span_start": request.span_start,
            "label": None,
        }


def _reject(request: TargetRequest, teacher_id: str, limit: int, reason: str, message: str) -> dict[str, Any]:
    return {
        "key": reject_key(request.reuse_key, limit),
        "stage": "score",
        "prompt_key": request.prompt_key,
        "context_id": teacher_id,
        "tokens_key": request.tokens_key,
        "limit_tokens": limit,
        "reason": reason,
        "message": message,
        "attempts": 1,
    }
