"""The formats of `data`: how a record of each becomes a row of `prompts`."""

import json
from collections.abc import Sequence
from typing import Any

from ...storage.errors import RowError
from ...storage.keys import content_key
from ...storage.tables.conversations import (
    Conversation,
    answer_columns,
    as_json,
    conversation,
    message_columns,
)
from ..models.fit.classes import NO_LABEL, label_index
from ..recipe.sections import Data
from .conversations import alpaca, chat
from .fields import checked_list, checked_text, checked_words, missing


def prompt_row(
    record: dict[str, Any] | str,
    source: str,
    data: Data,
    *,
    given: bool,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """One record as a row of `prompts`.

    An image is as the record has it, and without names (`ImageRows.named` gives them).

    Args:
        record: As the source has it.
        source: Where it stands.
        data: The recipe's section.
        given: Nothing is generated: the record brings what is scored.
        classes: Names of the teacher's classes (labelled).

    Raises:
        RowError: this record cannot be used.
        UsageError: the columns are not those of the format.
    """
    if isinstance(record, str):
        raise RowError("unreadable", record)
    record = {ours: record[theirs] for ours, theirs in _columns(record, data).items()}
    row: dict[str, Any] = {"format": data.format, "source": source, **_EMPTY}
    reference = record.get("reference")
    if data.records.conversation:
        held = _CONVERSATIONS[data.format](record)
        row |= _conversation_columns(held, data, given=given)
        # Else the answer is only what the generated text can be compared with.
        answer = None if given or held.answer is None else held.answer.get("content")
        reference = answer if missing(reference) and isinstance(answer, str) else reference
    else:
        row |= _TEXTS[data.format](record)
    if data.records.words:
        row["labels"] = _tags(record.get("labels"), json.loads(row["text"]), classes)
    elif data.records.labelled:
        label = record.get("label")
        row["label"] = label_index(None if missing(label) else label, classes)
    row["reference"] = None if missing(reference) else checked_text(reference, "reference")
    return row if data.records.image else row | _keys(row)


def turn_keys(row: dict[str, Any], data: Data) -> list[bytes]:
    """Of a given conversation, hashes up to each turn of the assistant that is scored.

    Nothing where the last alone is: rows with one last turn have one prompt, and one split.
    """
    if not data.records.conversation or data.turns == "last":
        return []
    turns = conversation(row).turns
    return [
        content_key("turns", messages=turns[: number + 1], tools=row["tools"])
        for number, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]


def unread_columns(record: dict[str, Any] | str, data: Data) -> list[str]:
    """Columns of a conversation that a chat template could use, and that no format has."""
    if isinstance(record, str) or not data.records.conversation:
        return []
    named = data.columns.values()
    return [n for n in NOT_READ if not missing(record.get(n)) and n not in named]


def _keys(row: dict[str, Any]) -> dict[str, Any]:
    """Hashes of what a row holds.

    The source is not part of them, so a row that moved is the same row. What a row does not have is
    not either, so that rows of before have the names that they had.
    """
    messages, more, own = row["messages"], {}, {}
    if row["message_fields"] is not None:
        messages = conversation(row).messages
    if row["tools"] is not None:
        more["tools"] = row["tools"]
    prompt_key = content_key(
        "prompt", text=row["text"], messages=messages, pair=row["text_pair"], **more
    )
    answer = row["completion_fields"]
    if answer is not None:
        own["completion_fields"] = answer
    if row["labels"] is not None:
        own["labels"] = row["labels"]
    key = content_key(
        "prompts",
        prompt=prompt_key,
        format=row["format"],
        completion=row["completion"],
        reference=row["reference"],
        label=row["label"],
        **own,
    )
    return {"prompt_key": prompt_key, "key": key}


def _columns(record: dict[str, Any], data: Data) -> dict[str, str]:
    """Our name -> the record's column."""
    required = data.records.required
    names = {n: data.columns.get(n, n) for n in data.records.columns}
    for ours, others in data.records.other_names.items():
        there = [name for name in others if name in record]
        if names[ours] in record or not there:
            continue
        if len(there) > 1:
            raise RowError(
                "missing_column",
                f"no column {names[ours]!r}, and both {' and '.join(map(repr, there))}. Say which "
                f"in data.columns, for example {{{ours}: {there[0]}}}",
            )
        (names[ours],) = there
    absent = [names[n] for n in required if names[n] not in record]
    if absent:
        raise RowError(
            "missing_column",
            f"no column {absent[0]!r} (found {', '.join(map(repr, record)) or 'nothing'}). "
            f"Name it in data.columns, for example {{{required[0]}: ...}}{_inside(record)}",
        )
    return {ours: theirs for ours, theirs in names.items() if theirs in record}


def _inside(record: dict[str, Any]) -> str:
    """What to do where the records seem to stand in a list of the one that was read."""
    for name, value in record.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            return (
                f"; or, if the {len(value):,} objects in {name!r} are the records, write that list "
                "alone"
            )
    return ""


def _conversation_columns(held: Conversation, data: Data, *, given: bool) -> dict[str, Any]:
    try:
        columns = message_columns(held.messages) | answer_columns(held.answer if given else None)
        columns["tools"] = None if held.tools is None else as_json(held.tools)
    except (TypeError, ValueError) as error:
        raise RowError("unreadable", f"a message holds what JSON cannot ({error})") from error
    turns = any(message["role"] == "assistant" for message in held.messages)
    if given and held.answer is None and (data.turns == "last" or not turns):
        raise RowError("empty", "no answer to score, and no `generate` section to make one")
    return columns


def _prompt(record: dict[str, Any]) -> dict[str, Any]:
    return {"text": checked_words(record["prompt"], "prompt")}


def _completion(record: dict[str, Any]) -> dict[str, Any]:
    no_answer = "no answer to score, and no `generate` section to make one"
    return {
        "text": checked_words(record["prompt"], "prompt"),
        "completion": checked_words(record["completion"], "completion", if_empty=no_answer),
    }


def _document(record: dict[str, Any]) -> dict[str, Any]:
    return {"text": checked_text(record["text"], "text")}


def _labelled(record: dict[str, Any]) -> dict[str, Any]:
    pair = record.get("text_pair")
    second = None if missing(pair) else checked_text(pair, "text_pair")
    return {"text": checked_text(record["text"], "text"), "text_pair": second}


def _tagged(record: dict[str, Any]) -> dict[str, Any]:
    words = checked_list(record["words"], "words", "word")
    if not words:
        raise RowError("empty", "words is an empty list")
    found = [checked_text(word, f"word {number}") for number, word in enumerate(words, 1)]
    return {"text": json.dumps(found, ensure_ascii=False)}


def _image(record: dict[str, Any]) -> dict[str, Any]:
    return {"image": record["image"]}


def _tags(value: Any, words: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """The class of each word, `NO_LABEL` where it has none; None where no word has one."""
    if value is None or missing(value):
        return None
    tags = checked_list(value, "labels", "class")
    if len(tags) != len(words):
        raise RowError(
            "unreadable", f"{len(tags)} labels for {len(words)} words, expected one each"
        )
    nothing = [missing(tag) or tag == _IGNORED for tag in tags]
    found = [
        None if none else label_index(tag, classes) for tag, none in zip(tags, nothing, strict=True)
    ]
    if all(label is None for label in found):
        return None
    return [NO_LABEL if label is None else label for label in found]


_EMPTY = dict.fromkeys(
    (
        "text",
        "text_pair",
        "messages",
        "message_fields",
        "tools",
        "completion",
        "completion_fields",
        "reference",
        "label",
        "labels",
        "image",
    )
)
_TEXTS = {
    "text": _document,
    "prompt": _prompt,
    "completion": _completion,
    "labelled": _labelled,
    "tagged": _tagged,
    "images": _image,
}
_IGNORED = -100  # what losses ignore, so others put it where a word has no class
_CONVERSATIONS = {"messages": chat, "instruction": alpaca}
NOT_READ = {
    "functions": "What a conversation offers is read from `tools`: a list of "
    '{"type": "function", "function": ...}',
    "documents": "Write them into the messages",
    "chat_template_kwargs": "The recipe's data.chat_template_kwargs hold for all records",
}
"""Columns beside the messages that are named, not read; and what to do."""
