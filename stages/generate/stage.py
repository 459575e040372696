"""Stage `generate`: the author (usually the teacher) writes completions.

Its rows are committed as they finish.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from ...storage.errors import RowError, UsageError
from ...storage.joined import open_store
from ...storage.keys import content_key, row_seed
from ...storage.store.store import Store
from ...storage.tables.row_builders import generation_row, target_row
from ...storage.tables.schema import TableName
from ...storage.tables.spans import span_after
from ...storage.words import counted
from ..engines.base import UNASKED, Completion, Engine, Request
from ..engines.opening import choose_engine, open_engine
from ..ledger.books import Books, Ledger, Pending
from ..ledger.generations import generation_ledger, pending_generations
from ..ledger.requests import (
    GenerationRequest,
    sampling_id,
    sampling_settings,
    target_key,
    target_row_key,
)
from ..models.identity import Identity
from ..models.inputs.reads import too_long
from ..models.inputs.rendering import Renderer
from ..recipe.kinds import HF
from ..targets.spec import Kept, kept_while_writing
from ..workers.claims import Claims, in_turn
from ..workers.job import Job, StageResult
from ..workers.shard_about import about, about_targets
from ..workers.share import DoneByOthers, Share, StageWork, open_share
from .endpoint import asking, budget_reached, endpoint_facts, hear
from .said import REASON, Alignment
from .text import Text, answered, written

if TYPE_CHECKING:
    from ..targets.bounded import Bounded


def run(job: Job, author: Identity) -> StageResult:
    """Make what the store does not have yet.

    Raises:
        UsageError: the author does not load, or the engine's arguments are wrong.
        EngineDied: on one of the rows in flight.
    """
    with job.clock.span("start"):
        store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
        ledger, pending = _asked(job, store)
        engine_name = choose_engine(job.generate.engine, author)
        work = StageWork(
            stage="generate",
            about=_about(job, author, engine_name),
            ledger=ledger,
            pending=pending,
            claims=_claims(job, store),
            again=lambda: _asked(job, store)[1],
            limit_tokens=job.context_tokens,
            row_keys=lambda job, request: {"generations": [_row_key(job, request)]},
            names=_reject_names,
            kills=not job.generate.remote,
            beside=_beside(job, author, engine_name),
            beside_first=True,
        )
    with asking(job) as answers, open_share(job, store, work) as share:
        with job.clock.span("start"):
            kept = kept_while_writing(job.generate, author.vocab_size)
            keeping = None if kept is None else partial(_kept_row, job, kept, engine_name)
            writing = _Writing(job, store, share, keeping)
            if kept is not None and job.generate.remote:
                writing.aligns_with(author, kept)
        if not job.generate.remote:
            job.progress.say(f"loading {author.folder} into {engine_name}")
        engine = open_engine(engine_name, author, job.generate, job.clock, answers=answers)
        job.stop.check()
        job.progress.start(total=ledger.planned, unit="rows", done=ledger.committed)
        for _ in share.rounds():
            writing.write(engine, writing.requests())
        for request in share.one_by_one():
            writing.write(engine, writing.rendered([request]))
        share.finish()
        if writing.left:
            budget_reached(job)
        for note in writing.notes():
            job.progress.say(note)
    return replace(share.result(), left=writing.left)


def _asked(job: Job, store: Store) -> tuple[Ledger, Pending[GenerationRequest]]:
    with Books(store, job.recipe, data_id=job.data_id) as books:
        ledger = generation_ledger(
            books, author_id=job.author_id, context_tokens=job.context_tokens
        )
        return ledger, pending_generations(books, author_id=job.author_id)


def _about(job: Job, author: Identity, engine: str) -> dict[str, Any]:
    """What the shards say about their rows."""
    sampling = sampling_settings(job.generate, job.recipe.data)
    return about(
        "generate",
        job.recipe,
        sampling | {"max_tokens": job.generate.max_tokens, "engine": engine},
        author_id=job.author_id,
        tokenizer_id=author.tokenizer_id,
        vocab_size=author.vocab_size,
        **endpoint_facts(job.generate),
    )


def _beside(job: Job, author: Identity, engine: str) -> dict[TableName, dict[str, Any]]:
    """The table of what is kept of the distributions, and what its shards say of their rows."""
    kept = kept_while_writing(job.generate, author.vocab_size)
    if kept is None:
        return {}
    settings = kept.named() | _named(engine)
    return {"soft_targets": about_targets("generate", job.recipe, settings, author)}


def _named(engine: str) -> dict[str, str]:
    return {} if engine == HF else {"engine": engine}


def _claims(job: Job, store: Store) -> Claims:
    how = {
        "sampling": _sampling_id(job),
        "samples": job.generate.samples,
        "max_tokens": job.generate.max_tokens,
    }
    return Claims(store.files, "generate", data=job.data_id, context=job.context_tokens, **how)


MOST_MISALIGNED = 16
_PROMPT = ("prompt_key", "text", "messages", "message_fields", "tools")


class _Writing:
    """Hands pending requests to the engine, rendered; makes rows of what comes back."""

    def __init__(
        self,
        job: Job,
        store: Store,
        share: Share[GenerationRequest],
        keeping: Callable[[dict[str, Any], "Bounded"], dict[str, Any]] | None,
    ) -> None:
        """Take `keeping`, which makes rows of soft targets.

        It makes one of a generation's row and of what that was drawn from.
        """
        self._job, self._keeping = job, keeping
        self._store = store
        self._share = share
        self._renderer = Renderer(
            store.teacher_dir(job.author_id), job.recipe.data.chat_template_kwargs, day=job.day
        )
        self._numbers = count()
        self._taken: dict[int, tuple[GenerationRequest, Text]] = {}
        self._served: set[str] = set()
        self._left_out = Counter[str]()
        self._alignment: Alignment | None = None
        self._misaligned: int | None = 0
        """Answers so far whose log-probabilities did not align; None: one has aligned."""
        self.left = 0
        """Requests that the budget had nothing for."""
        self._unanswered: list[str] = []
        """What calls came to that could not be tried again within it."""

    def aligns_with(self, author: Identity, kept: Kept) -> None:
        """Answers come in words, with log-probabilities of tokens that are this model's."""
        self._alignment = Alignment(self._job, author, self._renderer, kept)

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

    def notes(self) -> list[str]:
        """What is to be said of all prompts, a sentence each."""
        beside = [
            f"{counted(count, 'answer')} came with {what} beside the text, which is left out"
            for what, count in self._left_out.items()
        ]
        tails = self._alignment.notes() if self._alignment is not None else []
        return self._renderer.notes() + beside + tails + self._in_vain()

    def _in_vain(self) -> list[str]:
        """That calls without an answer took a part of the budget."""
        if not self._unanswered:
            return []
        return [
            "calls that came to nothing count in the budget in full, and it had no more for "
            f"another try of {len(self._unanswered)} of them (the last: {self._unanswered[-1]})"
        ]

    def _keep(self, completion: Completion) -> None:
        request, prompt = self._taken.pop(completion.number)
        self._share.done([request])
        if completion.finish_reason == UNASKED:
            self.left += 1
            self._unanswered += [completion.error] if completion.error else []
        elif completion.error is None:
            self._add(request, prompt, completion)
        elif completion.reason == "engine":
            self._share.fail(request, RowError("engine", completion.error), completion.attempts)
        else:
            self._share.refuse(request, RowError(completion.reason, completion.error))

    def _add(self, request: GenerationRequest, prompt: Text, completion: Completion) -> None:
        """Make a row of what was written."""
        self._left_out.update(completion.left_out)
        if completion.served and completion.served not in self._served:
            self._served.add(completion.served)
            hear(self._job, self._store, completion.served)
        try:
            completion, text = self._text(prompt, completion)
        except RowError as error:
            self._refuse(request, error)
            return
        row = _row(self._job, request, text, completion.finish_reason)
        rows = self._kept_of(row, completion) | {"generations": [row]}
        self._share.add(rows, tokens=len(text.token_ids) - text.prompt_tokens)

    def _text(self, prompt: Text, completion: Completion) -> tuple[Completion, Text]:
        """A completion as tokens, with distributions where these are kept.

        They are the distributions that the tokens were drawn from.
        """
        if self._alignment is not None:
            completion = self._alignment.written(prompt, completion)
            self._misaligned = None
        elif self._job.generate.remote:
            return completion, answered(self._job, self._renderer, prompt, completion)
        return completion, written(prompt, completion)

    def _refuse(self, request: GenerationRequest, error: RowError) -> None:
        """Reject a row for an answer that makes none.

        Where no answer has log-probabilities of use, the endpoint is to blame.
        """
        if error.reason != REASON or self._misaligned is None:
            self._share.refuse(request, error)
            return
        self._misaligned += 1
        self._share.fail(request, error, 1)
        if self._misaligned == MOST_MISALIGNED:
            raise UsageError(
                f"generate.keep: none of the first {MOST_MISALIGNED} answers can be kept with its "
                f"log-probabilities (the last: {error}). Name as teacher.model the folder whose "
                "tokenizer and template the endpoint's model has, or remove generate.keep. The "
                "answers are kept on disk."
            )

    def _kept_of(
        self, row: dict[str, Any], completion: Completion
    ) -> dict[TableName, list[dict[str, Any]]]:
        """The soft targets of a completion's tokens, where the recipe keeps them."""
        if self._keeping is None:
            return {}
        # Nothing predicts the first token of all.
        kept = completion.targets if row["prompt_tokens"] else None
        return {"soft_targets": [self._keeping(row, kept)] if kept else []}

    def requests(self) -> Iterator[Request]:
        """Give rendered requests, block by block, as claims have it.

        Those of a block come in the order of their lengths.
        """
        for claims, block in self._share.blocks():
            yield from self.rendered(block, claims=claims)

    def rendered(self, block: list[GenerationRequest], *, claims: int = 0) -> Iterator[Request]:
        """What can be rendered of some requests, each taken when it is asked for.

        The others are rejected.
        """
        ready = []
        for request, row in zip(block, self._prompts(block), strict=True):
            try:
                ready.append((request, self._rendered(row)))
            except RowError as error:
                self._share.refuse(request, error)
        ready.sort(key=lambda pair: len(pair[1].token_ids))
        for request, prompt in in_turn(claims, ready):
            if self._share.take([request]):
                number = next(self._numbers)
                self._taken[number] = (request, prompt)
                seed = row_seed(request.reuse_key)
                yield Request(number, prompt.token_ids, seed, prompt.row, request.sample_index)

    def _prompts(self, block: list[GenerationRequest]) -> list[dict[str, Any]]:
        places: dict[str, list[int]] = {}
        for shard, row in sorted({request.prompt for request in block}):
            places.setdefault(shard, []).append(row)
        with self._job.clock.span("disk"):
            rows = self._store.rows("prompts", places, _PROMPT)
            prompts = {row["prompt_key"]: row for row in rows}
        return [prompts[request.prompt_key] for request in block]

    def _rendered(self, row: dict[str, Any]) -> Text:
        with self._job.clock.span("tokenizer"):
            ids, spans = self._renderer.prompt(row, turns=self._job.recipe.data.turns == "all")
        if len(ids) >= self._job.context_tokens:
            most = self._job.context_tokens
            raise too_long(len(ids), most, limit="the author reads", what="the prompt has ")
        return Text(ids, len(ids), spans, row=row)


def _reject_names(job: Job, request: GenerationRequest) -> dict[str, Any]:
    return {"context_id": _sampling_id(job), "sample_index": request.sample_index}


def _sampling_id(job: Job) -> str:
    return sampling_id(job.author_id, sampling_settings(job.generate, job.recipe.data))


def _row_key(job: Job, request: GenerationRequest) -> bytes:
    limit = job.generate.max_tokens
    return content_key(
        "generations", reuse_key=request.reuse_key, max_tokens=limit, context=job.context_tokens
    )


def _row(job: Job, request: GenerationRequest, text: Text, finish_reason: str) -> dict[str, Any]:
    return generation_row(
        key=_row_key(job, request),
        reuse_key=request.reuse_key,
        prompt_key=request.prompt_key,
        author_id=job.author_id,
        sampling_id=_sampling_id(job),
        sample_index=request.sample_index,
        tokens_key=text.tokens_key,
        token_ids=text.token_ids,
        prompt_tokens=text.prompt_tokens,
        text=text.completion,
        finish_reason=finish_reason,
        max_tokens=job.generate.max_tokens,
        row_seed=row_seed(request.reuse_key),
        spans=text.spans if len(text.spans) else None,
    )


def _kept_row(
    job: Job, kept: Kept, engine: str, generation: dict[str, Any], drawn_from: "Bounded"
) -> dict[str, Any]:
    """The soft targets of a completion's tokens, under the names that `score` asks for."""
    tokens, bits = generation["tokens_key"], job.recipe.storage.mantissa_bits
    token_ids = generation["token_ids"]
    return target_row(
        key=target_row_key(job.author_id, tokens, kept, bits=bits, engine=engine),
        reuse_key=target_key(job.author_id, tokens),
        tokens_key=tokens,
        generation_key=generation["key"],
        prompt_key=generation["prompt_key"],
        teacher_id=job.author_id,
        token_ids=token_ids,
        spans=span_after(generation["prompt_tokens"], len(token_ids)),
        targets=drawn_from.targets,
        mantissa_bits=bits,
        settings=kept.columns(),
        tail_bound=drawn_from.tail_bound,
        engine=None if engine == HF else engine,
    )
