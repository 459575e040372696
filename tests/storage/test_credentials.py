"""What is neither shown nor recorded: credentials of addresses, and values that stand behind a name."""

import io

import pytest

from stillroom.storage.credentials import (
    all_shown,
    as_written,
    cleaned,
    hide,
    hide_password,
    shown,
    without_values,
)
from stillroom.storage.errors import UsageError


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("s3://KEY:SE/CR+ET@bucket/path", "s3://bucket/path"),
        ("https://user:pass@host:443/x", "https://host:443/x"),
        ("hf://user:pass@datasets/u/n", "hf://datasets/u/n"),
        ("https://h/x?X-Amz-Signature=abc&y=1", "https://h/x"),
        ("at https://h/x?token=abc: 403 (a@b.c)", "at https://h/x: 403 (a@b.c)"),
        ("https://h/x#access_token=abc", "https://h/x"),
        ("Max retries exceeded with url: /x?sig=abc&y=1", "… url: /x?sig=***&y=1"),
        ("proxy http://me:pw@proxy:3128 refused", "proxy http://proxy:3128 refused"),
    ],
)
def test_credentials_of_an_address_are_cut(said: str, right: str) -> None:
    assert shown(said).endswith(right.removeprefix("…"))


@pytest.mark.parametrize(
    "said",
    [
        "hf://datasets/user/name@4f2a1b",
        "s3://bucket/a@b/c",
        "https://host:443/a@b",
        "https://huggingface.co/docs/x#section",
        "data/*.jsonl: is this a question? Mail a@b.c",
        "s3://bucket/x: not there. Mail user:me@b.c",
    ],
)
def test_what_is_no_credential_stays(said: str) -> None:
    assert shown(said) == said


def test_a_value_is_shown_by_its_name_in_every_form() -> None:
    hide({"a secret/+value": "${S}", "/data": "${D}", "short": "${T}"}, {"short": "${T}"})
    assert without_values("x=a%20secret/%2Bvalue, a secret/+value/b") == "x=${S}, ${S}/b"
    assert without_values("/data/x /mnt/data /database") == "${D}/x /mnt/data /database"
    assert without_values("a short word") == "a short word"
    assert as_written("short") == "${T}"
    assert all_shown({"short": ["/data", 1, None]}) == {"${T}": ["${D}", 1, None]}


def test_a_word_is_looked_for_in_fields_alone() -> None:
    hide({"baseline": "${RUN}"}, {"runs/baseline": "runs/${RUN}"})
    assert without_values('{"baseline": 1}') == '{"baseline": 1}'
    assert as_written("runs/baseline") == "runs/${RUN}"


def test_secrets_of_the_environment_are_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("DATABASE_URL", "pg://me:0123-secret@host/x")
    hide_password("s3://KEY:secret-of-s3@bucket")
    error = UsageError("hf_0123456789, 0123-secret, secret-of-s3")
    assert str(error) == "${HF_TOKEN}, ***, ***"


def test_a_stream_shows_what_its_way_of_cleaning_gives() -> None:
    out = io.StringIO()
    stream = cleaned(out, shown)
    print("see https://me:pw@h/x", file=stream)
    stream.writelines(["https://h/x?key=1", "\n"])
    assert out.getvalue() == "see https://h/x\nhttps://h/x\n"
    assert not stream.isatty()


@pytest.mark.parametrize("part", ["a.", "://", "a://b:", "a://b?", "a://b?:", "&key", "@", "a:b@"])
def test_no_text_takes_long(part: str) -> None:
    """Its cost grows as its length does, whatever it repeats."""
    shown(part * 10_000)
