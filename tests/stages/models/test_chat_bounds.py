"""A span holds no token of another message, whatever else of a conversation a turn changes."""

from typing import Any

import pytest
from chat_templates import calling, conversation, plain, renderer, scored

CALL: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "red ball"}
HELD = conversation("hi", CALL, RESULT, "it is red", "so", "bye")
SCORED = ["<call>look</s>", "it is red</s>", "bye</s>"]
IF_CALLED = "{% if messages | selectattr('tool_calls', 'defined') | list %}<s>you call\n{% endif %}"
IF_THOUGHT = "{% if messages | selectattr('reasoning_content', 'defined') | list %}ah{% endif %}"
NO_CALL = "raise_exception('no call') if m.role == 'tool' and not ns.called else ''"

ANGRY = "' (angry)' if loop.index0 and 'sorry' in loop.previtem.content else ''"


@pytest.mark.parametrize(
    "template",
    [
        calling(),
        calling(first=IF_CALLED),
        calling("' ' + ns.called"),
        calling("' ' ~ ns.count"),
        calling("' ' ~ ns.length"),
        calling(NO_CALL),
        calling("' ' + ns.called", first=IF_CALLED),
    ],
    ids=["plain", "banner", "named", "numbered", "length", "call demanded", "named with banner"],
)
def test_calls_are_scored_and_nothing_of_other_messages(template: str) -> None:
    made = renderer(template)
    assert scored(made, HELD) == SCORED
    assert made.notes() == []


def test_what_was_thought_is_scored_under_a_banner() -> None:
    thought = {"role": "assistant", "content": "ok", "reasoning_content": "hm "}
    held = conversation("hi", thought, "and", "fine")
    assert scored(renderer(calling(first=IF_THOUGHT)), held) == ["hm ok</s>", "fine</s>"]


def test_a_question_written_by_the_answer_before_is_not_scored() -> None:
    held = conversation("hi", "sorry no", "and", "fine")
    assert scored(renderer(calling(ANGRY)), held) == ["sorry no</s>", "fine</s>"]


def test_a_turn_whose_bounds_change_with_it_is_not_bounded() -> None:
    """Its words decide the header of the next question, and a closing line hides where it ends."""
    held = conversation("hi", "sorry no", "and", "fine")
    made = renderer(calling(ANGRY) + "{% if not add_generation_prompt %}Done.{% endif %}")
    assert scored(made, held) == ["fine</s>"]
    assert "messages[1], 'sorry no'" in made.notes()[0]


def test_marks_that_hold_a_question_are_not_believed() -> None:
    marks = (
        "{% for m in messages %}{% if m.role == 'user' %}{% generation %}{{ 'Q ' + m.content }}"
        "{% endgeneration %}{% else %}{{ ' A ' + m.content + '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' A ' }}{% endif %}"
    )
    held = conversation("is it ok", "ok", "say fine", "fine")
    assert scored(renderer(marks), held) == ["ok</s>", "fine</s>"]


def test_a_closing_line_is_not_scored() -> None:
    closing = "{% if not add_generation_prompt %}That was all.{% endif %}"
    held = conversation("hi", "ab")
    assert scored(renderer(plain("m.content | upper") + closing), held) == ["AB</s>"]
