"""Text that came with the data and is not generated: tokenized and cut into rows of `generations`."""

from contextlib import ExitStack
from typing import Any

from ...storage.errors import RowError
from ...storage.keys import content_id
from ...storage.store.store import Store
from ...storage.store.writer import CommitLimits
from ...storage.tables.row_builders import given_row
from ..ledger.requests import labelled_key, tokens_key
from ..models.identity import Identity
from ..models.rendering import Renderer
from ..recipe.formats import FORMATS
from ..recipe.sections import Data, Recipe
from ..workers.job import Job
from ..workers.shard_about import about


def given_text(recipe: Recipe) -> bool:
    """Whether the data brings the text that is scored and trained on."""
    return recipe.generate is None


def given_author_id(recipe: Recipe, teacher: Identity) -> str:
    """Who wrote given text, as far as its tokens are concerned: tokenizer, template and how it is cut."""
    return content_id(
        "given",
        tokenizer=teacher.tokenizer_id,
        template=teacher.template_id,
        chat_template_kwargs=recipe.data.chat_template_kwargs,
        window_tokens=window_tokens(recipe.data, teacher.context_tokens),
    )


def window_tokens(data: Data, context_tokens: int) -> int:
    """Tokens of one window of long text, for a teacher that reads `context_tokens` at once."""
    return min(data.window_tokens or context_tokens, context_tokens)


class GivenText:
    """Tokenizes the text that came with the data into generations rows."""

    def __init__(self, job: Job, store: Store, stack: ExitStack, limits: CommitLimits) -> None:
        data = job.recipe.data
        self._clock = job.clock
        self._renderer = Renderer(store.teacher_dir(job.teacher_id), data.chat_template_kwargs)
        self._author = job.author_id
        self._context = job.context_tokens
        self._window = window_tokens(data, job.context_tokens)
        settings = {
            "window_tokens": self._window,
            "chat_template_kwargs": data.chat_template_kwargs,
        }
        shard_about = about("data", job.recipe, settings, author_id=job.author_id)
        writer = store.writer("generations", about=shard_about, limits=limits)
        self._writer = stack.enter_context(writer)
        self.tokens = 0

    @property
    def bytes(self) -> int:
        """Of what is committed."""
        return self._writer.bytes

    def add(self, row: dict[str, Any]) -> int:
        """Write a prompt's rows; returns how many.

        Raises:
            RowError: nothing to predict, or longer than the context.
        """
        with self._clock.span("tokenizer"):
            texts = self._tokenized(row)
        limit = self._context
        if FORMATS[row["format"]].labelled:
            # RoBERTa counts its positions from 2: its tokenizer knows what it can read, its config
            # does not say.
            limit = min(limit, self._renderer.longest)
        for index, (start, ids) in enumerate(texts):
            if len(ids) > limit:
                raise RowError("too_long", f"{len(ids)} tokens; the teacher reads {limit}")
            self._write(row, index, start, ids)
        if not texts:
            raise RowError("empty", "fewer than two tokens: nothing to predict")
        return len(texts)

    def _tokenized(self, row: dict[str, Any]) -> list[tuple[int, list[int]]]:
        """Of each generations row that a prompt becomes, how many tokens are its prompt, and all its token ids."""
        if FORMATS[row["format"]].labelled:
            # The target is the class: no token is predicted.
            ids = self._renderer.labelled_ids(row["text"], row["text_pair"])
            return [(len(ids), ids)]
        if FORMATS[row["format"]].document:
            # Long text becomes several windows, all of it scored.
            return [(0, ids) for ids in self._renderer.windows(row["text"], self._window)]
        prompt = self._renderer.prompt_ids(row)
        return [(len(prompt), prompt + self._renderer.completion_ids(row["completion"]))]

    def _write(self, row: dict[str, Any], index: int, start: int, ids: list[int]) -> None:
        self.tokens += len(ids) - start
        with self._clock.span("tokenizer"):
            text = str(self._renderer.tokenizer.decode(ids[start:], skip_special_tokens=True))
        tokens = (
            labelled_key(ids, row["label"])
            if FORMATS[row["format"]].labelled
            else tokens_key(ids, start)
        )
        generation = given_row(
            author_id=self._author,
            source_key=row["key"],
            prompt_key=row["prompt_key"],
            window=index,
            tokens_key=tokens,
            token_ids=ids,
            prompt_tokens=start,
            text=text,
        )
        with self._clock.span("disk"):
            self._writer.add(generation)
