"""Conversations as people keep them.

Every field stands in the messages, or the record is refused by its name.
"""

import json
from typing import Any

import pytest

from stillroom.stages.data.formats import prompt_row
from stillroom.stages.recipe.sections import Data
from stillroom.storage.errors import RowError
from stillroom.storage.tables.conversations import Conversation, conversation

ASKED = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def row(format: str, given: bool = True, /, **record: Any) -> dict[str, Any]:
    return prompt_row(record, "x:1", Data(source="x", format=format), given=given)


def held(format: str, /, **record: Any) -> Conversation:
    return conversation(row(format, **record))


def test_a_conversation_of_roles_and_texts_has_the_hashes_that_it_had() -> None:
    made = row("messages", messages=[ASKED, ANSWER])
    assert made["prompt_key"].hex() == "ba11ae86c105145e9d2a740df2a67459"
    assert made["key"].hex() == "d3f52dda6ea31f8ed13817f7d899f4e6"
    assert (made["message_fields"], made["tools"], made["completion_fields"]) == (None, None, None)
    # What a table has in every row is not there where it is null.
    padded = [message | {"tool_calls": None} for message in (ASKED, ANSWER)]
    assert row("messages", messages=padded, tools=None) == made


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [ASKED | {"name": "Ann"}, ANSWER]},
        {"messages": [ASKED, ANSWER], "tools": TOOLS},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER]},
    ],
)
def test_what_a_prompt_has_besides_is_part_of_its_name(more: dict[str, Any]) -> None:
    made, plain = row("messages", **more), row("messages", messages=[ASKED, ANSWER])
    assert made["prompt_key"] != plain["prompt_key"]


def test_what_an_answer_has_besides_is_part_of_its_row_alone() -> None:
    made = row("messages", messages=[ASKED, ANSWER | {"reasoning_content": "hm"}])
    plain = row("messages", messages=[ASKED, ANSWER])
    assert made["prompt_key"] == plain["prompt_key"]
    assert made["key"] != plain["key"]
    assert conversation(made).answer == ANSWER | {"reasoning_content": "hm"}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_calls_of_tools_stay_in_their_messages(tools: Any) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "2", "tool_call_id": "7"}
    found = held("messages", messages=[ASKED, calls, result, ANSWER], tools=tools)
    assert (found.turns, found.tools) == ([ASKED, calls, result, ANSWER], TOOLS)
    last = held("messages", messages=[ASKED, calls | {"content": ""}])
    assert last.answer == calls | {"content": ""}


def test_sharegpt_becomes_messages() -> None:
    record = {
        "system": "be",
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "yes", "weight": 1},
        ],
    }
    found = held("messages", **record)
    assert found.messages == [
        {"role": "system", "content": "be"},
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
    ]
    assert found.answer == ANSWER | {"weight": 1}


def test_alpacas_system_and_history_stand_before_the_question() -> None:
    found = held(
        "instruction",
        instruction="so?",
        output="yes",
        system="be",
        history=[["a", "b"], ["c", "d"]],
    )
    assert [(m["role"], m["content"]) for m in found.turns] == [
        ("system", "be"),
        *[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        *[("user", "so?"), ("assistant", "yes")],
    ]
    plain = row("instruction", instruction="so?", output="yes")
    assert row("instruction", instruction="so?", output="yes", system="", history=[]) == plain


def test_a_conversation_that_ends_with_a_question_has_its_earlier_answers() -> None:
    found = held("messages", messages=[ASKED, ANSWER, ASKED])
    assert (found.messages, found.answer) == ([ASKED, ANSWER, ASKED], None)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [ASKED | {"content": None}]}, r"messages\[0\] has no content"),
        (
            {"messages": [ASKED | {"content": [{"type": "image", "url": "x"}]}]},
            r"messages\[0\]\.content\[0\] is of type 'image'",
        ),
        ({"messages": [ASKED | {"name": "\ud800"}, ANSWER]}, "a message holds what JSON cannot"),
        ({"messages": [ASKED | {"x": float("inf")}, ANSWER]}, "a message holds what JSON cannot"),
        ({"messages": [ASKED, ANSWER], "tools": "{"}, "tools is not JSON"),
        (
            {"messages": [ASKED, ANSWER], "tools": "[" * 200 + "]" * 200},
            "nested more than 100 deep",
        ),
        ({"messages": [ASKED, ANSWER], "tools": [1]}, "tools must be a list of objects"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, r"messages\[0\]\.from is 'bot'"),
        ({"messages": [{"from": ["human"], "value": "hi"}]}, r"messages\[0\]\.from is a list"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, r"messages\[0\]\.role is a list"),
        ({"messages": [ASKED, ANSWER | {"content": " \n"}]}, r"messages\[1\] has no content"),
        ({"messages": [ASKED, ANSWER | {"content": []}]}, r"messages\[1\] has no content"),
        (
            {"messages": [ASKED, ANSWER | {"content": None, "tool_calls": []}]},
            r"messages\[1\] has no content",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            r"messages\[0\]\.value is not JSON",
        ),
        ({"messages": [ASKED | {"role": "system"}, ANSWER], "system": "be"}, "system stands in"),
    ],
)
def test_a_field_that_cannot_be_read_is_named(record: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=said):
        row("messages", **record)


@pytest.mark.parametrize(
    "history",
    ["ab c", [["a"]], [["a", True]], [["a", ""]], ["ab", "cd"], [{"role": "user", "content": "a"}]],
)
def test_a_history_that_is_no_pairs_is_refused(history: Any) -> None:
    with pytest.raises(RowError, match="history"):
        row("instruction", instruction="so?", output="yes", history=history)


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("prompt", {"prompt": " \n"}),
        ("completion", {"prompt": "hi", "completion": "\t"}),
        ("instruction", {"instruction": " ", "output": "yes"}),
        ("instruction", {"instruction": "so?", "output": " "}),
    ],
)
def test_blanks_ask_and_answer_nothing(format: str, record: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="is blanks alone"):
        row(format, **record)
