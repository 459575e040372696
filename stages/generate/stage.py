"""Stage `generate`: the author (usually the teacher) writes completions; rows are committed as they finish."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from ...storage.errors import RowError
from ...storage.joined import open_store
from ...storage.keys import content_key, row_seed
from ...storage.store.store import Store
from ...storage.tables.row_builders import generation_row
from ..engines.base import Completion, Engine, Request
from ..engines.opening import choose_engine, open_engine
from ..ledger.books import Books, Ledger, Pending
from ..ledger.generations import generation_ledger, pending_generations
from ..ledger.requests import (
    GenerationRequest,
    reject_key,
    sampling_id,
    sampling_settings,
    tokens_key,
)
from ..models.identity import Identity
from ..models.rendering import Renderer
from ..workers.claims import Claims
from ..workers.job import Job, StageResult
from ..workers.journal import Journal, find_suspects, new_journal
from ..workers.rejects import Rejects
from ..workers.shard_about import about, commit_limits
from ..workers.share import DoneByOthers, Share


def run(job: Job, author: Identity) -> StageResult:
    """Make what the store does not have yet.

    Raises:
        UsageError: the author does not load, or the engine's arguments are wrong.
        EngineDied: on one of the rows in flight.
    """
    settings = job.recipe.generate
    assert settings is not None
    with job.clock.span("start"):
        store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
        ledger, pending = _asked(job, store)
        name = choose_engine(settings.engine)
        shard_about, limits = _about(job, author, name), commit_limits(job.recipe)
        run_dir = Path(job.recipe.run.dir)
        suspects = find_suspects(run_dir, "generate")
    with (
        Journal(job.journal or new_journal(run_dir, "generate")) as journal,
        store.writer("generations", about=shard_about, limits=limits) as rows,
        store.writer("rejects", about=shard_about, limits=limits) as rejects,
    ):
        share = Share(
            job=job,
            rows=rows,
            rejects=rejects,
            failed=Rejects(rejects, proven=ledger.committed > 0),
            claims=_claims(job, store),
            pending=pending,
            journal=journal,
            suspects=suspects,
            limit_tokens=job.context_tokens,
            row_key=lambda request: _row_key(job, request),
            reject=lambda request, error, attempts: _reject(job, request, error, attempts),
        )
        with job.clock.span("start"):
            work = _Work(job, store, share)
        job.progress.say(f"loading {author.folder} into {name}")
        engine = open_engine(name, author, settings, job.clock)
        job.stop.check()
        job.progress.start(total=ledger.planned, unit="rows", done=ledger.committed)
        work.write(engine, work.requests())
        for request in share.one_by_one():
            work.write(engine, work.rendered([request]))
        share.finish()
    return StageResult(rows=rows.rows, tokens=rows.tokens, rejected=rejects.rows)


def _asked(job: Job, store: Store) -> tuple[Ledger, Pending[GenerationRequest]]:
    with Books(store, job.recipe, data_id=job.data_id) as books:
        ledger = generation_ledger(
            books, author_id=job.author_id, context_tokens=job.context_tokens
        )
        return ledger, pending_generations(books, author_id=job.author_id)


def _about(job: Job, author: Identity, engine: str) -> dict[str, Any]:
    """What the shards say about their rows."""
    settings = job.recipe.generate
    assert settings is not None
    sampling = sampling_settings(settings, job.recipe.data)
    return about(
        "generate",
        job.recipe,
        sampling | {"max_tokens": settings.max_tokens, "engine": engine},
        author_id=job.author_id,
        tokenizer_id=author.tokenizer_id,
        vocab_size=author.vocab_size,
    )


def _claims(job: Job, store: Store) -> Claims:
    settings = job.recipe.generate
    assert settings is not None
    how = {
        "sampling": _sampling_id(job),
        "samples": settings.samples,
        "max_tokens": settings.max_tokens,
    }
    return Claims(store.files, "generate", data=job.data_id, context=job.context_tokens, **how)


class _Work:
    """Hands pending requests to the engine, rendered; makes rows of what comes back."""

    def __init__(self, job: Job, store: Store, share: Share[GenerationRequest]) -> None:
        self._job = job
        self._store = store
        self._share = share
        self._renderer = Renderer(
            store.teacher_dir(job.author_id), job.recipe.data.chat_template_kwargs
        )
        self._numbers = count()
        self._taken: dict[int, tuple[GenerationRequest, list[int]]] = {}

    def write(self, engine: Engine, requests: Iterator[Request]) -> None:
        """Let the engine do requests until all are done, by whomever."""
        while True:
            try:
                for completion in engine.generate(requests, self._share.heartbeat):
                    self._keep(completion)
                return
            except DoneByOthers:
                self._taken.clear()
                self._share.drop()

    def _keep(self, completion: Completion) -> None:
        request, prompt_ids = self._taken.pop(completion.number)
        self._share.done([request])
        if completion.error is None:
            row = _row(self._job, request, prompt_ids, completion)
            self._share.add(row, tokens=len(completion.token_ids))
        else:
            self._share.fail(request, RowError("engine", completion.error), completion.attempts)

    def requests(self) -> Iterator[Request]:
        """Rendered requests, block by block; a block that is this worker's alone in the order of their lengths."""
        for claims, block in self._share.blocks():
            yield from self.rendered(block, by_length=claims == 0)

    def rendered(
        self, block: list[GenerationRequest], *, by_length: bool = False
    ) -> Iterator[Request]:
        """What can be rendered of some requests, each taken when it is asked for; the others are rejected."""
        ready = []
        for request, prompt in zip(block, self._prompts(block), strict=True):
            try:
                ready.append((request, self._prompt_ids(prompt)))
            except RowError as error:
                self._share.refuse(request, error)
        if by_length:
            ready.sort(key=lambda pair: len(pair[1]))
        for request, ids in ready:
            if self._share.take([request]):
                number = next(self._numbers)
                self._taken[number] = (request, ids)
                yield Request(number, ids, row_seed(request.reuse_key))

    def _prompts(self, block: list[GenerationRequest]) -> list[dict[str, Any]]:
        places: dict[str, list[int]] = {}
        for shard, row in sorted({request.prompt for request in block}):
            places.setdefault(shard, []).append(row)
        with self._job.clock.span("disk"):
            rows = self._store.rows("prompts", places, ["prompt_key", "text", "messages"])
            prompts = {row["prompt_key"]: row for row in rows}
        return [prompts[request.prompt_key] for request in block]

    def _prompt_ids(self, prompt: dict[str, Any]) -> list[int]:
        with self._job.clock.span("tokenizer"):
            ids = self._renderer.prompt_ids(prompt)
        if len(ids) >= self._job.context_tokens:
            raise RowError(
                "too_long",
                f"the prompt has {len(ids)} tokens; the author reads {self._job.context_tokens}",
            )
        return ids


def _reject(job: Job, request: GenerationRequest, error: RowError, attempts: int) -> dict[str, Any]:
    return {
        "key": reject_key(request.reuse_key, job.context_tokens),
        "stage": "generate",
        "prompt_key": request.prompt_key,
        "context_id": _sampling_id(job),
        "sample_index": request.sample_index,
        "limit_tokens": job.context_tokens,
        "reason": error.reason,
        "message": str(error),
        "attempts": attempts,
    }


def _sampling_id(job: Job) -> str:
    assert job.recipe.generate is not None
    return sampling_id(job.author_id, sampling_settings(job.recipe.generate, job.recipe.data))


def _row_key(job: Job, request: GenerationRequest) -> bytes:
    assert job.recipe.generate is not None
    limit = job.recipe.generate.max_tokens
    return content_key(
        "generations", reuse_key=request.reuse_key, max_tokens=limit, context=job.context_tokens
    )


def _row(
    job: Job, request: GenerationRequest, prompt_ids: list[int], completion: Completion
) -> dict[str, Any]:
    assert job.recipe.generate is not None
    token_ids = prompt_ids + completion.token_ids
    return generation_row(
        key=_row_key(job, request),
        reuse_key=request.reuse_key,
        prompt_key=request.prompt_key,
        author_id=job.author_id,
        sampling_id=_sampling_id(job),
        sample_index=request.sample_index,
        tokens_key=tokens_key(token_ids, len(prompt_ids)),
        token_ids=token_ids,
        prompt_tokens=len(prompt_ids),
        text=completion.text,
        finish_reason=completion.finish_reason,
        max_tokens=job.recipe.generate.max_tokens,
        row_seed=row_seed(request.reuse_key),
    )
