"""What is neither shown nor recorded: credentials, and what `${NAME}` in a recipe stands for.

Whoever writes text for people or for the disk passes it through here. Two kinds of secrets are
known by their form (name, password and query of an address), three by their value: what `${NAME}`
in a recipe stood for, environment variables whose names say that they are secret (`HF_TOKEN`,
`AWS_SECRET_ACCESS_KEY`), and passwords in addresses that the environment or the recipe holds.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TextIO, cast
from urllib.parse import quote, unquote

_SHORTEST = 8
"""Characters of a value that is looked for inside of other text; of a path, which begins with `/`,
fewer do."""
CUT = "***"

_SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|KEY|ACCESS_KEY_ID)$", re.I)
# An address is looked for in one word at a time, and nothing is read twice: no text takes long.
_WORD = re.compile(r"[^\s\"<>]++")
_UNQUOTED = re.compile(r"[^\s'\"<>]++")
_SCHEME = re.compile(r"\b[\w+.-]{1,20}://")
# hf://datasets/USER/NAME@REVISION has an @, host:443/ a colon, az://CONTAINER@ACCOUNT what looks
# like a name, s3://a,s3://b/c@d (so no name has a comma) all of it, without any credentials.
_PORT = r"(?!\d+(?:[/?#]|$))"
_CONTAINER = r"(?!(?:az|abfss?|wasbs?)://[^/@:]+@)"
# A password goes on to the last @, for a key may hold any character.
_USER = re.compile(
    rf"{_CONTAINER}({_SCHEME.pattern})(?:[^/@]{{0,2000}}+@|[^/@:,]{{1,200}}:{_PORT}.*@)"
)
_PASSWORD = re.compile(rf"{_SCHEME.pattern}[^/@:,]{{0,200}}:{_PORT}(.*)@")
# A query; in s3://bucket/part-?.jsonl, ? is any character.
_ASKS = re.compile(r"\?(?=[\w%])|[?#](?=[^=]{0,500}+=)")
_ENDING = re.compile(r"[:.,;)]{0,3}$")  # a sentence goes on behind an address
# What is left of an address where a library names host and path apart. The name of a secret ends in
# one of these words; max_tokens and author do not.
_SECRET_WORDS = (
    "token|secret|sig|signature|password|passwd|credentials?|key|key_?id|auth|authorization"
)
_ARGUMENT = re.compile(rf"([?&][\w.%-]{{0,40}}?(?:{_SECRET_WORDS})=)[^\s&'\"<>]+", re.I)
# Words, numbers and dates, of which messages and `--json` are full: a run may be called `baseline`.
_PLAIN = re.compile(r"[a-z_]{1,24}|[\d.,:eTZ_+-]{1,32}")

_values: dict[str, str] = {}  # what is not shown -> what is shown in its place
_fields: dict[str, str] = {}  # a field's text -> the same as the recipe has it


def hide(values: Mapping[str, str], fields: Mapping[str, str]) -> None:
    """Show what stands in a recipe in place of what it stands for, from now on, in this process.

    Args:
        values: Value -> `${NAME}`.
        fields: A field's text -> the same as written, with `${NAME}` in it.
    """
    _values.update(values)
    _fields.update(fields)
    _looked_for.cache_clear()


def hide_password(address: str) -> bool:
    """Never show the password of an address, wherever a library repeats it; whether it has one."""
    passwords = list(_passwords(address))
    for password in passwords:
        _values.update(dict.fromkeys((password, unquote(password)), CUT))
    _looked_for.cache_clear()
    return bool(passwords)


def hidden() -> dict[str, dict[str, str]]:
    """The arguments of `hide` that another process needs to hide the same."""
    return {"values": dict(_values), "fields": dict(_fields)}


def show_again() -> None:
    """Forget what was hidden; for tests, of which none hides what the next one shows."""
    _values.clear()
    _fields.clear()
    _looked_for.cache_clear()


def without_values(text: str) -> str:
    """A text, whatever it is, without the values that are hidden."""
    for value, name in _looked_for():
        if value in text:
            text = _replaced(text, value, name)
    return text


def shown(text: str) -> str:
    """A message, or an address in it, without hidden values and without credentials."""
    text = _WORD.sub(_without_user, without_values(text))
    return _ARGUMENT.sub(rf"\1{CUT}", _UNQUOTED.sub(_without_query, text))


def as_written(field: str) -> str:
    """The text of a field as the recipe has it, without credentials: what a record keeps."""
    return shown(_fields.get(field, field))


def all_shown(content: Any) -> Any:
    """Every text in lists and mappings, their keys as well, as `as_written` gives it."""
    if isinstance(content, Mapping):
        return {as_written(str(name)): all_shown(part) for name, part in content.items()}
    if isinstance(content, list | tuple):
        return [all_shown(part) for part in content]
    return as_written(content) if isinstance(content, str) else content


def cleaned(stream: TextIO, how: Callable[[str], str]) -> TextIO:
    """A stream into which every text is written as `how` gives it: `shown`, or `without_values`."""
    return cast(TextIO, _Cleaned(stream, how))


class _Cleaned:
    """A text stream: what is written into it is cleaned, all else is the stream's own."""

    def __init__(self, stream: TextIO, how: Callable[[str], str]) -> None:
        self._stream, self._how = stream, how

    def write(self, text: str) -> int:
        self._stream.write(self._how(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _without_user(word: re.Match[str]) -> str:
    if "://" not in word[0]:
        return word[0]
    head, at, rest = word[0].rpartition("@")
    return _USER.sub(r"\1", head + at) + rest


def _without_query(word: re.Match[str]) -> str:
    scheme = _SCHEME.search(word[0]) if "://" in word[0] else None
    asks = _ASKS.search(word[0], scheme.end()) if scheme else None
    if asks is None:
        return word[0]
    ending: str = _ENDING.findall(word[0], asks.end())[0]
    return word[0][: asks.start()] + ending


def _passwords(address: str) -> Iterator[str]:
    for word in _WORD.findall(address):
        head, at, _ = word.rpartition("@")
        yield from _PASSWORD.findall(head + at)


def _replaced(text: str, value: str, name: str) -> str:
    if not value.startswith("/"):
        return text.replace(value, name)
    # /data of /data/texts and of /data.old, not of /mnt/data or of /database
    return re.sub(rf"(?<![\w.~-]){re.escape(value)}(?!\w)", lambda _: name, text)


@cache  # it is asked for with every line that is written
def _looked_for() -> list[tuple[str, str]]:
    """Values, in every form in which they may stand in a text, and what is shown for each.

    The longest come first.

    Fields as a whole too: of `${HOME}_runs`, what HOME stands for is no whole name in a path.
    """
    found = set()
    for value, name in (*_values.items(), *_fields.items(), *_of_the_environment()):
        value = value.rstrip("/")
        if _PLAIN.fullmatch(value) or len(value) < (2 if value.startswith("/") else _SHORTEST):
            continue
        for form in (value, quote(value), quote(value, safe=""), json.dumps(value)[1:-1]):
            found.add((form, name))
    return sorted(found, key=lambda pair: (-len(pair[0]), pair))


def _of_the_environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name):
            yield value, f"${{{name}}}"
        elif "@" in value:
            for password in _passwords(value):
                yield password, CUT
