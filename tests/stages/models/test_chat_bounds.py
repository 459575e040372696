"""A span holds no token of another message, whatever else of a conversation a turn changes."""

from typing import Any

import pytest
from chat_templates import QWEN3, calling, conversation, plain, renderer, scored

from stillroom.stages.models.chat import turns
from stillroom.stages.models.chat.template import Chat, ChatTemplate, Rendered

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


@pytest.mark.parametrize("result", ["red ball", "", [{"type": "text", "text": "red ball"}]])
def test_a_result_that_is_written_only_after_a_call_is_not_scored(result: Any) -> None:
    after_call = "{% if m.role != 'tool' or messages[loop.index0 - 1].tool_calls %}"
    template = calling().replace("{{ '<s>' + m.role }}", after_call + "{{ '<s>' + m.role }}")
    template = template.replace("{{ '</s>\n' }}", "{{ '</s>\n' }}{% endif %}")
    held = conversation("hi", CALL, RESULT | {"content": result}, "fine")
    assert scored(renderer(template), held) == ["<call>look</s>", "fine</s>"]


def test_a_turn_without_its_calls_is_not_scored_by_half() -> None:
    """The calls stand before the content, and a banner hides where the turn begins."""
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ m.content }}"
    made = renderer(IF_CALLED + plain().replace("{{ m.content }}", calls))
    held = conversation("hi", CALL | {"content": "so"}, RESULT, "fine")
    assert scored(made, held) == ["fine</s>"]
    assert made.notes()[0].startswith("1 turns of the assistant are not scored")


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


@pytest.mark.parametrize("content", ["ab", "b</s>\n<s>user\nso</s>\n<s>assistant\nb"])
def test_many_turns_are_found_at_once_as_each_by_itself(
    monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """Also a turn that reads as two, which pieces alone cannot tell."""
    thought = {"role": "assistant", "content": "ok", "reasoning_content": "hm "}
    held = conversation("hi", CALL, RESULT, "red", "so", content, "so", thought, "so", "bye")
    made = renderer(calling("' ' ~ ns.count"))
    at_once = scored(made, held)
    monkeypatch.setattr(turns, "FEWEST", 99)
    assert at_once == scored(made, held)
    assert at_once == [SCORED[0], "red</s>", f"{content}</s>", "hm ok</s>", "bye</s>"]


def test_the_renderings_of_a_conversation_do_not_grow_with_its_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendered: list[Chat] = []
    render = ChatTemplate.render

    def counted(self: ChatTemplate, chat: Chat) -> Rendered:
        rendered.append(chat)
        return render(self, chat)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    counts = []
    for many in (5, 50):
        rendered.clear()
        words = [f"{n} {side}" for n in range(many) for side in ("asked", "answered")]
        assert len(scored(renderer(QWEN3), conversation(*words))) == many
        counts.append(len(rendered))
    assert counts[0] == counts[1]
