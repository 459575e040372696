"""Fields of records: whether one is there, whether it is text, and more than blanks."""

import math
from decimal import Decimal
from typing import Any

from ...storage.errors import RowError

_EXACT = 2**53  # up to here a float holds every whole number


def missing(value: Any) -> bool:
    """Whether there is nothing in a field: null, an empty cell, or NaN.

    Tables have NaN in place of null.
    """
    return value in (None, "") or (isinstance(value, float) and math.isnan(value))


def checked_text(value: Any, name: str, *, if_empty: str | None = None) -> str:
    """The text of a field; a number is what it reads like.

    Raises:
        RowError: it is empty, or no text.
    """
    if missing(value):
        raise RowError("empty", if_empty or f"{name} is empty")
    return checked_string(_written(value), name)


def checked_list(value: Any, name: str, of: str) -> list[Any]:
    """A field that is a list.

    Args:
        value: What it holds.
        name: Of the field.
        of: What each entry is, as a singular.

    Raises:
        RowError: it is none.
    """
    if not isinstance(value, list):
        kind = "text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise RowError("unreadable", f"{name} is {kind}, expected a list with a {of} at each place")
    return value


def checked_string(value: Any, name: str) -> str:
    """A field that is text, and no number.

    Raises:
        RowError: it is no text.
    """
    if not isinstance(value, str):
        raise RowError("unreadable", f"{name} is a {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("unreadable", f"{name} is not valid UTF-8 ({error.reason})") from error
    return value


def _written(value: Any) -> Any:
    """A finite number as text.

    A column of whole numbers with a gap is one of floats: 42.0 is written 42.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    if not math.isfinite(value):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    return str(value)


def checked_words(value: Any, name: str, *, if_empty: str | None = None) -> str:
    """The text of a field that is asked or answered: blanks say nothing.

    Raises:
        RowError: it is empty, no text, or blanks alone.
    """
    text = checked_text(value, name, if_empty=if_empty)
    if not text.strip():
        raise RowError("empty", f"{name} is blanks alone")
    return text
