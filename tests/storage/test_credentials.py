"""What is neither shown nor recorded: credentials of addresses, and values behind a name."""

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
        ("chained::s3://KEY:pass@bucket,", "chained::s3://bucket,"),
        ("az://KEY:pass@container/x", "az://container/x"),
        ("s3://b/part-?.jsonl?key=1", "s3://b/part-"),
        ("https://h/x?SIGNED, and more", "https://h/x, and more"),
        (
            "…/x?accessToken=abc&AWSAccessKeyId=d&apikey=e",
            "…/x?accessToken=***&AWSAccessKeyId=***&apikey=***",
        ),
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
        '{"a":"s3://bucket","b":"x@y"}',
        "s3://a,s3://b/c@d",
        "az://container@account/x and abfss://container@account/a@b",
        "s3://bucket/part-?.jsonl",
        "unknown: &max_tokens=512 ?author=me",
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


def test_json_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, dates and words are looked for in fields alone, whatever they stand for."""
    monkeypatch.setenv("RUN_KEY", "12345678")
    monkeypatch.setenv("APP_PASSWORD", "password")
    hide({"2026-11-30": "${DATE}"}, {"runs/2026-11-30": "runs/${DATE}"})
    hide_password("pg://me:11234567@host/x")
    said = '{"n": 1123456789, "password": "2026-11-30"}'
    assert without_values(said) == said
    assert as_written("runs/2026-11-30") == "runs/${DATE}"


def test_a_long_number_or_word_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYKEY", "1" * 33)
    monkeypatch.setenv("APP_PASSPHRASE", "correct_horse_battery_staple")
    assert shown(f"{'1' * 33}: correct_horse_battery_staple") == "${MYKEY}: ${APP_PASSPHRASE}"


def test_a_path_is_replaced_where_its_last_name_ends() -> None:
    hide({"/home/ann": "${HOME}"}, {"/home/ann_runs": "${HOME}_runs"})
    assert shown("/home/anna/x /mnt/home/ann") == "/home/anna/x /mnt/home/ann"
    assert shown("/home/ann/x, /home/ann.") == "${HOME}/x, ${HOME}."
    assert shown("/home/ann_runs/x") == "${HOME}_runs/x"


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


@pytest.mark.parametrize(
    "part", ["a.", "://", "a://", "a://b:", "a://b?", "a://b?.", "&key", "@", "a:b@"]
)
def test_no_text_takes_long(part: str) -> None:
    """Its cost grows as its length does, whatever it repeats."""
    shown(part * 100_000 + "@")
    hide_password(part * 100_000 + "@")
