"""Fields of records: whether one is there, and whether it is text."""

from typing import Any

from ...storage.errors import RowError


def missing(value: Any) -> bool:
    """Whether there is nothing in a field."""
    return value in (None, "")


def checked_text(value: Any, name: str, *, if_empty: str | None = None) -> str:
    """The text of a field.

    Raises:
        RowError: it is empty, or no text.
    """
    if missing(value):
        raise RowError("empty", if_empty or f"{name} is empty")
    if not isinstance(value, str):
        raise RowError("unreadable", f"{name} is a {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("unreadable", f"{name} is not valid UTF-8 ({error.reason})") from error
    return value
