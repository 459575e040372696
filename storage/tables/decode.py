"""The soft targets of many rows at once: rows that are stored alike are read as one long row and then cut."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from .rows import Rows
from .soft_targets import SoftTargets

LISTS = (
    *("entries", "ids", "logprobs", "counts", "weights", "tail_logprob", "token_logprob", "entropy"),
    *("temperatures", "tempered_tails"),
)
"""The list columns that hold a distribution: with `k` and `span_tokens`, all that `normalised_targets` reads."""
_PER_ENTRY = {"ids", "logprobs", "counts", "weights"}
_VALUES = 1 << 17  # entries normalised at once: more would leave the processor's cache


def normalised_targets(rows: Rows) -> Iterator[SoftTargets]:
    """`SoftTargets.from_row(row).normalised()` of each row; neighbours share memory.

    Raises:
        IntegrityError: a list does not have the length that its row asks for, or a position has no probability.
    """
    spans, k = rows.numbers("span_tokens").astype(np.int64), rows.numbers("k").astype(np.int64)
    stored = np.stack([rows.present(name) for name in LISTS], axis=1)
    for row in np.flatnonzero(~_aligned(rows, spans, k)):
        SoftTargets.from_row(rows[row])  # raises
    for start, stop in _runs(np.column_stack([k, stored, _temperatures(rows)]), spans * k):
        edges = np.concatenate([[0], np.cumsum(spans[start:stop])]).tolist()
        lists = {name: rows.flat(name) for name, there in zip(LISTS, stored[start], strict=True) if there}
        part = {name: values[offsets[start] : offsets[stop]] for name, (offsets, values) in lists.items()}
        if "temperatures" in lists:  # one list for all of the run
            offsets, values = lists["temperatures"]
            part["temperatures"] = values[offsets[start] : offsets[start + 1]]
        whole = SoftTargets.from_row({"span_tokens": edges[-1], "k": int(k[start]), **part}).normalised()
        yield from (whole.positions(slice(*pair)) for pair in pairwise(edges))


def _aligned(rows: Rows, spans: np.ndarray, k: np.ndarray) -> np.ndarray:
    """[R] whether the row's lists have the lengths that its spans, k and entries ask for."""
    offsets, entries = rows.flat("entries")
    counted = np.concatenate([[0], np.cumsum(entries, dtype=np.int64)])[offsets]
    total = np.where(rows.present("entries"), np.diff(counted), spans * k)
    expected = dict.fromkeys(LISTS, spans) | dict.fromkeys(_PER_ENTRY, total)
    expected["temperatures"] = np.diff(rows.flat("temperatures")[0])
    expected["tempered_tails"] = spans * expected["temperatures"]
    fits = np.ones(len(rows), bool)
    for name in LISTS:
        fits &= ~rows.present(name) | (np.diff(rows.flat(name)[0]) == expected[name])
    return fits


def _temperatures(rows: Rows) -> np.ndarray:
    """[R] a number for each row's list of temperatures; equal lists have equal numbers."""
    offsets, values = rows.flat("temperatures")
    if not len(values):
        return np.zeros(len(rows), np.int64)
    numbers: dict[bytes, int] = {}
    lists = (values[start:stop].tobytes() for start, stop in pairwise(offsets))
    return np.array([numbers.setdefault(found, len(numbers)) for found in lists])


def _runs(kinds: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Neighbouring rows of one kind, no more together than a cache holds."""
    changes = (kinds[1:] != kinds[:-1]).any(axis=1).tolist()
    start, held = 0, 0
    for row, (size, changed) in enumerate(zip(sizes.tolist(), [*changes, True], strict=True)):
        held += size
        if changed or held >= _VALUES:
            yield start, row + 1
            start, held = row + 1, 0
