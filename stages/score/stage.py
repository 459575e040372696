"""Stage `score`: one forward pass of the teacher over prompt + completion.

It gives soft targets at every completion position.

The same pass shows the features that the recipe names. Targets and features of a text are rows of
two tables, which are committed each for itself: after a stop, what is missing is made.

Rows of like length share a forward pass on a GPU. On a CPU, where that gains nothing, each row is
alone: its bits then do not depend on the rows beside it, and a run that was killed writes what one
that was not would have written.

A GPU is kept busy: a pass is begun before what the one before it gave is collected, made into rows
and added, and the writer makes its shards in a thread of its own.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from ...storage.joined import open_store
from ...storage.store.store import Store
from ..ledger.books import Books, Ledger, Pending
from ..ledger.features import capture_id
from ..ledger.generations import generation_ledger
from ..ledger.requests import TargetRequest, sampling_settings
from ..ledger.targets import choose_generations, pending_targets, target_ledger
from ..models.identity import Identity
from ..recipe.features import captured
from ..targets.masks import masks_of
from ..targets.spec import wanted
from ..workers.claims import Claims, in_turn
from ..workers.job import Job, StageResult
from ..workers.shard_about import about, about_targets
from ..workers.share import Share, StageWork, open_share
from .opening import open_teacher
from .scorer import Batch, Scorer, row_keys

_VECTORS = 8
"""Times as many rows in a commit where each is one vector: what a file says of itself is then
little of it."""
BATCH_BYTES = 256 * 2**20  # of the entries of a batch


def run(job: Job, teacher: Identity) -> StageResult:
    """Score what the store does not have yet.

    Raises:
        UsageError: the teacher does not load, or its head is not understood.
        EngineDied: the teacher's device does, on one of the rows in flight.
    """
    recipe, score = job.recipe, job.score
    with job.clock.span("start"):
        store = open_store(recipe.storage.dir, recipe.storage.sources)
        ledger, pending = _asked(job, teacher, store)
        kept = wanted(score, teacher.outcomes(recipe.run.task))
        job.progress.say(f"loading {teacher.folder}")
        longest = min(pending.longest, teacher.context_tokens)  # what is longer is rejected unread
        ran = open_teacher(job, teacher, store, longest=longest)
        work = StageWork(
            stage="score",
            about=about_targets("score", recipe, kept.named() | ran.named, teacher),
            ledger=ledger,
            pending=pending,
            claims=_claims(job, teacher, store),
            again=lambda: _asked(job, teacher, store)[1],
            limit_tokens=teacher.context_tokens,
            row_keys=partial(row_keys, engine=ran.engine),
            names=_reject_names,
            beside={"features": _about_features(job, teacher)} if captured(score.features) else {},
            times_rows={"features": _VECTORS} if _all_of_texts(job) else {},
        )
    with open_share(job, store, work) as share:
        with job.clock.span("start"):
            scorer = Scorer(job, share, ran)
            scorer.keep_matrices(store)
        job.progress.start(total=ledger.planned, unit="rows", done=ledger.committed)
        _score_all(share, scorer, score.batch_tokens or scorer.batch_tokens)
        share.finish()
    return share.result()


def _score_all(share: Share[TargetRequest], scorer: "Scorer", batch_tokens: int) -> None:
    for _ in share.rounds():
        for claims, block in share.blocks():
            for batch in in_turn(claims, list(batches(block, batch_tokens))):
                scorer.score(batch)
        scorer.collect()
    for request in share.one_by_one():
        scorer.score([request])
        scorer.collect()


def _all_of_texts(job: Job) -> bool:
    """Whether what is captured is one vector a text, whose rows are small."""
    return all(feature.of_text for feature in captured(job.score.features))


def _about_features(job: Job, teacher: Identity) -> dict[str, Any]:
    asked = [asdict(feature) for feature in captured(job.score.features)]
    ids = {"teacher_id": teacher.id, "tokenizer_id": teacher.tokenizer_id}
    return about("score", job.recipe, {"features": asked}, **ids)


def _asked(job: Job, teacher: Identity, store: Store) -> tuple[Ledger, Pending[TargetRequest]]:
    with Books(store, job.recipe, data_id=job.data_id) as books:
        if job.recipe.generate is not None:
            generation_ledger(books, author_id=job.author_id, context_tokens=job.context_tokens)
        choose_generations(books, author_id=job.author_id)
        vocab_size, limit = teacher.outcomes(job.recipe.run.task), teacher.context_tokens
        route = next(iter(job.recipe.several), None)
        ledger = target_ledger(
            books, teacher_id=teacher.id, vocab_size=vocab_size, limit=limit, route=route
        )
        masks = masks_of(job.recipe, teacher.folder)
        pending = pending_targets(books, teacher_id=teacher.id, vocab_size=vocab_size, masks=masks)
        return ledger, pending


def _claims(job: Job, teacher: Identity, store: Store) -> Claims:
    recipe = job.recipe
    text: dict[str, Any] = {
        "data": job.data_id,
        "author": job.author_id,
        "context": job.context_tokens,
    }
    if recipe.generate is not None:
        text["sampling"] = sampling_settings(recipe.generate, recipe.data)
        text |= {"samples": recipe.generate.samples, "max_tokens": recipe.generate.max_tokens}
    chosen: dict[str, Any] = {"where": recipe.select.where, "held_out": recipe.evaluate.tokens}
    for one in recipe.several:  # of several teachers, the one that scores here
        chosen["asked"] = {"where": one.where, "tokens": one.budget_tokens}
    unsaid = {"engine", "engine_args", "batch_tokens", "kernel"}
    unsaid |= set() if job.score.features else {"features"}
    targets = job.score.model_dump(mode="json", exclude=unsaid)
    bits = recipe.storage.mantissa_bits
    return Claims(
        store.files,
        "score",
        teacher=teacher.id,
        text=text,
        chosen=chosen,
        targets=targets,
        bits=bits,
    )


def batches(requests: list[TargetRequest], batch_tokens: int) -> Iterator[Batch]:
    """Give batches of rows of like length that keep the same.

    A batch has at most `batch_tokens` and `BATCH_BYTES`, padding counted.
    """
    batch: Batch = []
    # Held-out rows may have the kind of the others and another k: a large vocabulary's reference.
    ordered = sorted(requests, key=lambda r: (r.kept.kind, r.kept.k, len(r.token_ids), r.reuse_key))
    for request in ordered:
        same = not batch or batch[0].kept == request.kept
        tokens = (len(batch) + 1) * len(request.token_ids)
        if batch and (
            not same or tokens > batch_tokens or tokens * 4 * request.kept.k > BATCH_BYTES
        ):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _reject_names(job: Job, request: TargetRequest) -> dict[str, Any]:
    """Where features were asked for, the targets may still be had without them."""
    asked = captured(job.score.features)
    context = capture_id(job.teacher_id, asked) if request.features else job.teacher_id
    return {"context_id": context, "tokens_key": request.tokens_key}
