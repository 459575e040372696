"""From a prompts row to token ids: the chat template, special tokens, given completions and windows of long text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.errors import RowError, UsageError


class Renderer:
    """A model's tokenizer and template, applied as the model expects them."""

    def __init__(self, folder: Path, chat_template_kwargs: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise UsageError(
                f"{folder}: the tokenizer does not load ({error}). Save the model again."
            ) from error
        self._kwargs = chat_template_kwargs

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the tokenizer is made for."""
        return int(self.tokenizer.model_max_length)

    def prompt_ids(self, row: dict[str, Any]) -> list[int]:
        """Token ids of a row's prompt, ready to be continued.

        Raises:
            RowError: the prompt is empty, or template or tokenizer fail on it.
        """
        ids = (
            self._chat_ids(row["messages"])
            if row["messages"] is not None
            else self._text_ids(row["text"])
        )
        if not ids:
            raise RowError("empty", "the prompt has no tokens")
        return ids

    def completion_ids(self, text: str) -> list[int]:
        """A given completion, closed by the end-of-sequence token: else a student never learns to stop.

        Raises:
            RowError: the tokenizer fails on it.
        """
        ids = self._encode(text, add_special_tokens=False)
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def labelled_ids(self, text: str, text_pair: str | None) -> list[int]:
        """A text or a pair, joined as the tokenizer does it for a model that classifies.

        Raises:
            RowError: the tokenizer fails on it, or the pair's segments could not be told from its
                tokens later on.
        """
        try:
            found = self.tokenizer(text, text_pair)
        except Exception as error:
            raise RowError("unreadable", f"the tokenizer fails on this text: {error}") from error
        ids = np.asarray(found["input_ids"], np.int64)
        if not len(ids):
            raise RowError("empty", "the text has no tokens")
        segment_ids = found.get("token_type_ids")
        if (
            segment_ids is not None
            and list(segment_ids) != segments(ids, self.tokenizer.sep_token_id).tolist()
        ):
            raise RowError(
                "unreadable",
                f"its segments do not part at the first separator ({self.tokenizer.sep_token!r}): "
                "a text holds that token itself, or the tokenizer joins pairs without it",
            )
        token_ids: list[int] = ids.tolist()
        return token_ids

    def windows(self, text: str, window_tokens: int) -> list[list[int]]:
        """A document cut into windows; each starts with the last token of the one before.

        So every token but the first is predicted exactly once: [a b c d e] in windows of 3 is [a b
        c], [c d e].

        Raises:
            RowError: the tokenizer fails on it.
        """
        return cut(self._encode(text), window_tokens)

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except Exception as error:
            raise RowError("unreadable", f"the tokenizer fails on this text: {error}") from error

    def _text_ids(self, text: str) -> list[int]:
        ids = self._encode(text)
        # Some tokenizers close what they encode; a prompt must stay open.
        while (
            ids
            and ids[-1] == self.tokenizer.eos_token_id
            and not text.endswith(self.tokenizer.eos_token)
        ):
            ids.pop()
        return ids

    def _chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise UsageError(
                "data.format: messages and instructions need a chat template, and this tokenizer "
                "has none. Save one in the model's folder (chat_template.jinja), or use format "
                "'prompt' or 'completion'."
            )
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                    **self._kwargs,
                )
            )
        except Exception as error:
            raise RowError(
                "unreadable", f"the chat template refuses this conversation: {error}"
            ) from error


def segments(token_ids: np.ndarray, separator: int | None) -> np.ndarray:
    """[T] int64 which text of a pair a token belongs to, as BERT counts: 1 from after the first separator on, else 0.

    So a pair's segments need not be stored: its tokens show them, which `labelled_ids` makes sure
    of.
    """
    here = token_ids == separator if separator is not None else np.zeros(len(token_ids), bool)
    second: np.ndarray = np.cumsum(here) - here > 0
    return second.astype(np.int64)


def cut(ids: list[int], window_tokens: int) -> list[list[int]]:
    """Windows of at most `window_tokens` ids that overlap by one; a text of fewer than two tokens has none."""
    step = window_tokens - 1
    return [ids[start : start + window_tokens] for start in range(0, max(len(ids) - 1, 0), step)]
