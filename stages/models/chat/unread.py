"""What a chat template leaves out.

A message is refused, a field of messages is counted and said once.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

from ....storage.errors import RowError
from ....storage.tables.conversations import Message
from ....storage.words import counted
from .template import Chat, ChatTemplate

_KNOWN = {"role", "content", "weight"}  # the last one says what is scored


class Unread:
    """Found by rendering a conversation without it: the text is the same."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._having: Counter[str] = Counter()
        self._in_vain: Counter[str] = Counter()

    def look(self, chat: Chat, text: str) -> None:
        """Look for what a conversation's text has nothing of.

        Raises:
            RowError: a whole message is left out, or nothing of one is written.
        """
        said = "\0".join(part for message in chat.messages for part in _parts(message))
        for number, message in enumerate(chat.messages):
            parts = _parts(message)
            # Words that others say too must be there as often as all say them.
            if any(text.count(part) < said.count(part) for part in parts):
                self._refuse_left_out(chat, number, text)
            if not parts and message["role"] != "tool":  # a tool may answer nothing
                self._refuse_empty(chat, number, text)
        names = {name for message in chat.messages for name in message} - _KNOWN
        for name in sorted(names):
            fewer = [{k: v for k, v in m.items() if k != name} for m in chat.messages]
            self._note(name, unread=self._same(replace(chat, messages=fewer), text))
        if chat.tools is not None:
            self._note("tools", unread=self._same(replace(chat, tools=None), text))

    def notes(self) -> list[str]:
        """A sentence for each field that conversations have in vain."""
        return [self._said(name) for name in sorted(self._in_vain)]

    def _said(self, name: str) -> str:
        count, having = self._in_vain[name], self._having[name]
        said = f"the chat template does not read {name!r}"
        if count == having:
            return f"{said}, which {counted(count, 'conversation has', 'conversations have')}"
        return f"{said} in {count:,} of the {having:,} conversations that have it"

    def _refuse_left_out(self, chat: Chat, number: int, text: str) -> None:
        others = [*chat.messages[:number], *chat.messages[number + 1 :]]
        if others and self._same(replace(chat, messages=others), text):
            raise RowError(
                "unreadable",
                f"the chat template leaves out messages[{number}], whose role is "
                f"{chat.messages[number]['role']!r}",
            )

    def _refuse_empty(self, chat: Chat, number: int, text: str) -> None:
        """A message that has no words: what it calls or thinks must be in the text."""
        messages, message = [*chat.messages], chat.messages[number]
        more = {k: v for k, v in message.items() if k not in _KNOWN and v}
        messages[number] = {k: v for k, v in message.items() if k not in more}
        if not more or self._same(replace(chat, messages=messages), text):
            has = f"its {', '.join(more)} not read by the chat template" if more else "no calls"
            raise RowError(
                "empty", f"messages[{number}] has no words and {has}: nothing is written"
            )

    def _note(self, name: str, *, unread: bool) -> None:
        self._having[name] += 1
        self._in_vain += Counter({name: int(unread)})  # keeps what is above 0

    def _same(self, chat: Chat, text: str) -> bool:
        try:
            return self._template.render(chat).text == text
        except RowError:
            return False


def _parts(message: Message) -> list[str]:
    """The texts that a message says, without blanks around."""
    content: Any = message.get("content")
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]
