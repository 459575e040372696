"""Where the turns of the assistant are in the one rendering of a conversation, in characters.

Turns of many templates are no prefixes of one another, so nothing is cut out of shorter renderings.
A template that marks what the assistant writes ({% generation %}) is believed, also in which turns
it marks, if no mark holds what another side says. Else a turn is what `bounds.py` proves.
"""

from functools import cached_property
from typing import NamedTuple

from ....storage.errors import RowError
from .at_once import FEWEST, bounded_at_once
from .bounds import Bounds
from .template import Chars, Chat, ChatTemplate, Rendered


class Turn(NamedTuple):
    """A turn of the assistant in a text."""

    start: int
    end: int
    marked: bool
    """Whether the template marks it; maybe with its end."""


def assistant_turns(chat: Chat) -> list[int]:
    """Which messages are the assistant's."""
    return [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]


def weighed(chat: Chat, turns: list[int]) -> list[int]:
    """Those turns that are scored: `weight`, a field of OpenAI's, is 0 for the others.

    Raises:
        RowError: a weight is neither 0 nor 1.
    """
    weights = {n: chat.messages[n].get("weight") for n in turns}
    for number, weight in weights.items():
        if weight not in (None, 0, 1):
            raise RowError(
                "unreadable",
                f"messages[{number}].weight is {weight!r}, expected 0 (not scored) or 1",
            )
    return [n for n in turns if weights[n] != 0]


class Turns:
    """The turns of one conversation."""

    def __init__(self, template: ChatTemplate, chat: Chat, rendered: Rendered) -> None:
        self._template, self._chat, self._text = template, chat, rendered.text
        self._bounds = Bounds(template, chat, rendered.text)
        self.marked = self._trusted([mark for mark in rendered.marked if mark[0] < mark[1]])
        """Message -> what the template marks of it; empty: it has no marks that can be believed."""

    def find(self, number: int) -> Turn | None:
        """Where a message of the assistant is; None where that cannot be told."""
        if number in self.marked:
            start, end = self.marked[number]
            return Turn(start, end, marked=True)
        if self.marked:
            return None
        before_last = number != assistant_turns(self._chat)[-1]
        if before_last and number in self._at_once:
            return Turn(*self._at_once[number], marked=False)
        # Of the last turn the prompt is enough: all that follows is the answer, however written.
        last = number == len(self._chat.messages) - 1 and not self._chat.open
        found = self._bounds.find(number, exact=not last)
        return Turn(*found, marked=False) if found else None

    @cached_property
    def _at_once(self) -> dict[int, Chars]:
        """The turns before the last one, which many templates write otherwise."""
        turns = assistant_turns(self._chat)[:-1]
        if len(turns) < FEWEST or turns[0] == 0:
            return {}
        found = bounded_at_once(self._template, self._chat, self._text, turns)
        return {n: chars for n, chars in found.items() if not self._bounds.holds_another(chars)}

    def _trusted(self, marks: list[Chars]) -> dict[int, Chars]:
        """Message -> its mark. Fewer marks than turns: the template chooses which are scored."""
        turns = assistant_turns(self._chat)
        if not marks or len(marks) > len(turns):
            return {}
        if any(self._bounds.holds_another(mark) for mark in marks):
            return {}
        if len(marks) < len(turns):
            return self._chosen(marks, turns)
        found = dict(zip(turns, marks, strict=True))
        return found if all(self._in_mark(n, mark) for n, mark in found.items()) else {}

    def _in_mark(self, number: int, mark: Chars) -> bool:
        content = self._chat.messages[number].get("content")
        return not isinstance(content, str) or content.strip() in self._text[slice(*mark)]

    def _chosen(self, marks: list[Chars], turns: list[int]) -> dict[int, Chars]:
        """The turns that marks overlap with; none unless each mark has one."""
        found: dict[int, Chars] = {}
        for number in turns:
            start, end = self._bounds.find(number) or (0, 0)
            over = [mark for mark in marks if mark[0] < end and start < mark[1]]
            if over:
                found[number] = over[0]
        return found if len(set(found.values())) == len(marks) else {}
