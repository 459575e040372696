"""Conversations as token ids, with the tokens of the assistant's turns.

This module also gathers what a run has to say of them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ....storage.errors import RowError
from ....storage.tables.conversations import Conversation
from ....storage.tables.spans import spans_before
from ....storage.words import counted
from .ends import Ends
from .left_out import LeftOut
from .long_text import refuse_long
from .template import Chat, ChatTemplate, Rendered
from .tokens import TurnTokens
from .turns import Turns, assistant_turns, weighed
from .unread import Unread

Ids = tuple[list[int], np.ndarray]
"""[T] token ids, and [S, 2] start and tokens of each turn of the assistant."""


def no_spans() -> np.ndarray:
    """[0, 2]: nothing is scored."""
    return np.empty((0, 2), np.int64)


class ChatRenderer:
    """Renders conversations by one tokenizer's template."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any], day: str | None) -> None:
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, arguments, day)
        self._unread = Unread(self._template)
        self._ends = Ends(tokenizer, self._template)
        self._left_out = LeftOut()
        self._moved = 0

    def prompt(self, conversation: Conversation, *, turns: bool = False) -> Ids:
        """A conversation that the assistant is to answer.

        `turns`: say where its turns are; else none are said.
        """
        chat = Chat(conversation.messages, conversation.tools, open=True)
        return self._ids(chat, weighed(chat, assistant_turns(chat)) if turns else [])

    def whole(self, conversation: Conversation, *, last: bool) -> Ids:
        """A conversation that was held to its end, in one rendering.

        `last`: of its turns, the answer alone.

        Raises:
            RowError: the template refuses it, or no turn can be bounded.
        """
        chat = Chat(conversation.turns, conversation.tools)
        turns = assistant_turns(chat)
        turns = weighed(chat, turns[-1:] if last else turns)
        if not turns:
            raise RowError("unreadable", "no turn of the assistant is to be scored: weight is 0")
        ids, spans = self._ids(chat, turns)
        if not len(spans):
            raise RowError("unreadable", "no turn of the assistant can be found in its rendering")
        return ids, spans

    def unended(self, conversation: Conversation, *, last: bool) -> Ids:
        """The same of an answer that was cut short: its last token is the end.

        Raises:
            RowError: as `whole`; or the template writes another answer than was given.
        """
        chat = Chat(conversation.turns, conversation.tools)
        text, said = self._template.render(chat).text, str(chat.messages[-1]["content"]).strip()
        start = text.rfind(said)
        if start < 0:
            raise RowError("unreadable", "the template changes an answer that was cut short")
        ids, spans = self.whole(conversation, last=last)
        first, tokens = TurnTokens(self.tokenizer, text).span((start, start + len(said)))
        return ids[: first + tokens], spans_before(spans, first + tokens)

    def notes(self) -> list[str]:
        """What was left out or moved, a sentence each."""
        said = self._unread.notes() + self._left_out.notes()
        if self._moved:
            said.append(
                f"{counted(self._moved, 'turn begins', 'turns begin')} inside a token, which is "
                "scored with what it holds of the text before"
            )
        return said

    def _ids(self, chat: Chat, turns: list[int]) -> Ids:
        rendered = self._template.render(chat)
        refuse_long(rendered.text, why="a conversation is read whole")
        self._unread.look(chat, rendered.text)
        try:
            tokens = TurnTokens(self.tokenizer, rendered.text)
        except Exception as error:
            raise RowError("unreadable", f"the tokenizer fails on this text: {error}") from error
        spans = self._spans(chat, rendered, tokens, turns)
        self._moved += tokens.moved
        return tokens.ids, np.array(spans, np.int64).reshape(-1, 2)

    def _spans(
        self, chat: Chat, rendered: Rendered, tokens: TurnTokens, turns: list[int]
    ) -> list[tuple[int, int]]:
        all_turns = Turns(self._template, chat, rendered)
        found = {n: turn for n in turns if (turn := all_turns.find(n))}
        ends = self._ends.find(chat, rendered.text, found)
        spans: list[tuple[int, int]] = []
        for number in turns:
            if number not in found:
                cause = "unmarked" if all_turns.marked else "unbounded"
                self._left_out.note(cause, chat, number)
                continue
            turn = found[number]
            start, count = tokens.span((turn.start, ends.get(number, turn.end)))
            if not count or (spans and start < sum(spans[-1])):
                self._left_out.note("joined", chat, number)
                continue
            if number not in ends:
                self._left_out.note("endless", chat, number)
            spans.append((start, count))
        return spans
