"""What a chat template leaves out: a message is refused, a field of messages is counted and said once."""

from collections import Counter
from dataclasses import replace

from ....storage.errors import RowError
from .template import Chat, ChatTemplate

_KNOWN = {"role", "content", "weight"}  # the last one says what is scored


class Unread:
    """Found by rendering a conversation without it: the text is the same."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._read: set[str] = set()
        self.counts: Counter[str] = Counter()
        """Field -> conversations that have it in vain; no field that any of them was read of."""

    def look(self, chat: Chat, text: str) -> None:
        """Look for what a conversation's text has nothing of.

        Raises:
            RowError: a whole message is left out.
        """
        for number, message in enumerate(chat.messages):
            content = message.get("content")
            if isinstance(content, str) and content.strip() not in text:
                self._refuse_left_out(chat, number, text)
        names = {name for message in chat.messages for name in message} - _KNOWN
        for name in sorted(names - self._read):
            fewer = [{k: v for k, v in m.items() if k != name} for m in chat.messages]
            self._note(name, unread=self._same(replace(chat, messages=fewer), text))
        if chat.tools is not None and "tools" not in self._read:
            self._note("tools", unread=self._same(replace(chat, tools=None), text))

    def _refuse_left_out(self, chat: Chat, number: int, text: str) -> None:
        others = [*chat.messages[:number], *chat.messages[number + 1 :]]
        if others and self._same(replace(chat, messages=others), text):
            raise RowError(
                "unreadable",
                f"the chat template leaves out messages[{number}], whose role is "
                f"{chat.messages[number]['role']!r}",
            )

    def _note(self, name: str, *, unread: bool) -> None:
        if unread:
            self.counts[name] += 1
        else:
            self._read.add(name)
            del self.counts[name]

    def _same(self, chat: Chat, text: str) -> bool:
        try:
            return self._template.render(chat).text == text
        except RowError:
            return False
