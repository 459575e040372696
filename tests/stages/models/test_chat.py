"""Conversations as tokens: one rendering, in which the assistant's turns are found.

That holds whatever the template.
"""

from typing import Any

import pytest
from chat_templates import (
    GEMMA,
    MARKED,
    QWEN3,
    byte_tokenizer,
    conversation,
    plain,
    renderer,
    scored,
)

from stillroom.stages.models.chat import template
from stillroom.storage.errors import RowError, UsageError
from stillroom.storage.tables.conversations import Conversation

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
HELD = conversation(
    "1+1?", CALL, {"role": "tool", "content": "2"}, "Two.", "Sure?", "Yes!", tools=TOOLS
)
SAID = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'


MARKED_BEFORE = MARKED.replace(
    "{{ m.content }}<|im_end|>{% endgeneration %}", "{% endgeneration %}{{ m.content }}<|im_end|>"
)


def whole(template: str, held: Conversation, **arguments: Any) -> list[int]:
    """By the library alone."""
    found: list[int] = byte_tokenizer(template).apply_chat_template(
        held.turns, tools=held.tools, return_dict=False, **arguments
    )
    return found


@pytest.mark.parametrize("thinking", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_turns_of_qwen3_are_found_in_the_one_rendering(thinking: dict[str, bool]) -> None:
    made = renderer(QWEN3, **thinking)
    assert made.whole(HELD, last=False)[0] == whole(QWEN3, HELD, **thinking)
    off = thinking.get("enable_thinking") is False
    last = "Yes!<|im_end|>" if off else "<think>\n\n</think>\n\nYes!<|im_end|>"
    assert scored(made, HELD) == [SAID, "Two.<|im_end|>", last]
    assert scored(made, HELD, last=True) == [last]
    assert made.notes() == []


def test_thinking_is_scored_where_the_template_shows_it() -> None:
    """Not in the earlier turn, though the prompt that it answered would have shown it."""
    think = [
        {"role": "assistant", "content": text, "reasoning_content": f"hm {text}"}
        for text in ("Two.", "Yes!")
    ]
    held = conversation("1+1?", think[0], "Sure?", think[1])
    expected = ["Two.<|im_end|>", "<think>\nhm Yes!\n</think>\n\nYes!<|im_end|>"]
    assert scored(renderer(QWEN3), held) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MARKED, [" a \n<|im_end|>", "b<|im_end|>"]),
        (GEMMA, ["a<end_of_turn>", "b<end_of_turn>"]),
        (plain(), [" a \n</s>", "b</s>"]),
        (plain("m.content | trim"), ["a</s>", "b</s>"]),
        # Marks that miss a turn's text are not believed.
        (MARKED_BEFORE, [" a \n<|im_end|>", "b<|im_end|>"]),
    ],
    ids=["marked", "end_of_turn", "plain", "trimmed", "wrongly marked"],
)
def test_a_turn_ends_as_the_template_ends_it(template: str, expected: list[str]) -> None:
    held = conversation("hi", " a \n", "and", "b")
    made = renderer(template)
    assert scored(made, held) == expected
    assert scored(made, held, last=True) == expected[-1:]
    assert made.whole(held, last=False)[0] == whole(template, held)


@pytest.mark.parametrize(
    ("content", "last"), [("m.content | upper", "CD</s>"), ("m.content + m.content", "cdcd</s>")]
)
def test_a_turn_that_cannot_be_bounded_is_left_out_and_named(content: str, last: str) -> None:
    """Of the last turn the prompt is enough."""
    held = conversation("hi", "ab", "and", "cd")
    made = renderer(plain(content))
    assert scored(made, held) == [last]
    (note,) = made.notes()
    assert note.startswith("1 turns of the assistant are not scored")
    assert "messages[1], 'ab'" in note


def test_a_conversation_in_which_no_turn_is_found_is_refused() -> None:
    held = Conversation(messages=conversation("hi", "ab", "x").messages)
    with pytest.raises(RowError, match="no turn of the assistant can be found"):
        renderer(plain("m.content | upper")).whole(held, last=False)


def test_the_turns_of_a_prompt_are_found_too() -> None:
    held = Conversation(messages=conversation("hi", "ab", "and").messages)
    made = renderer(GEMMA)
    ids, spans = made.prompt(held, turns=True)
    assert ids == whole(GEMMA, held, add_generation_prompt=True)
    assert [made.tokenizer.decode(ids[s : s + n]) for s, n in spans] == ["ab<end_of_turn>"]
    assert made.prompt(held)[1].tolist() == []


def test_tokens_inside_one_character_are_scored_together() -> None:
    held = conversation("hé 👩", "👩 é")
    assert scored(renderer(plain()), held) == ["👩 é</s>"]


def test_a_tokenizer_without_offsets_finds_the_same() -> None:
    class Slow:
        """The same tokenizer, which does not say where its tokens are."""

        is_fast = False

        def __init__(self, tokenizer: Any) -> None:
            self._tokenizer = tokenizer

        def __call__(self, text: str, return_offsets_mapping: bool = False, **how: Any) -> Any:
            assert not return_offsets_mapping
            return self._tokenizer(text, **how)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tokenizer, name)

    held = conversation("hi", "ab", "and", "cd")
    fast, slow = renderer(GEMMA), renderer(GEMMA)
    slow.tokenizer = Slow(slow.tokenizer)
    assert scored(slow, held) == scored(fast, held) == ["ab<end_of_turn>", "cd<end_of_turn>"]


@pytest.mark.parametrize("where", ["in every conversation", "where a content is null"])
def test_a_template_without_end_is_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox bounds one range, not one inside another."""
    monkeypatch.setattr(template, "_SECONDS", 0.3)
    often = "".join(f"{{% for i{n} in range(99999) %}}" for n in range(4)) + "{% endfor %}" * 4
    if where == "where a content is null":
        often = "{% if messages[0].content is none %}" + often + "{% endif %}"
    with pytest.raises(UsageError, match="the chat template comes to no end"):
        renderer(often).whole(conversation(CALL, "b"), last=False)
