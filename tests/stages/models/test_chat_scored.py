"""Which turns are scored, and with which end; every turn that is not is counted and named."""

from typing import Any

import pytest
from chat_templates import MARKED, conversation, plain, renderer, scored

from stillroom.storage.errors import RowError

HELD = conversation("hi", "ab", "and", "cd")
PLAIN_END = plain().replace("</s>", "|end|")
AFTER_BOS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>Q: ' + m.content + '\n' }}"
    "{% else %}{{ 'A: ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
# The next question begins with a special token, and nothing ends an answer.
AFTER_HEADER = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<start_of_turn>' + m.content + '<end_of_turn>' }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
MARKED_CONTENT = MARKED.replace(
    "{{ m.content }}<|im_end|>{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>"
)
# As gpt-oss has it: the last turn ends with another token.
OTHER_LAST = plain().replace("'</s>\n'", "('</s>' if loop.last else '<|im_end|>') + '\n'")
MARKED_BY_WEIGHT = MARKED.replace(
    "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and m.weight != 0 %}"
)


def weighed(*weights: Any) -> Any:
    """The same conversation, with a weight for each answer."""
    first, last = (
        {"role": "assistant", "content": text, "weight": weight}
        for text, weight in zip(("ab", "cd"), weights, strict=True)
    )
    return conversation("hi", first, "and", last)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN_END, ["ab|end|", "cd|end|"]),
        (MARKED_CONTENT, ["ab<|im_end|>", "cd<|im_end|>"]),
        (OTHER_LAST, ["ab<|im_end|>", "cd</s>"]),
    ],
    ids=["text", "after marks", "another at the end"],
)
def test_the_end_is_what_stands_before_the_next_header(template: str, expected: list[str]) -> None:
    made = renderer(template)
    assert scored(made, HELD) == expected
    assert made.notes() == []


@pytest.mark.parametrize("template", [AFTER_BOS, AFTER_HEADER], ids=["bos", "header"])
def test_the_next_header_is_no_end(template: str) -> None:
    made = renderer(template)
    assert scored(made, HELD) == ["ab", "cd"]
    (note,) = made.notes()
    assert note.startswith("2 turns of the assistant are scored without an end")


def test_a_closing_line_is_no_end() -> None:
    template = PLAIN_END + "{% if not add_generation_prompt %}That was all.{% endif %}"
    assert scored(renderer(template), conversation("hi", "ab")) == ["ab"]


def test_the_turns_of_a_prompt_end_as_those_of_a_whole() -> None:
    made = renderer(PLAIN_END)
    ids, spans = made.prompt(conversation("hi", "ab", "and"), turns=True)
    assert [made.tokenizer.decode(ids[s : s + n]) for s, n in spans] == ["ab|end|"]


def test_fewer_marks_than_turns_say_which_are_scored() -> None:
    only_long = MARKED.replace(
        "m.role == 'assistant'", "m.role == 'assistant' and m.content | length > 2"
    )
    made = renderer(only_long)
    assert scored(made, conversation("hi", "ab", "and", "long")) == ["long<|im_end|>"]
    (note,) = made.notes()
    assert "marks others with {% generation %}" in note
    assert "messages[1], 'ab', of the conversation that begins with 'hi'" in note


@pytest.mark.parametrize("template", [plain(), MARKED_BY_WEIGHT], ids=["plain", "marked"])
def test_a_turn_of_weight_0_is_not_scored(template: str) -> None:
    made = renderer(template)
    end = "</s>" if template == plain() else "<|im_end|>"
    assert scored(made, weighed(0, 1)) == [f"cd{end}"]
    assert scored(made, weighed(1, 0)) == [f"ab{end}"]
    assert scored(made, weighed(None, 1)) == [f"ab{end}", f"cd{end}"]
    assert made.notes() == []


def test_a_weight_that_means_nothing_is_refused() -> None:
    with pytest.raises(
        RowError, match=r"messages\[1\].weight is 0.5, expected 0 \(not scored\) or 1"
    ):
        renderer(plain()).whole(weighed(0.5, 1), last=False)
    with pytest.raises(RowError, match="no turn of the assistant is to be scored: weight is 0"):
        renderer(plain()).whole(weighed(0, 0), last=False)


def test_a_turn_that_has_no_token_is_counted() -> None:
    made = renderer("{% for m in messages %}{{ m.content }}{% endfor %}")
    first = {"role": "assistant", "content": "a"}
    held = conversation(first, {"role": "user", "content": "b"}, {**first, "content": "c"})
    assert scored(made, held) == ["c"]
    assert made.notes()[0].startswith("1 turns of the assistant are not scored: all their tokens")


def test_a_call_that_is_left_out_is_named_by_its_function() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    result = {"role": "tool", "content": "red"}
    made = renderer(
        "{% set x = messages[1].tool_calls[0].function.name | upper %}{{ x }}" + plain()
    )
    made.whole(conversation("hi", call, result, "so"), last=False)
    (note,) = made.notes()
    assert "{% generation %}" in note
    assert "look" in note
