"""What is the matter with a row whose targets are off.

They may be another position's, other tokens', or nobody's that was read.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np

from .differences import Quantity, SecondReading, compare, difference, rounding, slack_of
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

    Of several spans it names those that are off.

    Args:
        reading: Of the row.
        reader: The teacher.
        readings: Of all rows, this one too.
        limits: How far each quantity may be off.
    """
    row, off = reading.row, reading.row.parts
    if len(off) > 1:
        off = [part for part in off if not _fits(row, reader, part, limits=limits)] or off
    fault, message = _fault(reading, off, reader=reader, readings=readings, limits=limits)
    if len(off) == len(row.parts):
        return fault, message
    starts = ", ".join(str(row.index(part)) for part in off)
    return fault, f"{message} (the spans from index {starts}; the others are right)"


def _fault(
    reading: SecondReading,
    off: Sequence[slice],
    *,
    reader: TeacherReader,
    readings: Sequence[SecondReading],
    limits: Mapping[str, Quantity],
) -> tuple[Fault, str]:
    """What is the matter with the targets of the spans that are off.

    `off` says which of the N targets they have.
    """
    row = reading.row
    # The first and the last of a span are left out if there are more: what shifted the targets may
    # have had nothing to put there.
    inner = _indices([slice(p.start + 1, p.stop - 1) if p.stop - p.start > 2 else p for p in off])
    for shift, side in ((1, "after"), (-1, "before")):
        if _fits(row, reader, inner, shift=shift, limits=limits):
            fits = f"the teacher's at the position {side} their own: shifted by one position"
            return "shifted by one position", fits
    # From here on a text is known by its entropies. Those of an imported row are bounds, and of an
    # engine's best entries, which do not tell one text from another.
    if row.imported or row.entropy_is_bound:
        return "other numbers", (
            "other numbers, and not those of the positions beside their own. Another teacher's, "
            "another text's, or not of the whole vocabulary at temperature 1"
        )
    entropy, there = stored_numbers(row.targets)["entropy"], _indices(off)
    same = partial(_same, bits=row.columns["mantissa_bits"], limit=limits["entropy"])
    if not same(entropy[there], reading.entropy[there]):
        if same(np.sort(entropy[there]), np.sort(reading.entropy[there])):
            return "other tokens'", "of this row, in another order: they belong to other tokens"
        for whose, other in _others(reading, readings):
            if same(entropy[there], other) or same(entropy[off[0]], other):
                return "other tokens'", f"those of {whose}: they belong to other tokens"
    return "other numbers", (
        "other numbers: neither those of the positions beside their own nor another row's that "
        "was read. Another teacher's under this one's id, or damaged before they were written"
    )


def _others(
    reading: SecondReading, readings: Sequence[SecondReading]
) -> Iterator[tuple[str, np.ndarray]]:
    """Whose targets those of a row may be, in words, and the entropies there.

    Other rows come first, then any span.
    """
    for other in readings:
        if other is not reading:
            yield f"row {other.row.key.hex()}", other.entropy
    for other in readings:
        if len(other.row.parts) > 1:
            for part in other.row.parts:
                whose = f"the span from index {other.row.index(part)} of row {other.row.key.hex()}"
                yield whose, other.entropy[part]


def _fits(
    row: StoredRow,
    reader: TeacherReader,
    part: slice | np.ndarray,
    *,
    shift: int = 0,
    limits: Mapping[str, Quantity],
) -> bool:
    """Whether some of the row's targets are the teacher's `shift` positions on."""
    positions = row.predicting[part] + shift
    if positions.min() < 0 or positions.max() >= len(row.token_ids):
        return False
    targets = row.targets.positions(part)
    stored = stored_numbers(targets)
    measured = reader.numbers(row, targets, positions=positions)
    if row.entropy_is_bound:
        stored["entropy"] = np.maximum(stored["entropy"], measured["entropy"])
    slack = slack_of(row, stored, part)
    found = compare(stored, measured, again=measured, slack=slack)
    # Shifted, `token_logprob` would fit only if the token, too, was looked up in the wrong place.
    # Of an imported row the entropy and the tail are bounds.
    named = {"logprobs"} if row.imported else found.keys() - ({"token_logprob"} if shift else set())
    return all(found[name].within(limits[name]) for name in named)


def _indices(parts: Sequence[slice]) -> np.ndarray:
    return np.concatenate([np.arange(part.start, part.stop) for part in parts])


def _same(stored: np.ndarray, measured: np.ndarray, *, bits: int, limit: Quantity) -> bool:
    """Whether two texts have the same entropies, as far as both go; one position says nothing."""
    n = min(len(stored), len(measured))
    stored, measured = stored[:n], measured[:n]
    slack = rounding(stored, bits)
    return n > 1 and difference(stored, measured, again=measured, slack=slack).within(limit)
