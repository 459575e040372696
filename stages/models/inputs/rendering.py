"""From a prompts row to token ids.

It is about chat template, special tokens, given answers and windows of long text.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ....storage.errors import RowError, UsageError, answered
from ....storage.tables.conversations import conversation
from ....storage.tables.spans import span_after, spans_before
from ..chat.bounds import shared
from ..chat.long_text import ids_of_pieces, in_pieces, refuse_long
from ..chat.renderer import ChatRenderer, Ids, no_spans
from ..fit.files import read_json

_OWN_CODE = (
    "Its tokenizer_config.json asks for code of its own (auto_map), which is never run: save it as "
    "a tokenizer that transformers has."
)


class Renderer:
    """A model's tokenizer and template, applied as the model expects them."""

    def __init__(
        self, folder: Path, chat_template_kwargs: dict[str, Any], *, day: str | None = None
    ) -> None:
        """`day`: what a template that reads the clock is told, as 2026-11-29; None: today."""
        from transformers import AutoTokenizer

        asks = "auto_map" in read_json(folder / "tokenizer_config.json", str(folder), missing={})
        action = _OWN_CODE if asks else "Save the model again."
        with answered(f"{folder}: the tokenizer does not load", action):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._arguments, self._day = chat_template_kwargs, day
        self._moved = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the tokenizer is made for."""
        return int(self.tokenizer.model_max_length)

    @cached_property
    def _chat(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self._arguments, self._day)

    def prompt_ids(self, row: dict[str, Any]) -> list[int]:
        """Token ids of a row's prompt, ready to be continued.

        Raises:
            RowError: the prompt is empty, or template or tokenizer fail on it.
        """
        return self.prompt(row)[0]

    def prompt(self, row: dict[str, Any], *, turns: bool = False) -> Ids:
        """The same; `turns`: with the spans of the assistant's turns in it."""
        if row["messages"] is not None:
            ids, spans = self._chat.prompt(conversation(row), turns=turns)
        else:
            ids, spans = self._text_ids(row["text"]), no_spans()
            if not row["text"].strip():
                raise RowError("empty", "the prompt has no words")
        if not ids:
            raise RowError("empty", "the prompt has no tokens")
        return ids, spans

    def given(self, row: dict[str, Any], *, last: bool, ended: bool = True) -> Ids:
        """Token ids of a row that brings its answer, and what is scored of them.

        It is rendered and tokenized as a whole.

        Args:
            row: A row of `prompts`.
            last: Of a conversation's turns, the last alone.
            ended: Whether the answer came to its end, and was not cut short.

        Raises:
            RowError: template or tokenizer fail on it, or no turn can be found.
        """
        if row["messages"] is not None:
            read = self._chat.whole if ended else self._chat.unended
            return read(conversation(row), last=last)
        return self._continued(row["text"], row["completion"], ended=ended)

    def _continued(self, text: str, completion: str, *, ended: bool) -> Ids:
        """A text and its completion, closed by the end-of-sequence token.

        Without it a student never learns to stop.

        They are one text to the tokenizer, as they were to whoever wrote it. Where its tokens do
        not end where the prompt does, the completion begins after the last token that both share.
        """
        if not completion.strip():
            raise RowError("empty", "the completion has no words")
        own, ids = self._text_ids(text), self._text_ids(text + completion)
        start = shared(own, ids)
        self._moved += start < len(own)
        end = self.tokenizer.eos_token_id
        if ended and end is not None and ids[-1:] != [end]:
            ids.append(end)
        return ids, span_after(start, len(ids))

    def shortened(self, row: dict[str, Any], given: Ids, most: int) -> Ids:
        """A row that brings its answer, without its end: `most` tokens and the spans in them.

        What the tokenizer itself puts at the end stays, and is not scored: a student must not learn
        to stop where a text was cut. What a template, or the stage, closes an answer with goes.

        Args:
            row: A row of `prompts`.
            given: What `given` made of it: more than `most` tokens.
            most: Tokens that are left.
        """
        ids, spans = given
        closing = [] if row["messages"] is not None else self._around[1]
        kept = most - len(closing)
        return [*ids[:kept], *closing], spans_before(spans, kept)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before any text and after it.

        That is <s> and </s>, [CLS] and [SEP], or nothing.
        """
        said, text = self._some_text()
        ids = list(self.tokenizer(said)["input_ids"])
        starts = range(len(ids) - len(text) + 1)
        start = next((n for n in starts if ids[n : n + len(text)] == text), len(ids))
        return ids[:start], ids[start + len(text) :]

    def _some_text(self) -> tuple[str, list[int]]:
        """A text that the tokenizer reads, and its ids.

        A tokenizer without an unknown token may have none for `a`.

        Raises:
            UsageError: there is none.
        """
        special = set(self.tokenizer.all_special_ids)
        others = (i for i in range(len(self.tokenizer)) if i not in special)
        for text in chain(["a"], map(self._text_of, others)):
            with suppress(Exception):  # tokenizers raise what they like
                if ids := list(self.tokenizer(text, add_special_tokens=False)["input_ids"]):
                    return text, ids
        raise UsageError(
            f"{self.tokenizer.name_or_path}: the tokenizer reads none of its own tokens, and has "
            "no unknown token. Save the model again."
        )

    def _text_of(self, token_id: int) -> str:
        tokens: Any = self.tokenizer.convert_ids_to_tokens([token_id])
        return str(self.tokenizer.convert_tokens_to_string(tokens))

    def notes(self) -> list[str]:
        """What this run has to say of its texts, a sentence each."""
        said = self._chat.notes() if "_chat" in self.__dict__ else []
        if self._moved:
            said.append(
                f"{self._moved} completions begin inside a token of prompt and completion, which "
                "is scored as a whole"
            )
        return said

    def labelled_ids(
        self, text: str, text_pair: str | None, *, most: int | None = None
    ) -> tuple[list[int], int]:
        """A text or a pair, joined as the tokenizer joins them, and how many tokens were cut.

        Args:
            text: The text.
            text_pair: The second text, None where there is none.
            most: Cut to so many tokens as the tokenizer does it, of a pair the longer text; None:
                not at all.

        Raises:
            RowError: the tokenizer fails on it, or the pair's segments could not be told from its
                tokens later on.
        """
        refuse_long(text + (text_pair or ""), why="a text that is classified is read whole")
        try:
            found = self.tokenizer(text, text_pair)
            whole = len(found["input_ids"])
            if most is not None and whole > most:
                found = self.tokenizer(text, text_pair, truncation="longest_first", max_length=most)
        except Exception as error:
            raise RowError("unreadable", f"the tokenizer fails on this text: {error}") from error
        ids = np.asarray(found["input_ids"], np.int64)
        if not len(ids):
            raise RowError("empty", "the text has no tokens")
        self._refuse_other_segments(ids, found.get("token_type_ids"))
        return ids.tolist(), whole - len(ids)

    def word_ids(self, words: Sequence[str]) -> tuple[list[int], np.ndarray]:
        """Token ids of a text that comes as words, and the number of each token's word.

        Special tokens are among them.

        That number is -1 for a special token.

        Raises:
            UsageError: the tokenizer does not say which word a token is of.
            RowError: it fails on the words, or their segments could not be told later on.
        """
        refuse_long(" ".join(words), why="a text whose words are classified is read whole")
        if not self.tokenizer.is_fast:
            raise UsageError(
                f"data.format: the tokenizer ({type(self.tokenizer).__name__}) is a slow one, "
                "which does not say which word a token is of. Use a model with a tokenizer.json, "
                "or make one: AutoTokenizer.from_pretrained(...) and save_pretrained, where "
                "transformers can convert it."
            )
        try:
            found = self.tokenizer(list(words), is_split_into_words=True)
        except Exception as error:
            raise RowError("unreadable", f"the tokenizer fails on these words: {error}") from error
        ids = np.asarray(found["input_ids"], np.int64)
        self._refuse_other_segments(ids, found.get("token_type_ids"))
        of = [-1 if word is None else word for word in found.word_ids(0)]
        return ids.tolist(), np.array(of, np.int64)

    def _refuse_other_segments(self, ids: np.ndarray, segment_ids: Any) -> None:
        """Raise RowError where a text's segments are not those that its tokens show."""
        if segment_ids is None:
            return
        if list(segment_ids) != segments(ids, self.tokenizer.sep_token_id).tolist():
            raise RowError(
                "unreadable",
                f"its segments do not part at the first separator ({self.tokenizer.sep_token!r}): "
                "a text holds that token itself, or the tokenizer joins pairs without it",
            )

    def windows(self, text: str, window_tokens: int) -> list[np.ndarray]:
        """A document cut into windows; each starts with the last token of the one before.

        So every token but the first is predicted exactly once: [a b c d e] in windows of 3 is [a b
        c], [c d e].

        Raises:
            RowError: the tokenizer fails on it.
        """
        return cut(self._encode(text), window_tokens)

    def whole_windows(self, text: str, window_tokens: int) -> list[np.ndarray]:
        """A document cut into windows that share no token.

        Each has the special tokens of a text of its own.

        Raises:
            RowError: the tokenizer fails on it.
        """
        before, after = (np.array(ids, np.int32) for ids in self._around)
        ids = self._encode(text)
        inner = ids[len(before) : len(ids) - len(after)]
        step = window_tokens - len(before) - len(after)
        return [
            np.concatenate([before, inner[start : start + step], after])
            for start in range(0, len(inner), step)
        ]

    def _encode(self, text: str) -> np.ndarray:
        """[T] int32."""
        try:
            ids = self._ids(text)
        except RowError:
            raise
        except Exception as error:
            raise RowError("unreadable", f"the tokenizer fails on this text: {error}") from error
        first = self.tokenizer.bos_token_id
        # The text brings its own, and the tokenizer put another one before it.
        twice = first is not None and ids[:2].tolist() == [first, first]
        return ids[1:] if twice and text.startswith(self.tokenizer.bos_token) else ids

    def _ids(self, text: str) -> np.ndarray:
        if not in_pieces(self.tokenizer, text):
            return np.array(self.tokenizer(text)["input_ids"], np.int32)
        before, after = (np.array(ids, np.int32) for ids in self._around)
        return np.concatenate([before, ids_of_pieces(self.tokenizer, text), after])

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._encode(text).tolist()
        # Some tokenizers close what they encode; a prompt must stay open.
        while (
            ids
            and ids[-1] == self.tokenizer.eos_token_id
            and not text.endswith(self.tokenizer.eos_token)
        ):
            ids.pop()
        return ids


def segments(token_ids: np.ndarray, separator: int | None) -> np.ndarray:
    """[T] int64 which text of a pair a token belongs to, as BERT counts.

    It is 1 from after the first separator on, else 0.

    So a pair's segments need not be stored: its tokens show them, which `labelled_ids` makes sure
    of.
    """
    here = token_ids == separator if separator is not None else np.zeros(len(token_ids), bool)
    second: np.ndarray = np.cumsum(here) - here > 0
    return second.astype(np.int64)


def cut(ids: np.ndarray, window_tokens: int) -> list[np.ndarray]:
    """Windows of at most `window_tokens` ids that overlap by one.

    A text of fewer than two tokens has none.
    """
    step = window_tokens - 1
    return [ids[start : start + window_tokens] for start in range(0, max(len(ids) - 1, 0), step)]
