"""Where targets that are off belong: to the position before or after, to other tokens, or to nothing that was read."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .differences import Difference, Fault, Part, Reading, compare
from .numbers import stored_numbers
from .stored_rows import Row
from .teacher_reader import Reader

if TYPE_CHECKING:
    from .differences import Reading


_BOUNDED = {"entropy", "tail_logprob"}  # in a row of a foreign table
_BY_TOKEN = {
    "token_logprob"
}  # of the token that is there: the same under a shift only if it was looked up shifted too


def explain(
    row: Row,
    *,
    reader: Reader,
    read: Sequence[tuple[Row, Reading]],
    limits: Mapping[str, Difference],
) -> tuple[Fault, str]:
    """What is the matter with a row that is off, and the same for people.

    Args:
        row: The row.
        reader: The teacher.
        read: All rows that were read, with their readings; this one too.
        limits: Tolerances per quantity.
    """
    for shift, side in ((1, "after"), (-1, "before")):
        parts = _shifted(row, reader, shift)
        if parts and all(part.within(limits[name]) for name, part in parts.items()):
            return (
                "shifted by one position",
                f"the teacher's at the position {side} their own: shifted by one position",
            )
    if row.imported:  # its entropy is a bound: it does not tell one text from another
        return "other numbers", (
            "other numbers, and not those of the positions beside their own. Another teacher's, "
            "another text's, or not of the whole vocabulary at temperature 1"
        )
    entropy = stored_numbers(row.targets)["entropy"]
    own = next(reading.entropy for other, reading in read if other is row)
    if not _same(entropy, own, row, limits):
        if _same(np.sort(entropy), np.sort(own), row, limits):
            return "other tokens'", "of this row, in another order: they belong to other tokens"
        for other, reading in read:
            if other is not row and _same(entropy, reading.entropy, row, limits):
                return (
                    "other tokens'",
                    f"those of row {other.key.hex()}: they belong to other tokens",
                )
    return "other numbers", (
        "other numbers: neither those of the positions beside their own nor another row's that "
        "was read. Another teacher's under this one's id, or damaged before they were written"
    )


def _shifted(row: Row, reader: Reader, shift: int) -> dict[str, Part]:
    """The row's targets against the teacher's distribution `shift` positions on.

    Without the first and the last one, if there are more: what shifted them may have had nothing to
    put there.
    """
    start, n = row.span
    inner = slice(1, n - 1) if n > 2 else slice(0, n)
    position = start - 1 + shift + inner.start
    if position < 0:
        return {}
    targets = row.targets.positions(inner)
    measured = reader.measured(row, targets, position=position)
    stored = stored_numbers(targets)
    parts = compare(stored, measured, measured, bits=row.columns["mantissa_bits"])
    left_out = _BY_TOKEN | (_BOUNDED if row.imported else set())
    return {name: part for name, part in parts.items() if name not in left_out}


def _same(
    stored: np.ndarray, measured: np.ndarray, row: Row, limits: Mapping[str, Difference]
) -> bool:
    """Whether two lists of entropies are one, as far as both go."""
    n = min(len(stored), len(measured))
    stored, measured = stored[:n], measured[:n]
    (part,) = compare(
        {"entropy": stored},
        {"entropy": measured},
        {"entropy": measured},
        bits=row.columns["mantissa_bits"],
    ).values()
    return n > 1 and part.within(limits["entropy"])
