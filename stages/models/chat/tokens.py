"""From turns in a text to tokens: which of its token ids each turn of the assistant is."""

from typing import Any

import numpy as np

from .bounds import shared
from .template import Chars


class TurnTokens:
    """A text's token ids, and which of them its turns are."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        fast = bool(tokenizer.is_fast)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
        self.ids: list[int] = list(found["input_ids"])
        """[T]"""
        # [T, 2] the characters of each token. Tokens inside one character all have that one.
        self._chars = np.array(found["offset_mapping"], np.int64).reshape(-1, 2) if fast else None
        self.moved = 0
        """Turns that begin inside a token, so that a piece of what stands before is scored too."""

    def span(self, turn: Chars) -> tuple[int, int]:
        """Index of the first token of a turn, and how many tokens it has."""
        first, after = self._within(*turn)
        first = max(first, 1)  # nothing precedes the first token of a text
        return first, max(after - first, 0)

    def _within(self, start: int, end: int) -> tuple[int, int]:
        """The first token of some characters, and the first token after them."""
        if self._chars is None:
            return self._shared(start), self._shared(end)
        starts, ends = self._chars.T
        first = int(np.count_nonzero(ends <= start))
        after = max(first, int(np.count_nonzero(starts < end)))
        self.moved += int(first < after and starts[first] < start)
        return first, after

    def _shared(self, end: int) -> int:
        """How many tokens the text up to a character has in common with the whole.

        It is for tokenizers that do not say which characters a token is.
        """
        ids = self._tokenizer(self._text[:end], add_special_tokens=False)["input_ids"]
        return shared(ids, self.ids)
