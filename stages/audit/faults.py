"""What is the matter with a row whose targets are off: another position's, other tokens', or nobody's that was read."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from .differences import Quantity, SecondReading, compare, difference, rounding
from .numbers import stored_numbers
from .stored_rows import StoredRow
from .teacher_reader import TeacherReader

Fault = Literal["shifted by one position", "other tokens'", "other numbers"]


def explain(
    reading: SecondReading,
    *,
    reader: TeacherReader,
    readings: Sequence[SecondReading],
    limits: Mapping[str, Quantity],
) -> tuple[Fault, str]:
    """The fault of a row that is off, and the same in words.

    Args:
        reading: Of the row.
        reader: The teacher.
        readings: Of all rows, this one too.
        limits: How far each quantity may be off.
    """
    row = reading.row
    for shift, side in ((1, "after"), (-1, "before")):
        if _fits_shifted(row, reader, shift=shift, limits=limits):
            fits = f"the teacher's at the position {side} their own: shifted by one position"
            return "shifted by one position", fits
    # From here on a text is known by its entropies. Those of an imported row are bounds, which do
    # not tell one text from another.
    if row.imported:
        return "other numbers", (
            "other numbers, and not those of the positions beside their own. Another teacher's, "
            "another text's, or not of the whole vocabulary at temperature 1"
        )
    entropy, limit = stored_numbers(row.targets)["entropy"], limits["entropy"]
    bits = row.columns["mantissa_bits"]
    if not _same(entropy, reading.entropy, bits=bits, limit=limit):
        if _same(np.sort(entropy), np.sort(reading.entropy), bits=bits, limit=limit):
            return "other tokens'", "of this row, in another order: they belong to other tokens"
        for other in readings:
            if other is not reading and _same(entropy, other.entropy, bits=bits, limit=limit):
                whose = f"those of row {other.row.key.hex()}: they belong to other tokens"
                return "other tokens'", whose
    return "other numbers", (
        "other numbers: neither those of the positions beside their own nor another row's that "
        "was read. Another teacher's under this one's id, or damaged before they were written"
    )


def _fits_shifted(
    row: StoredRow, reader: TeacherReader, *, shift: int, limits: Mapping[str, Quantity]
) -> bool:
    """Whether the row's targets are the teacher's `shift` positions on."""
    # The first and the last are left out if there are more: what shifted the targets may have had
    # nothing to put there.
    n = row.span_tokens
    inner = slice(1, n - 1) if n > 2 else slice(0, n)
    positions = row.predicting[inner] + shift
    if positions.min() < 0:
        return False
    targets = row.targets.positions(inner)
    stored = stored_numbers(targets)
    measured = reader.numbers(row, targets, positions=positions)
    found = compare(stored, measured, again=measured, bits=row.columns["mantissa_bits"])
    # `token_logprob` would fit only if the token, too, was looked up in the wrong place. Of an
    # imported row the entropy and the tail are bounds.
    named = {"logprobs"} if row.imported else found.keys() - {"token_logprob"}
    return all(found[name].within(limits[name]) for name in named)


def _same(stored: np.ndarray, measured: np.ndarray, *, bits: int, limit: Quantity) -> bool:
    """Whether two texts have the same entropies, as far as both go; one position says nothing."""
    n = min(len(stored), len(measured))
    stored, measured = stored[:n], measured[:n]
    slack = rounding(stored, bits)
    return n > 1 and difference(stored, measured, again=measured, slack=slack).within(limit)
