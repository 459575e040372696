"""Turns of the assistant that are not scored as they should be.

They are counted by cause, and the first one is named.
"""

import json
from collections import Counter

from .template import Chat

_SAID = {
    "unbounded": "turns of the assistant are not scored: no rendering proves which part of the "
    "text they are. Mark what the assistant writes with {% generation %} in the chat template",
    "unmarked": "turns of the assistant are not scored: the chat template marks others with "
    "{% generation %}, and not these",
    "joined": "turns of the assistant are not scored: all their tokens are shared with another "
    "turn, or nothing precedes them",
    "endless": "turns of the assistant are scored without an end: the chat template shows none, so "
    "the student does not learn to stop there. Let it end turns with a special token",
}


class LeftOut:
    """Counts of one run."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def note(self, cause: str, chat: Chat, number: int) -> None:
        """Count a turn, by what is the cause."""
        self._counts[cause] += 1
        if cause not in self._first:
            begins = _words(chat, 0)
            place = f"messages[{number}], {_words(chat, number)}"
            self._first[cause] = f"{place}, of the conversation that begins with {begins}"

    def notes(self) -> list[str]:
        """A sentence for each cause."""
        return [
            f"{self._counts[cause]} {said} (the first: {self._first[cause]})"
            for cause, said in _SAID.items()
            if self._counts[cause]
        ]


def _words(chat: Chat, number: int) -> str:
    message = chat.messages[number]
    said = message.get("content") or message.get("tool_calls") or ""
    return repr((said if isinstance(said, str) else json.dumps(said))[:60])
