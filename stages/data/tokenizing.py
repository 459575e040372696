"""Given text as tokens: what becomes of a row of `prompts` that brings its own text, and by whose rules."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.errors import RowError
from ...storage.keys import content_id
from ...storage.tables.spans import span_after
from ..ledger.requests import labelled_key, tokens_key
from ..models.identity import Identity
from ..models.rendering import Renderer
from ..recipe.formats import FORMATS
from ..recipe.sections import Data


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """One row of `generations`, before it is written."""

    token_ids: list[int]
    prompt_tokens: int
    tokens_key: bytes
    spans: np.ndarray | None = None
    """[S, 2] what is scored, where that is not all that follows the prompt."""

    @property
    def scored(self) -> int:
        """Tokens that are scored, or would be but for a text's first."""
        if self.spans is not None:
            return int(self.spans[:, 1].sum())
        return len(self.token_ids) - self.prompt_tokens


def author_id(data: Data, teacher: Identity, *, day: str | None = None) -> str:
    """Who wrote given text, as far as its tokens are concerned: tokenizer, template and how it is cut."""
    rules: dict[str, Any] = {}
    if _has_answer(data):
        rules["tokenized"] = "whole"
    if data.records.conversation:
        rules |= {"turns": "last"} if data.turns == "last" else {}
        rules |= {"day": day} if day is not None else {}
    return _author_id(data, teacher, rules)


def earlier_author_id(data: Data, teacher: Identity) -> str:
    """The author of an earlier rule: an answer was tokenized alone, and put behind its prompt."""
    return _author_id(data, teacher, {})


def _author_id(data: Data, teacher: Identity, rules: dict[str, Any]) -> str:
    return content_id(
        "given",
        tokenizer=teacher.tokenizer_id,
        template=teacher.template_id,
        chat_template_kwargs=data.chat_template_kwargs,
        window_tokens=window_tokens(data, teacher.context_tokens),
        **rules,
    )


def _has_answer(data: Data) -> bool:
    return not (data.records.document or data.records.labelled)


def window_tokens(data: Data, context_tokens: int) -> int:
    """Tokens of one window of long text, for a teacher that reads `context_tokens` at once."""
    return min(data.window_tokens or context_tokens, context_tokens)


class Tokenizing:
    """Rows of `prompts` as tokens."""

    def __init__(
        self, folder: Path, data: Data, *, context_tokens: int, day: str | None = None
    ) -> None:
        """`folder`: holds the teacher's tokenizer and template."""
        self.renderer = Renderer(folder, data.chat_template_kwargs, day=day)
        self._last = data.turns == "last"
        self._context = context_tokens
        self._window = window_tokens(data, context_tokens)

    def texts(self, row: dict[str, Any]) -> list[Given]:
        """The rows of `generations` that a row becomes.

        Raises:
            RowError: nothing to predict, or longer than the context.
        """
        records = FORMATS[row["format"]]
        limit = self._context
        if records.labelled:
            # RoBERTa counts its positions from 2: its tokenizer knows what it can read, its config
            # does not say.
            limit = min(limit, self.renderer.longest)
            texts = [self._labelled(row)]
        elif records.document:
            texts = self._windows(row["text"])
        else:
            texts = [self._answered(row)]
        for text in texts:
            if len(text.token_ids) > limit:
                raise RowError(
                    "too_long", f"{len(text.token_ids)} tokens; the teacher reads {limit}"
                )
        if not texts:
            raise RowError("empty", "fewer than two tokens: nothing to predict")
        return texts

    def _labelled(self, row: dict[str, Any]) -> Given:
        """The target is the class: no token is predicted."""
        ids = self.renderer.labelled_ids(row["text"], row["text_pair"])
        key = labelled_key(ids, row["label"])
        return Given(token_ids=ids, prompt_tokens=len(ids), tokens_key=key)

    def _windows(self, text: str) -> list[Given]:
        """Long text becomes several windows, all of it scored."""
        return [
            Given(token_ids=ids, prompt_tokens=0, tokens_key=tokens_key(ids, 0))
            for ids in self.renderer.windows(text, self._window)
        ]

    def _answered(self, row: dict[str, Any]) -> Given:
        ids, spans = self.renderer.given(row, last=self._last)
        # All before the first scored token counts as the prompt.
        start = int(spans[0, 0])
        return Given(
            token_ids=ids,
            prompt_tokens=start,
            tokens_key=tokens_key(ids, start, spans),
            spans=None if np.array_equal(spans, span_after(start, len(ids))) else spans,
        )
