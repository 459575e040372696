"""What ends a turn of the assistant: the text between the turn and the next message's header.

It shows after a turn that nothing follows, where there is no next header:

    <user>hi<end><assistant>hello<end>         the end: <end>
    Q: hi A: hello                             none, though Q follows in a longer conversation

A special token, maybe after white space, ends each turn by itself; so turns that call may end with
another token than the last one. A text of no special token must be the same after every turn.
"""

import re
from collections.abc import Mapping
from typing import Any

from ....storage.errors import RowError
from .bounds import Bounds
from .template import Chat, ChatTemplate
from .turns import Turn


class Ends:
    """The ends of one template's turns."""

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self._template = template
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        if tokenizer.bos_token != tokenizer.eos_token:
            special.discard(tokenizer.bos_token)  # it begins something
        self._special = tuple(sorted(special, key=len, reverse=True))
        either = "|".join(map(re.escape, self._special)) or "(?!)"
        self._pattern = re.compile(rf"\s*(?:{either})")

    def find(self, chat: Chat, text: str, turns: Mapping[int, Turn]) -> dict[int, int]:
        """Message -> where its turn has ended, for those turns whose end can be told."""
        found = {n: turn.end for n, turn in turns.items() if self._closed(chat, text, n, turn)}
        still = {n: turn.end for n, turn in turns.items() if n not in found}
        return found | self._after(chat, text, still) if still else found

    def _closed(self, chat: Chat, text: str, number: int, turn: Turn) -> bool:
        """Whether a template's mark holds the end too: more than the content."""
        part = text[turn.start : turn.end].rstrip()
        content = chat.messages[number].get("content")
        said = content.strip() if isinstance(content, str) else ""
        ends = not part.endswith(said) if said else part.endswith(self._special)
        return turn.marked and ends

    def _after(self, chat: Chat, text: str, turns: Mapping[int, int]) -> dict[int, int]:
        last = max(turns)
        cut = Chat(chat.messages[: last + 1], chat.tools)
        closing = text[turns[last] :] if cut == chat else self._closing(cut, last)
        if self._pattern.match(closing):
            matches = {n: self._pattern.match(text, end) for n, end in turns.items()}
            return {n: match.end() for n, match in matches.items() if match}
        same = all(text.startswith(closing, end) for end in turns.values())
        end = closing.rstrip()
        if not end or not same or not self._goes_on(cut):
            return {}
        return {n: start + len(end) for n, start in turns.items()}

    def _closing(self, cut: Chat, last: int) -> str:
        """What follows the last turn of a conversation that is cut after it."""
        text = self._render(cut)
        found = Bounds(self._template, cut, text).find(last, exact=False)
        return text[found[1] :] if found else ""

    def _goes_on(self, cut: Chat) -> bool:
        """Whether only the next header follows a closed conversation: it has no closing line."""
        closed = self._render(cut)
        opened = self._render(Chat(cut.messages, cut.tools, open=True))
        return bool(closed) and opened.startswith(closed)

    def _render(self, chat: Chat) -> str:
        """The text; empty where the template refuses it."""
        try:
            return self._template.render(chat).text
        except RowError:
            return ""
