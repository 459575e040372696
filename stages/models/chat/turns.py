"""Where the turns of the assistant are in the one rendering of a conversation, in characters.

Turns of many templates are no prefixes of one another, so nothing is cut out of shorter renderings.
A template that marks what the assistant writes ({% generation %}) is believed. Else the whole is
rendered again with another word in place of a turn, and once more with a second word:

    whole       <user>hi<end><assistant>hello there<end>
    word a      <user>hi<end><assistant>aVq0x<end>
    word b      <user>hi<end><assistant>Zk1Wb<end>
                common head ............           ..... common tail

What is neither head nor tail is the turn. A template that writes the words differently, or twice,
tells nothing: such a turn is not bounded.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ....storage.errors import RowError
from .template import Chars, Chat, ChatTemplate, Rendered

# Neither begin nor end alike, of both cases, and without anything that a template cuts at.
_WORDS = ("aVq0x", "Zk1Wb")


class Turn(NamedTuple):
    """A turn of the assistant in a text."""

    start: int
    end: int
    closed: bool
    """Whether what ends the turn is in it; else the end token that follows belongs to it too."""


def assistant_turns(chat: Chat) -> list[int]:
    """Which messages are the assistant's."""
    return [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]


class Turns:
    """The turns of one conversation."""

    def __init__(self, template: ChatTemplate, chat: Chat, rendered: Rendered) -> None:
        self._template, self._chat, self._text = template, chat, rendered.text
        self._marked = self._trusted(rendered.marked)

    def find(self, number: int) -> Turn | None:
        """Where a message of the assistant is; None where that cannot be told."""
        if number in self._marked:
            start, end = self._marked[number]
            return Turn(start, end, closed=True)
        bounds = self._bounds(number)
        opened = self._opened(number)
        if bounds is None:
            # Of the last turn the prompt is enough: all that follows it is the answer.
            last = number == len(self._chat.messages) - 1 and not self._chat.open
            end = len(self._text.rstrip())
            return Turn(opened, end, closed=True) if last and opened else None
        start, end = bounds
        # What the prompt leaves to the assistant is the assistant's: <think>, say.
        return Turn(opened or start, end, closed=False)

    def _trusted(self, marked: list[Chars]) -> dict[int, Chars]:
        """Message -> its marks, if there is one for each turn and the turn's text is inside."""
        turns = assistant_turns(self._chat)
        if len(turns) != len(marked):
            return {}
        found = dict(zip(turns, marked, strict=True))
        for number, (start, end) in found.items():
            content = self._chat.messages[number].get("content")
            if start == end or (
                isinstance(content, str) and content.strip() not in self._text[start:end]
            ):
                return {}
        return found

    def _bounds(self, number: int) -> Chars | None:
        """Where the whole differs from itself with other words in place of a turn."""
        try:
            a, b = (self._with(number, word) for word in _WORDS)
        except RowError:
            return None
        head, tail = shared(a, b), _tail(a, b)
        if (a[head : len(a) - tail], b[head : len(b) - tail]) != _WORDS:
            return None
        head, tail = min(head, shared(a, self._text)), min(tail, _tail(a, self._text))
        return head, max(head, len(self._text) - tail)

    def _with(self, number: int, word: str) -> str:
        messages = [*self._chat.messages]
        messages[number] = {"role": "assistant", "content": word}
        return self._template.render(replace(self._chat, messages=messages)).text

    def _opened(self, number: int) -> int | None:
        """Where the prompt of a turn ends, if the whole begins with that prompt."""
        prompt = Chat(self._chat.messages[:number], self._chat.tools, open=True)
        try:
            text = self._template.render(prompt).text if number else ""
        except RowError:
            return None
        return len(text) if text and self._text.startswith(text) else None


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two texts, or two lists of ids, begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _tail(a: str, b: str) -> int:
    return shared(a[::-1], b[::-1])
