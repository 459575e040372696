"""Fields of records: whether one is there, whether it is text, and whether the text is more than blanks."""

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


def checked_words(value: Any, name: str, *, if_empty: str | None = None) -> str:
    """The text of a field that is asked or answered: blanks say nothing.

    Raises:
        RowError: it is empty, no text, or blanks alone.
    """
    text = checked_text(value, name, if_empty=if_empty)
    if not text.strip():
        raise RowError("empty", f"{name} is blanks alone")
    return text
