"""A tokenizer's chat template: a conversation becomes one text."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

from ....storage.bounds import parsed
from ....storage.errors import RowError, UsageError
from ....storage.tables.conversations import Message
from ....storage.time_limit import time_limit
from .arguments import CLOCK

Chars = tuple[int, int]
"""Start and end, in characters of a text."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SECONDS = 10.0  # of CPU time, a conversation: they take milliseconds
_WORD = "aVq0x"  # no template writes it by itself


@dataclass(frozen=True, slots=True)
class Chat:
    """What a template is given."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    open: bool = False
    """Whether the assistant is about to answer."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text."""

    text: str
    marked: list[Chars] = field(default_factory=list)
    """What the template marks as written by the assistant; empty: it has no such marks."""


class ChatTemplate:
    """The template of one tokenizer, with the recipe's arguments."""

    def __init__(
        self, tokenizer: Any, arguments: Mapping[str, Any], day: str | None = None
    ) -> None:
        """`day`: what the clock says to the template, as 2026-11-29; None: today."""
        if not tokenizer.chat_template:
            raise UsageError(
                "data.format: messages and instructions need a chat template, and this tokenizer "
                "has none. Save one in the model's folder (chat_template.jinja), or use format "
                "'prompt' or 'completion'."
            )
        self._tokenizer = tokenizer
        names = dict(arguments)
        self._chosen = names.pop("chat_template", None)
        self._documents = names.pop("documents", None)
        self._names = tokenizer.special_tokens_map | names
        if day is not None:
            self._names[CLOCK] = date.fromisoformat(day).strftime
        self._reads_parts = self._tries_parts()

    def render(self, chat: Chat) -> Rendered:
        """The text of a conversation.

        Raises:
            RowError: the template refuses it.
        """
        try:
            return self._rendered(self._with_arguments(self._readable(chat)))
        except UsageError:
            raise
        except Exception as error:
            roles = ", ".join(str(message["role"]) for message in chat.messages)
            raise RowError(
                "unreadable",
                f"the chat template refuses this conversation (roles: {roles}): {error}",
            ) from error

    def _rendered(self, chat: Chat) -> Rendered:
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotation is a str alone

        # A tokenizer may list several templates, one of them for conversations with tools.
        source = self._tokenizer.get_chat_template(self._chosen, chat.tools)
        marks = _MARKS.search(source) is not None
        try:
            with time_limit(_SECONDS):
                texts, marked = render(
                    conversations=[chat.messages],
                    tools=chat.tools,
                    documents=self._documents,
                    chat_template=source,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=chat.open,
                    **self._names,
                )
        except TimeoutError as error:
            raise UsageError(
                f"the chat template comes to no end with a conversation (within {_SECONDS:g} s of "
                "CPU time). Save another one in the model's folder (chat_template.jinja)."
            ) from error
        return Rendered(texts[0], [*marked[0]] if marks else [])

    def _readable(self, chat: Chat) -> Chat:
        """A conversation as this template can read it.

        Parts of a text are joined by newlines where it knows no parts, as vLLM does. Where it
        cannot read a message without a content, the content is an empty text.
        """
        if not self._reads_parts:
            chat = _with_contents(chat, list, lambda parts: "\n".join(p["text"] for p in parts))
        if any(message.get("content", "") is None for message in chat.messages):
            if not self._reads_null(chat):
                return _with_contents(chat, type(None), lambda _: "")
        return chat

    def _with_arguments(self, chat: Chat) -> Chat:
        """Arguments of calls as objects, where this template refuses JSON or writes JSON of it."""
        texts = [a for call in _functions(chat) if isinstance(a := call.get("arguments"), str)]
        if not texts:
            return chat
        try:
            text = self._rendered(chat).text
        except UsageError:
            raise
        except Exception:
            return _with_objects(chat)
        twice = any(
            json.dumps(t, ensure_ascii=False) in text or json.dumps(t) in text for t in texts
        )
        return _with_objects(chat) if twice else chat

    def _reads_null(self, chat: Chat) -> bool:
        """Whether a content of null is neither refused nor written as the word None."""
        word = _with_contents(chat, type(None), lambda _: "None")
        try:
            return self._rendered(chat).text != self._rendered(word).text
        except UsageError:
            raise
        except Exception:
            return False

    def _tries_parts(self) -> bool:
        """Whether a content that is a list of parts is written as their text."""
        parts = [{"type": "text", "text": _WORD}]
        try:
            text = self._rendered(Chat([{"role": "user", "content": parts}])).text
        except UsageError:
            raise
        except Exception:
            return False
        return _WORD in text and "'text'" not in text and '"text"' not in text


def _functions(chat: Chat) -> list[dict[str, Any]]:
    """What the calls of a conversation call."""
    calls = [call for m in chat.messages for call in m.get("tool_calls") or ()]
    found = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [function for function in found if isinstance(function, dict)]


def _with_objects(chat: Chat) -> Chat:
    """The conversation with the arguments of its calls read from JSON; no JSON stays a text."""
    changed = replace(chat, messages=copy.deepcopy(chat.messages))
    for function in _functions(changed):
        if isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                function["arguments"] = parsed(function["arguments"])
    return changed


def _with_contents(chat: Chat, kind: type, change: Callable[[Any], str]) -> Chat:
    """The conversation with every content of a kind changed."""
    messages = [
        m | {"content": change(m["content"])} if isinstance(m.get("content", ""), kind) else m
        for m in chat.messages
    ]
    return replace(chat, messages=messages)
