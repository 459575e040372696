"""The formats of `data`: how a record of each becomes a row of `prompts`."""

from collections.abc import Sequence
from typing import Any

from ...storage.errors import RowError
from ...storage.keys import content_key
from ..models.classes import label_index
from ..recipe.sections import Data


def prompt_row(
    record: dict[str, Any] | str,
    source: str,
    data: Data,
    *,
    given: bool,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """One record as a row of `prompts`.

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
    row |= _FORMATS[data.format](record)
    if data.records.labelled:
        row["label"] = label_index(record["label"], classes)
    answer, reference = row.pop("answer", None), record.get("reference")
    if given and not (data.records.document or data.records.labelled):
        # Nothing is generated, so the record's answer is what is scored ...
        no_answer = "no answer to score, and no `generate` section to make one"
        row["completion"] = _text(answer, "completion", if_empty=no_answer)
    elif _missing(reference):
        # ... else it is only what the generated text can be compared with.
        reference = answer
    row["reference"] = None if _missing(reference) else _text(reference, "reference")
    # Keys are hashes of what is named here; the source is not, so a row that moved is the same row.
    row["prompt_key"] = content_key(
        "prompt", text=row["text"], messages=row["messages"], pair=row["text_pair"]
    )
    row["key"] = content_key(
        "prompts",
        prompt=row["prompt_key"],
        format=row["format"],
        completion=row["completion"],
        reference=row["reference"],
        label=row["label"],
    )
    return row


def _columns(record: dict[str, Any], data: Data) -> dict[str, str]:
    """Our name -> the record's column."""
    required = data.records.required
    names = {n: data.columns.get(n, n) for n in data.records.columns}
    missing = [names[n] for n in required if names[n] not in record]
    if missing:
        raise RowError(
            "missing_column",
            f"no column {missing[0]!r} (found {', '.join(map(repr, record)) or 'nothing'}). "
            f"Name it in data.columns, for example {{{required[0]}: ...}}",
        )
    return {ours: theirs for ours, theirs in names.items() if theirs in record}


def _prompt(record: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text(record["prompt"], "prompt")}


def _completion(record: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text(record["prompt"], "prompt"), "answer": record["completion"]}


def _messages(record: dict[str, Any]) -> dict[str, Any]:
    messages = record["messages"]
    try:
        messages = [
            {"role": _text(m["role"], "role"), "content": _text(m["content"], "content")}
            for m in messages
        ]
    except (TypeError, KeyError) as error:
        raise RowError(
            "unreadable", f"messages must be a list of {{role, content}} ({error!r})"
        ) from error
    # The last turn of the assistant is the answer to the others.
    answered = messages and messages[-1]["role"] == "assistant"
    answer = messages.pop()["content"] if answered else None
    if not messages:
        raise RowError("empty", "the conversation has no message to answer")
    return {"messages": messages, "answer": answer}


def _instruction(record: dict[str, Any]) -> dict[str, Any]:
    content = _text(record["instruction"], "instruction")
    if not _missing(record.get("input")):
        content += "\n" + _text(record["input"], "input")
    return {"messages": [{"role": "user", "content": content}], "answer": record.get("output")}


def _document(record: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text(record["text"], "text")}


def _labelled(record: dict[str, Any]) -> dict[str, Any]:
    pair = record.get("text_pair")
    second = None if _missing(pair) else _text(pair, "text_pair")
    return {"text": _text(record["text"], "text"), "text_pair": second}


def _missing(value: Any) -> bool:
    return value in (None, "")


def _text(value: Any, name: str, *, if_empty: str | None = None) -> str:
    if _missing(value):
        raise RowError("empty", if_empty or f"{name} is empty")
    if not isinstance(value, str):
        raise RowError("unreadable", f"{name} is a {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("unreadable", f"{name} is not valid UTF-8 ({error.reason})") from error
    return value


_EMPTY = dict.fromkeys(("text", "text_pair", "messages", "completion", "reference", "label"))
_FORMATS = {
    "text": _document,
    "prompt": _prompt,
    "completion": _completion,
    "messages": _messages,
    "instruction": _instruction,
    "labelled": _labelled,
}
