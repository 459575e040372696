"""Stage `generate`: the author (usually the teacher) writes completions; rows are committed as they finish."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..storage.keys import content_key, row_seed
from ..storage.store import Store
from .engine import Completion, Request, choose_engine, open_engine
from .identity import Identity
from .job import Job, StageResult
from .rendering import Renderer, RowError
from .requests import (
    GenerationRequest,
    Ledger,
    generation_ledger,
    prompt_splits,
    reject_key,
    sampling_id,
    sampling_settings,
    tokens_key,
)
from .writing import about, commit_limits

if TYPE_CHECKING:
    from ..storage.writer import ShardWriter

READ_AHEAD = 1024  # prompts read from the store at once


def run(job: Job, author: Identity) -> StageResult:
    """Make what the store does not have yet.

    Raises:
        UsageError: the author does not load, or the engine's arguments are wrong.
    """
    settings = job.recipe.generate
    assert settings is not None
    store = Store.open(job.recipe.storage.dir)
    ledger = _ledger(job, store)
    work = _Work(job, store, ledger)
    name = choose_engine(settings.engine)
    shard_about, limits = _about(job, author, name), commit_limits(job.recipe)
    with (
        store.writer("generations", about=shard_about, limits=limits) as rows,
        store.writer("rejects", about=shard_about, limits=limits) as rejects,
    ):

        def heartbeat() -> None:
            """An engine can be busy for minutes before a row is finished; commits and signals do not wait for it."""
            rows.tick()
            rejects.tick()
            job.stop.check()

        job.progress.say(f"loading {author.folder} into {name}")
        engine = open_engine(name, author, settings)
        job.stop.check()
        job.progress.start(total=ledger.planned, unit="rows", done=len(ledger.committed))
        for completion in engine.generate(work.requests(rejects), heartbeat):
            request, prompt_ids = work.taken.pop(completion.number)
            if completion.error is None:
                rows.add(_row(job, request, prompt_ids, completion))
                job.progress.advance(tokens=len(completion.token_ids))
            else:
                rejects.add(work.reject(request, RowError("engine", completion.error)))
    return StageResult(rows=rows.rows, tokens=rows.tokens, rejected=rejects.rows)


def _ledger(job: Job, store: Store) -> Ledger:
    inputs = store.inputs(job.data_id)
    assert inputs is not None, "the data stage comes first"
    return generation_ledger(
        store,
        job.recipe,
        author_id=job.author_id,
        prompts=prompt_splits(inputs),
        context_tokens=job.context_tokens,
    )


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


class _Work:
    """Hands pending requests to the engine, rendered; keeps those in flight."""

    def __init__(self, job: Job, store: Store, ledger: Ledger) -> None:
        self.taken: dict[int, tuple[GenerationRequest, list[int]]] = {}
        self._job = job
        self._sampling_id = _sampling_id(job)
        self._pending: list[GenerationRequest] = ledger.pending
        self._renderer = Renderer(store.teacher_dir(job.author_id), job.recipe.data.chat_template_kwargs)
        self._store = store
        index = store.index("prompts", ["prompt_key"])
        columns = (index[c].to_pylist() for c in ("prompt_key", "shard", "row"))
        self._places = {key: (shard, row) for key, shard, row in zip(*columns, strict=True)}

    def requests(self, rejects: "ShardWriter") -> Iterator[Request]:
        """Rendered requests in the plan's order; what cannot be rendered is rejected on the way."""
        for start in range(0, len(self._pending), READ_AHEAD):
            self._job.stop.check()
            block = self._pending[start : start + READ_AHEAD]
            prompts = self._prompts(block)
            for number, request in enumerate(block, start):
                try:
                    ids = self._prompt_ids(prompts[request.prompt_key])
                except RowError as error:
                    rejects.add(self.reject(request, error))
                    self._job.progress.advance()
                    continue
                self.taken[number] = (request, ids)
                yield Request(number, ids, row_seed(request.reuse_key))

    def _prompts(self, block: list[GenerationRequest]) -> dict[bytes, dict[str, Any]]:
        places: dict[str, list[int]] = {}
        for key in {r.prompt_key for r in block}:
            shard, row = self._places[key]
            places.setdefault(shard, []).append(row)
        rows = self._store.rows("prompts", places, ["prompt_key", "text", "messages"])
        return {row["prompt_key"]: row for row in rows}

    def _prompt_ids(self, prompt: dict[str, Any]) -> list[int]:
        ids = self._renderer.prompt_ids(prompt)
        if len(ids) >= self._job.context_tokens:
            raise RowError("too_long", f"the prompt has {len(ids)} tokens; the author reads {self._job.context_tokens}")
        return ids

    def reject(self, request: GenerationRequest, error: RowError) -> dict[str, Any]:
        """A rejects row."""
        return {
            "key": reject_key(request.reuse_key, self._job.context_tokens),
            "stage": "generate",
            "prompt_key": request.prompt_key,
            "context_id": self._sampling_id,
            "sample_index": request.sample_index,
            "limit_tokens": self._job.context_tokens,
            "reason": error.reason,
            "message": str(error),
            "attempts": 1,
        }


def _sampling_id(job: Job) -> str:
    assert job.recipe.generate is not None
    return sampling_id(job.author_id, sampling_settings(job.recipe.generate, job.recipe.data))


def _row(job: Job, request: GenerationRequest, prompt_ids: list[int], completion: Completion) -> dict[str, Any]:
    assert job.recipe.generate is not None
    limit = job.recipe.generate.max_tokens
    return {
        "key": content_key("generations", reuse_key=request.reuse_key, max_tokens=limit, context=job.context_tokens),
        "reuse_key": request.reuse_key,
        "prompt_key": request.prompt_key,
        "source_key": None,
        "author_id": job.author_id,
        "sampling_id": _sampling_id(job),
        "sample_index": request.sample_index,
        "tokens_key": tokens_key(prompt_ids + completion.token_ids, len(prompt_ids)),
        "token_ids": prompt_ids + completion.token_ids,
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": len(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "max_tokens": limit,
        "row_seed": row_seed(request.reuse_key),
    }
