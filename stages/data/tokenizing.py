"""Given text as tokens: what becomes of a row of `prompts` that brings its own text.

This module also says by whose rules.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.errors import RowError
from ...storage.keys import content_id, content_key
from ...storage.tables.spans import positions, span_after
from ..ledger.requests import labelled_key, tagged_key, tokens_key
from ..models.chat.renderer import Ids
from ..models.identity import Identity
from ..models.inputs.rendering import Renderer
from ..recipe.formats import FORMATS
from ..recipe.sections import Data
from ..targets.alignment import spans_at
from ..targets.masks import Masks
from .lengths import Lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """One row of `generations`, before it is written."""

    token_ids: list[int] | np.ndarray
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


def author_id(
    data: Data, teacher: Identity, *, day: str | None = None, masks: str | None = None
) -> str:
    """Who wrote given text, as far as its tokens are concerned.

    That depends on tokenizer and template, and on how the text is cut and masked.
    """
    rules = _length_rules(data)
    if masks is not None:
        rules["masks"] = masks
    if _has_answer(data):
        rules["tokenized"] = "whole"
    if data.records.conversation:
        rules |= {"turns": "last"} if data.turns == "last" else {}
        rules |= {"day": day} if day is not None else {}
    return _author_id(data, teacher, rules)


def earlier_author_id(data: Data, teacher: Identity) -> str:
    """The author of an earlier rule: an answer was tokenized alone, and put behind its prompt."""
    return _author_id(data, teacher, _length_rules(data))


def _length_rules(data: Data) -> dict[str, Any]:
    rules: dict[str, Any] = {} if data.max_tokens is None else {"max_tokens": data.max_tokens}
    return rules if data.too_long == "reject" else rules | {"too_long": data.too_long}


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


def _first_tokens(of: np.ndarray, words: Sequence[str]) -> np.ndarray:
    """[words] index of the first token of each; `of`: the word of each token, -1: of none.

    Raises:
        RowError: a word has no token, so nothing can be said of it.
    """
    found, first = np.unique(of, return_index=True)
    there = first[found >= 0]
    lacking = np.setdiff1d(np.arange(len(words)), found)
    if len(lacking):
        word = int(lacking[0])
        raise RowError(
            "empty",
            f"word {word + 1} of {len(words)} ({words[word]!r}) has no token in the teacher's "
            "tokenizer. Leave such words out, with their labels",
        )
    if (np.diff(there) < 1).any():
        raise RowError("unreadable", "the tokenizer does not keep the order of the words")
    return there


class OneToken:
    """Rows of `prompts` that are images: each stands for a text of one token, named by the row."""

    def __init__(self, data: Data) -> None:
        self.lengths = Lengths.of(data, 1)

    def texts(self, row: dict[str, Any]) -> list[Given]:
        """The row of `generations` that a row becomes."""
        key = content_key("tokens", image=row["key"])
        return [Given(token_ids=[0], prompt_tokens=1, tokens_key=key)]

    def text_of(self, ids: np.ndarray) -> str:
        """None."""
        return ""

    def notes(self) -> list[str]:
        """Nothing is to be said."""
        return []


class Tokenizing:
    """Rows of `prompts` as tokens."""

    def __init__(
        self,
        folder: Path,
        data: Data,
        *,
        context_tokens: int,
        day: str | None = None,
        masks: Masks | None = None,
    ) -> None:
        """`folder` holds the teacher's tokenizer and template.

        `masks` says how tokens are hidden. None: none are.
        """
        self.renderer = Renderer(folder, data.chat_template_kwargs, day=day)
        self._last = data.turns == "last"
        self._masks = masks
        self._window = window_tokens(data, context_tokens)
        if masks is not None:
            self._window = min(self._window, self.renderer.longest)
        self._cut = data.too_long == "cut"
        # A tokenizer of a model that classifies may know better than a config what is read at once.
        reads = (
            min(context_tokens, self.renderer.longest) if data.records.labelled else context_tokens
        )
        self.lengths = Lengths.of(data, reads)

    def text_of(self, ids: np.ndarray) -> str:
        """What is scored, in words."""
        return str(self.renderer.tokenizer.decode(ids, skip_special_tokens=True))

    def notes(self) -> list[str]:
        """What is to be said of all texts, a sentence each."""
        return self.renderer.notes()

    def texts(self, row: dict[str, Any]) -> list[Given]:
        """The rows of `generations` that a row becomes.

        Raises:
            RowError: nothing to predict, or too long.
        """
        records = FORMATS[row["format"]]
        if self._masks is not None:
            windows = self._whole_windows(row["text"], self._masks)
            return [self._masked(ids, self._masks) for ids in windows]
        if records.document:
            return self._windows(row["text"])
        if records.words:
            return [self._tagged(json.loads(row["text"]), row["labels"])]
        return [self._labelled(row) if records.labelled else self._answered(row)]

    def _labelled(self, row: dict[str, Any]) -> Given:
        """The target is the class: no token is predicted."""
        most = self.lengths.most
        ids, cut = self.renderer.labelled_ids(
            row["text"], row["text_pair"], most=most if self._cut else None
        )
        if len(ids) > most:
            raise self.lengths.reject(len(ids))
        if cut:
            self.lengths.cut.add(cut)
        key = labelled_key(ids, row["label"])
        return Given(token_ids=ids, prompt_tokens=len(ids), tokens_key=key)

    def _tagged(self, words: Sequence[str], labels: Sequence[int] | None) -> Given:
        """A target at the first token of each word; the others of a word have none."""
        ids, of = self.renderer.word_ids(words)
        if len(ids) > self.lengths.most:
            if not self._cut:
                raise self.lengths.reject(len(ids))
            whole, words = len(ids), words[: self._fitting(of)]
            if not words:
                raise self.lengths.reject(whole, "; a cut would leave no word of it")
            ids, of = self.renderer.word_ids(words)
            self.lengths.cut.add(whole - len(ids))
        first = _first_tokens(of, words)
        key = tagged_key(ids, first, None if labels is None else labels[: len(words)])
        return Given(token_ids=ids, prompt_tokens=len(ids), tokens_key=key, spans=spans_at(first))

    def _fitting(self, of: np.ndarray) -> int:
        """How many of the first words fit, with all of their tokens and the special ones after."""
        last = np.flatnonzero(of >= 0)[-1]
        beyond = of[self.lengths.most - (len(of) - 1 - last) :]
        return int(np.min(beyond, where=beyond >= 0, initial=of.max() + 1))

    def _windows(self, text: str) -> list[Given]:
        """Long text becomes several windows, all of it scored."""
        windows = self.renderer.windows(text, self._window)
        if not windows:
            raise RowError("empty", "fewer than two tokens: nothing to predict")
        return [
            Given(token_ids=ids, prompt_tokens=0, tokens_key=tokens_key(ids, 0)) for ids in windows
        ]

    def _whole_windows(self, text: str, masks: Masks) -> list[np.ndarray]:
        windows = self.renderer.whole_windows(text, self._window)
        if not windows:
            raise RowError("empty", "the text has no tokens: nothing to hide")
        # One of unknown tokens alone has nothing to hide, and goes without the others.
        return [ids for ids in windows if len(masks.plain(ids))] or windows

    def _masked(self, ids: np.ndarray, masks: Masks) -> Given:
        """The text as it is, and which of its tokens are hidden.

        The key is that of what the teacher reads.
        """
        hidden = masks.hide(ids)
        key = tagged_key(hidden.token_ids, positions(hidden.spans), hidden.labels.tolist())
        return Given(token_ids=ids, prompt_tokens=0, tokens_key=key, spans=hidden.spans)

    def _answered(self, row: dict[str, Any]) -> Given:
        ids, spans = self._within(row, self.renderer.given(row, last=self._last))
        # All before the first scored token counts as the prompt.
        start = int(spans[0, 0])
        return Given(
            token_ids=ids,
            prompt_tokens=start,
            tokens_key=tokens_key(ids, start, spans),
            spans=None if np.array_equal(spans, span_after(start, len(ids))) else spans,
        )

    def _within(self, row: dict[str, Any], given: Ids) -> Ids:
        """A row as long as it may be; its scored tokens are cut with it."""
        tokens, most = len(given[0]), self.lengths.most
        if tokens <= most:
            return given
        if not self._cut:
            raise self.lengths.reject(tokens)
        ids, spans = self.renderer.shortened(row, given, most)
        if not len(spans):
            raise self.lengths.reject(
                tokens, "; what is scored begins after these, a cut would leave none of it"
            )
        self.lengths.cut.add(tokens - len(ids))
        return ids, spans
