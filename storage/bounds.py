"""Bounds on what a record may say, asked before anything is made of it.

They are for whole numbers, hashes, paths and depth.

A seal shows that a record was not damaged. It does not show who wrote it: whoever can write one can
seal it. So nothing is counted up to a number, opened under a name or walked into only because a
record says so. What is out of bounds is a ValueError; `understood` makes it an IntegrityError that
names the record.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from .errors import IntegrityError

MOST_ROWS = 2**31 - 1
"""Of a shard: the index of a row is an int32."""
MOST_DEPTH = 100
"""Lists and objects inside one another."""
NOT_AS_WRITTEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What comes of a record that holds something else than its reader expects."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@contextmanager
def understood(name: str, what: str) -> Iterator[None]:
    """Read a record of this kind; `name` is the file, for the message.

    Raises:
        IntegrityError: a field is missing, of another type or out of bounds.
    """
    try:
        yield
    except NOT_AS_WRITTEN as error:
        raise IntegrityError(
            f"{name}: not a {what} of this format ({type(error).__name__}: {error}). Restore the "
            "file from a backup, or write to whom it is from."
        ) from error


def parsed(text: str | bytes) -> Any:
    """JSON that others wrote.

    Raises:
        ValueError: it is none, names a field twice, or is nested deeper than anybody writes.
    """
    try:
        value = json.loads(text, object_pairs_hook=each_once)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    refuse_deep(value)
    return value


def each_once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. A parser takes the last of two fields of one name without a word.

    Raises:
        ValueError: it names a field twice.
    """
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object names {_shown(twice)} twice")
    return found


def refuse_deep(value: Any) -> None:
    """ValueError where a value of JSON is nested deeper than anybody writes."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [part for outer in level for part in _parts(outer)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"lists and objects are nested more than {MOST_DEPTH} deep"


def _parts(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def integer(value: Any, *, least: int = 0, most: int = 2**63 - 1) -> int:
    """A whole number within bounds; 3.0, true and "3" are none."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{_shown(value)} is not a whole number from {least} to {most}")
    return value


def string(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} is not a string")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"{_shown(value)} is not an object")
    return value


def hexdigest(value: Any) -> str:
    """64 hex digits."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{_shown(value)} is not a sha256 (64 hex digits)")
    return value


def seen(text: str) -> bool:
    """Whether every character of a name is one that people see, or a space of any script."""
    return all(char.isprintable() or unicodedata.category(char) == "Zs" for char in text)


def inside(value: Any) -> str:
    """The name of a file below a folder, with forward slashes, that leads nowhere else."""
    path = PurePosixPath(string(value))
    plain = value == str(path) and not path.is_absolute() and seen(value)
    drive = value[1:2] == ":"
    if not plain or drive or "\\" in value or ".." in path.parts or value == ".":
        raise ValueError(f"{_shown(value)} is not the name of a file below its folder")
    return str(value)


def row_groups(value: Any, *, rows: int) -> tuple[int, ...]:
    """Rows of each row group: each has some, and together they are the shard's."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"row groups {_shown(value)} are not a list")
    groups = tuple(integer(group, least=1, most=MOST_ROWS) for group in value)
    if sum(groups) != rows:
        raise ValueError(f"row groups of {sum(groups)} rows together, the shard has {rows}")
    return groups


def _shown(value: Any) -> str:
    shown = ascii(value)  # no escape sequence of a stranger's reaches a terminal
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
