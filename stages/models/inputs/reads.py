"""Whether a model can read a text: it has every token's id, and room for all of them."""

from typing import Any

from ....storage.errors import RowError, UsageError
from ..fit.config import usable_positions
from ..fit.parts import text_config


def check_ids(highest: int, vocab_size: int, what: str, *, where: str = "") -> None:
    """Refuse a text with an id that the student does not have.

    An embedding would refuse it in its own words.

    Args:
        highest: The highest id of the text.
        vocab_size: Ids that the student has.
        what: Subject and verb of the message: `the text has`.
        where: Which text it is, where that is known.

    Raises:
        UsageError: it does not have that id.
    """
    if highest < vocab_size:
        return
    raise UsageError(
        f"student: its vocabulary has {vocab_size} ids, but {what} token {highest}{where}. Choose "
        "a student with the teacher's tokenizer and at least its vocabulary."
    )


def context_of(model: Any) -> int | None:
    """Tokens that a model reads at once; None: as many as there are."""
    return usable_positions(text_config(model.config))


def too_long(tokens: int, most: int, *, limit: str, what: str = "") -> RowError:
    """How a row is rejected for its length.

    Args:
        tokens: Of the row.
        most: That there may be.
        limit: Whose limit that is, as the begin of a sentence: `the teacher reads`.
        what: Which tokens, where that does not show.
    """
    return RowError("too_long", f"{what}{tokens} tokens; {limit} {most}")


def check_length(tokens: int, model: Any, what: str) -> None:
    """Refuse a text that is longer than the student's context; `what` as of `check_ids`.

    Raises:
        UsageError: it is.
    """
    most = context_of(model)
    if most is None or tokens <= most:
        return
    raise UsageError(
        f"student: reads at most {most} tokens at once, {what} {tokens}. Lower data.max_tokens, "
        "data.window_tokens or generate.max_tokens, or take a student with a longer context."
    )
