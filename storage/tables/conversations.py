"""Conversations in rows of `prompts`: role and text in typed columns, the rest as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bounds import parsed
from ..keys import canonical_json

Message = dict[str, Any]
_PLAIN = {"role", "content"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What a chat template renders."""

    messages: list[Message]
    """The turns before the answer."""
    answer: Message | None = None
    """The turn of the assistant that was given; None: none was."""
    tools: list[dict[str, Any]] | None = None
    """The tools that it offers; None: none."""

    @property
    def turns(self) -> list[Message]:
        """All messages, the answer last."""
        return self.messages if self.answer is None else [*self.messages, self.answer]


def message_columns(messages: Sequence[Message]) -> dict[str, Any]:
    """The columns `messages` and `message_fields`.

    The second is None where every message is a role and a text.
    """
    fields = [_fields(message) for message in messages]
    return {
        "messages": [{"role": m["role"], "content": _text(m)} for m in messages],
        "message_fields": fields if any(fields) else None,
    }


def answer_columns(answer: Message | None) -> dict[str, Any]:
    """The columns `completion` and `completion_fields` of a given answer."""
    if answer is None:
        return {"completion": None, "completion_fields": None}
    return {"completion": _text(answer), "completion_fields": _fields(answer)}


def conversation(row: Mapping[str, Any]) -> Conversation:
    """The conversation of a row of `prompts` that has messages."""
    fields = row.get("message_fields") or [None] * len(row["messages"])
    messages = [
        _message(m["role"], m["content"], more)
        for m, more in zip(row["messages"], fields, strict=True)
    ]
    tools = row.get("tools")
    answer = None
    if row.get("completion") is not None:
        answer = _message("assistant", row["completion"], row.get("completion_fields"))
    return Conversation(
        messages=messages, answer=answer, tools=None if tools is None else parsed(tools)
    )


def as_json(value: Any) -> str:
    """JSON with one spelling for equal values."""
    return canonical_json(value).decode()


def _fields(message: Message) -> str | None:
    """What a message has beside a role and a text; a content that is no text is one of them."""
    more = {name: value for name, value in message.items() if name not in _PLAIN}
    if "content" in message and not isinstance(message["content"], str):
        more["content"] = message["content"]
    if "content" not in message:
        more["content"] = None
    return as_json(more) if more else None


def _text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _message(role: str, content: str, more: str | None) -> Message:
    return {"role": role, "content": content, **(parsed(more) if more else {})}
