"""Conversations as people keep them become messages: OpenAI's, ShareGPT's and Alpaca's.

Nothing of a conversation is dropped.
"""

from typing import Any

from ...storage.bounds import parsed
from ...storage.errors import RowError
from ...storage.tables.conversations import Conversation, Message
from .fields import checked_string, checked_text, checked_words, missing

# ShareGPT's names; a function_call is a turn of the assistant whose value is the call.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
} | {role: role for role in ("system", "user", "assistant", "tool")}

_NOTHING: tuple[Any, ...] = ("", [], {})


def chat(record: dict[str, Any]) -> Conversation:
    """A record of format `messages`: a list of {role, content}, or of {from, value}."""
    found = record["messages"]
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise RowError("unreadable", "messages must be a list of {role, content}")
    messages = [_message(message, f"messages[{n}]") for n, message in enumerate(found)]
    messages = _with_system(record, messages)
    # The last turn of the assistant is the answer to the others.
    answered = messages and messages[-1]["role"] == "assistant"
    answer = messages.pop() if answered else None
    if not messages:
        raise RowError("empty", "the conversation has no message to answer")
    return Conversation(messages=messages, answer=answer, tools=_tools(record.get("tools")))


def alpaca(record: dict[str, Any]) -> Conversation:
    """A record of format `instruction`: instruction and input are the last question."""
    content = checked_words(record["instruction"], "instruction")
    if not missing(record.get("input")):
        content += "\n" + checked_text(record["input"], "input")
    question = {"role": "user", "content": content}
    messages = _with_system(record, [*_history(record.get("history")), question])
    output = record.get("output")
    if missing(output):
        return Conversation(messages=messages)
    answer = {"role": "assistant", "content": checked_words(output, "output")}
    return Conversation(messages=messages, answer=answer)


def _message(message: dict[str, Any], name: str) -> Message:
    if "role" not in message and "from" in message:
        message = _of_sharegpt(message, name)
    # Tables have every field in every row: what is null there is not there.
    found = {key: value for key, value in message.items() if value == "" or not missing(value)}
    role = found.pop("role", None)
    if missing(role):
        raise RowError("empty", f"{name}.role is empty")
    role = checked_string(role, f"{name}.role")
    content = found.pop("content", None)
    if isinstance(content, list):
        content = [_part(part, f"{name}.content[{n}]") for n, part in enumerate(content)]
    elif not missing(content):
        content = checked_text(content, f"{name}.content")
    # A call of a tool, or thinking, needs no text beside it; an empty list of calls is none.
    if _blank(content) and all(value in _NOTHING for value in found.values()):
        reason = "unreadable" if content is None else "empty"
        raise RowError(reason, f"{name} has no content, and nothing in place of it")
    return {"role": role, "content": content, **found}


def _blank(content: str | list[dict[str, str]] | None) -> bool:
    if isinstance(content, list):
        return all(_blank(part["text"]) for part in content)
    return content is None or not content.strip()


def _part(part: Any, name: str) -> dict[str, Any]:
    """A part of a message's content, whose text is text."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise RowError(
            "unreadable", f"{name} is of type {kind!r}; only parts of type 'text' are read"
        )
    return {**part, "text": checked_text(part.get("text"), f"{name}.text")}


def _of_sharegpt(message: dict[str, Any], name: str) -> Message:
    found = dict(message)
    sender = checked_text(found.pop("from"), f"{name}.from")
    role = _ROLES.get(sender)
    if role is None:
        raise RowError(
            "unreadable", f"{name}.from is {sender!r}, expected one of {', '.join(_ROLES)}"
        )
    value = found.pop("value", None)
    if sender == "function_call":
        calls = _json(checked_text(value, f"{name}.value"), f"{name}.value")
        calls = calls if isinstance(calls, list) else [calls]
        found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        value = None
    return {"role": role, "content": value, **found}


def _history(pairs: Any) -> list[Message]:
    """Alpaca's `history`: questions and answers of before."""
    pairs = pairs or []
    # A text or an object of two things can be unpacked as well, and is no pair.
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise RowError("unreadable", "history must be a list of [question, answer]")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": checked_words(text, f"history[{n}]")}
        for n, turn in enumerate(pairs)
        for role, text in zip(roles, turn, strict=True)
    ]


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2


def _with_system(record: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, after the column `system`."""
    system = record.get("system")
    if missing(system):
        return messages
    if messages and messages[0]["role"] == "system":
        raise RowError("unreadable", "system stands in a column and in messages[0]. Leave one out")
    return [{"role": "system", "content": checked_words(system, "system")}, *messages]


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools that a conversation offers: a list of objects, or that as JSON."""
    tools = _json(value, "tools") if isinstance(value, str) and value else value
    if missing(tools) or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("unreadable", "tools must be a list of objects, or that as JSON")
    return tools


def _json(text: str, name: str) -> Any:
    try:
        return parsed(text)
    except ValueError as error:
        raise RowError("unreadable", f"{name} is not JSON ({error})") from error
