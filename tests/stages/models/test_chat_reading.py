"""What a chat template reads: all of a conversation is in the text, or refused, or named.

So are arguments.
"""

import re
from typing import Any

import pytest
from chat_templates import GEMMA, QWEN3, byte_tokenizer, conversation, plain, renderer

from stillroom.stages.models.chat.arguments import doubtful_arguments, reads_the_clock
from stillroom.stages.models.chat.template import Chat, ChatTemplate
from stillroom.storage.errors import RowError

CALLED = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
READS_PARTS = (
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)


def text_of(template: Any, *messages: dict[str, Any], tools: Any = None) -> str:
    return ChatTemplate(byte_tokenizer(template), {}).render(Chat([*messages], tools)).text


def notes(template: str, *messages: Any, tools: Any = None) -> list[str]:
    made = renderer(template)
    made.whole(conversation(*messages, tools=tools), last=True)
    return made.notes()


@pytest.mark.parametrize(
    "name", ["reasoning_content", "name", "tool_call_id", "tool_calls", "note"]
)
def test_a_field_reaches_the_text_or_is_named(name: str) -> None:
    asked: dict[str, Any] = {"role": "user", "content": "hi", name: "zzz"}
    reading = plain(f"m.content + (m.{name} or '')")
    assert "zzz" in text_of(reading, asked)
    assert notes(reading, asked, "yes") == []
    assert notes(plain(), asked, "yes") == [
        f"the chat template does not read {name!r}, which 1 conversation has"
    ]
    assert notes(plain(), "hi", "yes") == []


def test_a_field_is_counted_where_it_is_lost_though_others_have_it_read() -> None:
    made = renderer(plain("m.content + ((m.note or '') if loop.length > 2 else '')"))
    asked = [{"role": "user", "content": "hi", "note": "zzz"}, "yes"]
    again = [{"role": role, "content": "so", "note": "zzz"} for role in ("user", "assistant")]
    for turns in (asked, [*asked, *again], asked):
        made.whole(conversation(*turns), last=True)
    assert made.notes() == [
        "the chat template does not read 'note' in 2 of the 3 conversations that have it"
    ]


def test_tools_reach_the_text_or_are_named() -> None:
    tools = [{"type": "function", "function": {"name": "zzz"}}]
    assert "zzz" in text_of(QWEN3, {"role": "user", "content": "hi"}, tools=tools)
    assert notes(QWEN3, "hi", "yes", tools=tools) == []
    (note,) = notes(plain(), "hi", "yes", tools=tools)
    assert "does not read 'tools'" in note


def test_parts_of_a_text_reach_the_text() -> None:
    asked = {"role": "user", "content": PARTS}
    assert text_of(plain(), asked) == "user: one\ntwo</s>\n"
    assert text_of(plain().replace("{{ m.content }}", READS_PARTS), asked) == "user: onetwo</s>\n"


@pytest.mark.parametrize(
    "content", ["m.content", "m.content if m.content is not none else ''", "m.content + ''"]
)
def test_a_null_content_is_never_the_word_none(content: str) -> None:
    found = text_of(plain(content), {"role": "user", "content": "hi"}, CALLED)
    assert found == "user: hi</s>\nassistant: </s>\n"


def test_a_template_that_refuses_a_role_says_so() -> None:
    with pytest.raises(RowError, match=r"\(roles: system, user\): System role not supported"):
        text_of(GEMMA, {"role": "system", "content": "be"}, {"role": "user", "content": "hi"})


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}</s>{% endfor %}"
    held = conversation("hi", "yes", {"role": "tool", "content": "2"}, "so")
    with pytest.raises(RowError, match=r"leaves out messages\[2\], whose role is 'tool'"):
        renderer(template).whole(held, last=True)


@pytest.mark.parametrize("content", ["be kind", [{"type": "text", "text": "be kind"}]])
@pytest.mark.parametrize("asked", ["be kind to me", "be kind", "hello"])
def test_a_message_whose_words_occur_elsewhere_is_refused_too(content: Any, asked: str) -> None:
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}"
    system = {"role": "system", "content": content}
    held = conversation(system, {"role": "user", "content": asked}, {**system, "role": "assistant"})
    with pytest.raises(RowError, match=r"leaves out messages\[0\], whose role is 'system'"):
        renderer(template).whole(held, last=True)


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"content": " \n"},
        {"content": []},
        {"content": None, "tool_calls": []},
        {"content": "", "reasoning_content": "hm"},
    ],
    ids=["unread calls", "blanks", "no parts", "no calls", "unread thoughts"],
)
def test_a_message_of_which_nothing_is_written_is_refused(message: dict[str, Any]) -> None:
    held = conversation("hi", {"role": "assistant", **message}, "so", "yes")
    with pytest.raises(RowError, match=r"messages\[1\] has no words") as refused:
        renderer(plain("m.content or ''")).whole(held, last=True)
    assert refused.value.reason == "empty"


def test_a_tool_may_answer_nothing() -> None:
    empty = {"role": "tool", "content": "", "tool_call_id": "c1"}
    made = renderer(plain("m.content or ''"))
    made.whole(conversation("hi", "look", empty, "so"), last=True)
    assert made.notes() == [
        "the chat template does not read 'tool_call_id', which 1 conversation has"
    ]


@pytest.mark.parametrize(
    "written", ["c.arguments | tojson", "c.arguments", "c.arguments | items | list | tojson"]
)
def test_arguments_that_are_json_are_not_written_as_json_of_json(written: str) -> None:
    """OpenAI's own form is a text; templates encode it, write it as it is, or ask for an object."""
    calls = "{% for c in m.tool_calls or [] %}{{ WRITTEN }}{% endfor %}{{ m.content or '' }}"
    template = plain().replace("{{ m.content }}", calls.replace("WRITTEN", written))
    call = {"name": "f", "arguments": '{"x": 1}'}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    expected = '[["x", 1]]' if "items" in written else '{"x": 1}'
    assert text_of(template, called) == f"assistant: {expected}</s>\n"
    assert call["arguments"] == '{"x": 1}'


def test_the_clock_says_the_day_of_the_binding() -> None:
    template = "{{ strftime_now('%d %B %Y') }} " + plain()
    assert reads_the_clock(template)
    assert not reads_the_clock(plain())
    rendered = ChatTemplate(byte_tokenizer(template), {}, "2024-02-29").render(
        Chat([{"role": "user", "content": "hi"}])
    )
    assert rendered.text.startswith("29 February 2024 user: hi")


def test_of_several_templates_that_for_tools_is_used_with_tools() -> None:
    listed = {"default": plain(), "tool_use": "with {{ tools[0].name }} " + plain()}
    asked = {"role": "user", "content": "hi"}
    assert text_of(listed, asked) == "user: hi</s>\n"
    assert text_of(listed, asked, tools=[{"name": "f"}]) == "with f user: hi</s>\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"enable_thinking": False}, None),
        (
            {"enable_thinkin": False},
            "never mentions 'enable_thinkin'. Did you mean 'enable_thinking'?",
        ),
        (
            {"enable_thinking": "false"},
            "enable_thinking is the text 'false', and the chat template",
        ),
        ({"colour": 1}, "never mentions 'colour'."),
    ],
)
def test_arguments_that_do_nothing_are_named(arguments: dict[str, Any], said: str | None) -> None:
    found = doubtful_arguments(QWEN3, arguments)
    assert len(found) == (said is not None)
    assert said is None or re.search(re.escape(said), found[0])


def test_a_word_is_doubted_only_where_truth_is_asked_for() -> None:
    template = "{% if polite and not tired %}{{ mood }}{% endif %}" + plain()
    doubted = doubtful_arguments(template, {"polite": "no", "tired": "no", "mood": "no"})
    assert [line.split()[2] for line in doubted] == ["polite", "tired"]
    assert all(line.startswith("warning: data.chat_template_kwargs: ") for line in doubted)


def test_a_word_that_means_no_truth_is_not_doubted() -> None:
    template = "{% if effort %}{{ 'effort ' + effort }}{% endif %}" + plain()
    assert doubtful_arguments(template, {"effort": "high"}) == []


@pytest.mark.parametrize("filtered", ["default(true)", "d(false)", "default(false, true)"])
def test_what_is_true_or_false_by_default_is_asked_for_truth(filtered: str) -> None:
    template = "{% set ns = namespace(think=think|" + filtered + ") %}" + plain()
    assert len(doubtful_arguments(template, {"think": "False"})) == 1
    plain_text = template.replace(filtered, "default('low')")
    assert doubtful_arguments(plain_text, {"think": "False"}) == []
