"""Where a turn of the assistant is in a rendering, in characters.

It is between what stands before it and after it.

The conversation is rendered again with another word as the turn's content, and with a second one:

    whole       <user>hi<end><assistant>hello there<end>
    word a      <user>hi<end><assistant>aVq0x<end>
    word b      <user>hi<end><assistant>Zk1Wb<end>
                before ............          ..... after

The whole must begin with just that before, and end with just that after; else the word changed
what other messages are written as, and the turn is looked for in the conversation cut after it,
whose text the whole must begin with. A turn that no text proves is not bounded.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ....storage.errors import RowError
from ....storage.tables.conversations import Message
from .template import Chars, Chat, ChatTemplate

# Neither begin nor end alike, of both cases, and without anything that a template cuts at.
_WORDS = ("aVq0x", "Zk1Wb")
_NAMING = ("role", "name")  # what stands in a message's header


class _Around(NamedTuple):
    """The text before a replaced text, and after it."""

    before: str
    after: str


class Bounds:
    """The turns of one conversation, each between two texts that do not change with it."""

    def __init__(self, template: ChatTemplate, chat: Chat, text: str) -> None:
        self._template, self._chat, self._text = template, chat, text
        self._others: dict[int, str | None] = {}

    def find(self, number: int, *, exact: bool = True) -> Chars | None:
        """Where a message of the assistant is, what it calls and thinks included.

        None: that cannot be told. With `exact` its content must be written as it is, once.
        """
        found = self._proved(number, exact)
        if found is None and (cut := self.cut(number)):
            found = cut._proved(number, exact)
        return found

    def cut(self, number: int) -> "Bounds | None":
        """The conversation up to a message, if the whole begins with its text."""
        chat = Chat(self._chat.messages[: number + 1], self._chat.tools)
        text = self._render(chat) if chat != self._chat else None
        return Bounds(self._template, chat, text) if text and self._text.startswith(text) else None

    def holds_another(self, chars: Chars) -> bool:
        """Whether what another side says is inside: the part changes with it."""
        inside = self._text[slice(*chars)]
        reached = self._text[chars[0] : chars[1] + 1]  # an empty content may begin just after it
        for number, message in enumerate(self._chat.messages):
            content = message.get("content") or ""
            if message["role"] == "assistant":
                continue
            said = [content] if isinstance(content, str) else [part["text"] for part in content]
            if any(words.strip() in inside for words in said):
                text = self._replaced(number)
                part = inside if any(words.strip() for words in said) else reached
                if text is not None and part not in text:
                    return True
        return False

    def _proved(self, number: int, exact: bool) -> Chars | None:
        found = self._between(number, exact)
        if found is None or self.holds_another(found) or self._misses_a_call(number, found):
            return None
        return found

    def _misses_a_call(self, number: int, chars: Chars) -> bool:
        """Whether a call is written, and not inside: before the content, say."""
        part = self._text[slice(*chars)]
        calls = self._chat.messages[number].get("tool_calls") or []
        functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
        names = [str(function.get("name")) for function in functions if isinstance(function, dict)]
        return any(name in self._text and name not in part for name in names)

    def _replaced(self, number: int) -> str | None:
        """The text with another word in place of a message's content."""
        if number not in self._others:
            message = self._chat.messages[number] | {"content": _WORDS[0]}
            self._others[number] = self._render(self._with(number, message))
        return self._others[number]

    def _between(self, number: int, exact: bool) -> Chars | None:
        message = self._chat.messages[number]
        # Without its calls, all that follows the word is what follows the turn.
        bare = self._around(number, {k: message[k] for k in _NAMING if k in message}, exact=exact)
        if bare is None or not self._text.endswith(bare.after):
            return None
        start, end = self._start(number, bare), len(self._text) - len(bare.after)
        return (start, end) if start is not None and start < end else None

    def _start(self, number: int, bare: _Around) -> int | None:
        messages, tools = self._chat.messages[:number], self._chat.tools
        # What the prompt leaves to the assistant is the assistant's: <think>, say.
        opened = self._render(Chat(messages, tools, open=True)) if number else None
        if opened and self._text.startswith(opened):
            return len(opened)
        message = self._chat.messages[number]
        kept = self._around(number, message)
        thought = self._around(number, message, field="reasoning_content")
        found = [around.before for around in (bare, kept, thought) if around]
        proved = [len(before) for before in found if self._text.startswith(before)]
        if proved:
            return min(proved)
        # The turn itself differs before its content: <think> that the content brought, say.
        own = self._render(Chat(messages, tools)) if number else None
        start = max((shared(before, self._text) for before in found), default=0)
        return start if own and self._text.startswith(own) and start > len(own) else None

    def _around(
        self, number: int, message: Message, *, field: str = "content", exact: bool = True
    ) -> _Around | None:
        """What stands around a field of a message, whichever word it is.

        None: the field is not written as it is.
        """
        if field != "content" and not isinstance(message.get(field), str):
            return None
        a, b = (self._render(self._with(number, message | {field: word})) for word in _WORDS)
        if a is None or b is None:
            return None
        head = shared(a, b)
        tail = shared(a[head:][::-1], b[head:][::-1])
        written = (a[head : len(a) - tail], b[head : len(b) - tail])
        if exact and written != _WORDS:
            return None
        if any(
            word.lower() not in part.lower() for word, part in zip(_WORDS, written, strict=True)
        ):
            return None
        return _Around(a[:head], a[len(a) - tail :])

    def _with(self, number: int, message: Message) -> Chat:
        messages = [*self._chat.messages]
        messages[number] = message
        return replace(self._chat, messages=messages)

    def _render(self, chat: Chat) -> str | None:
        try:
            return self._template.render(chat).text
        except RowError:
            return None


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two texts, or two lists of ids, begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
