"""What is neither shown nor recorded: credentials in addresses, and what `${NAME}` in a recipe stands for.

Whoever writes text for people or for the disk passes it through here. Two kinds of secrets are
known by their form (name, password and query of an address), three by their value: what `${NAME}`
in a recipe stood for, environment variables whose names say that they are secret (`HF_TOKEN`,
`AWS_SECRET_ACCESS_KEY`), and passwords in addresses that the environment or the recipe holds.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO, cast
from urllib.parse import quote, unquote

SHORTEST = 8
"""Characters of a value that is looked for inside of other text; of a path, which begins with `/`,
fewer do."""
CUT = "***"

_SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|_KEY|ACCESS_KEY_ID)$", re.I)
# hf://datasets/USER/NAME@REVISION has an @, and host:443/ a colon, without any credentials. Lengths
# have bounds, so that no text takes long.
_SCHEME = r"\b[\w+.-]{1,20}://"
_PORT = r"(?!\d+(?:[/?#\s]|$))"
_TO_THE_AT = r"(?:[^\s@]{0,2000}+@)+"  # to the last @: a key may hold any character
_USER = re.compile(rf"({_SCHEME})(?:[^\s/@]{{0,2000}}+@|[^\s/@:]{{1,200}}:{_PORT}{_TO_THE_AT})")
_PASSWORD = re.compile(rf"{_SCHEME}[^\s/@:]{{0,200}}:{_PORT}({_TO_THE_AT})")
_ENDS = r"(?=[:.,;)]{0,3}(?:[\s'\"<>]|$))"  # a sentence goes on behind an address
_PLACE = rf"{_SCHEME}[^\s?#'\"<>]{{0,2000}}"
_QUERY = re.compile(rf"({_PLACE})(?:\?|#(?=[^\s'\"<>]{{0,500}}=))[^\s'\"<>]*?{_ENDS}")
# What is left of an address where a library names host and path apart.
_SECRET_WORDS = "token|secret|sig|password|passwd|credential|key|auth"
_ARGUMENT = re.compile(
    rf"([?&][\w.%-]{{0,40}}?(?:{_SECRET_WORDS})[\w.%-]{{0,40}}=)[^\s&'\"<>]+", re.I
)

_WORD = re.compile(r"[a-z_]+")

_values: dict[str, str] = {}  # what is not shown -> what is shown in its place
_fields: dict[str, str] = {}  # a field's text -> the same as the recipe has it


def hide(values: Mapping[str, str], fields: Mapping[str, str]) -> None:
    """Show what stands in a recipe in place of what it stands for, from now on, in this process.

    Args:
        values: Value -> `${NAME}`.
        fields: A field's text -> the same as written, with `${NAME}` in it.
    """
    # A run may be called `baseline`, a word that messages and `--json` are full of.
    _values.update({value: name for value, name in values.items() if not _WORD.fullmatch(value)})
    _fields.update(fields)


def hide_password(address: str) -> bool:
    """Never show the password of an address, wherever a library repeats it; whether it has one."""
    passwords = list(_passwords(address))
    for password in passwords:
        _values.update(dict.fromkeys((password, unquote(password)), CUT))
    return bool(passwords)


def hidden() -> dict[str, dict[str, str]]:
    """The arguments of `hide` that another process needs to hide the same."""
    return {"values": dict(_values), "fields": dict(_fields)}


def show_again() -> None:
    """Forget what was hidden."""
    _values.clear()
    _fields.clear()


def without_values(text: str) -> str:
    """A text, whatever it is, without the values that are hidden."""
    for value, name in sorted(_looked_for(), key=lambda found: -len(found[0])):
        if value in text:
            text = _replaced(text, value, name)
    return text


def shown(text: str) -> str:
    """A message, or an address in it, without hidden values and without credentials."""
    text = _USER.sub(r"\1", without_values(text))
    return _ARGUMENT.sub(rf"\1{CUT}", _QUERY.sub(r"\1", text))


def as_written(field: str) -> str:
    """The text of a recipe's field as the recipe has it, without credentials: what a record keeps."""
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


def _passwords(address: str) -> Iterator[str]:
    for found in _PASSWORD.findall(address):
        yield found[:-1]  # without the @ that ends it


def _replaced(text: str, value: str, name: str) -> str:
    if len(value) >= SHORTEST:
        return text.replace(value, name)
    # /data of /data/texts, not of /mnt/data or of /database
    return re.sub(rf"(?<![\w.~-]){re.escape(value)}(?![\w.-])", lambda _: name, text)


def _looked_for() -> Iterator[tuple[str, str]]:
    """Values, in every form in which they may stand in a text."""
    for value, name in (*_values.items(), *_of_the_environment()):
        value = value.rstrip("/")
        if len(value) < SHORTEST and not (value.startswith("/") and len(value) > 1):
            continue
        for form in {value, quote(value), quote(value, safe=""), json.dumps(value)[1:-1]}:
            yield form, name


def _of_the_environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name):
            yield value, f"${{{name}}}"
        elif "@" in value:
            for password in _passwords(value):
                yield password, CUT
