"""What is wrong with the rows of a row group: all of them at once, then the wrong ones by name.

Neighbours of one kind are asked as one long row (`tables/invariants.runs`). Where that is sound,
all of them are; else each is asked alone. So whatever a row is asked stands in one place.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import IntegrityError
from ..tables.doubts import Doubt, doubts
from ..tables.features import doubtful_features
from ..tables.invariants import check_shape, runs
from ..tables.rows import Rows
from ..tables.schema import TableName
from ..tables.shard import ShardFile

Fault = tuple[int, str | None, str]
"""A row's number in its row group, a column where it is known, and what is wrong."""
FATAL = (None, "key", "token_ids", "ids")
"""Columns whose faults nobody can mean: rows that cannot be read, told apart or looked up."""
_UNREADABLE = (ArithmeticError, LookupError, TypeError, ValueError)
"""What numpy and Arrow say of numbers that cannot be a row."""


def faults(table: TableName, rows: Rows, about: Mapping[str, Any]) -> Iterator[Fault]:
    """What is wrong with the rows of a row group: shape, numbers, keys that are there twice."""
    row = 0
    try:
        for fault in _faults(table, rows, about):
            row = fault[0]
            yield fault
    except _UNREADABLE as error:  # what they have in common already cannot be
        said = f"the rows from here on cannot be read ({type(error).__name__}: {error})"
        yield row, None, said


def _faults(table: TableName, rows: Rows, about: Mapping[str, Any]) -> Iterator[Fault]:
    keys = rows.keys()
    first, at = np.unique(keys, return_index=True)
    if len(first) < len(keys):
        for row in np.setdiff1d(np.arange(len(keys)), at).tolist():
            yield row, "key", "another row of this row group has the same key"
    if table == "soft_targets":
        for run in runs(rows, about):
            found = None if run.row is None else _first_doubt(run.row, about, run.edges)
            if run.row is None or found is not None:
                yield from _named(rows, about, range(run.start, run.stop), found)
    elif table == "generations":
        tokens = np.diff(rows.flat("token_ids")[0])
        sums = rows.numbers("prompt_tokens").astype(np.int64) + rows.numbers("completion_tokens")
        lowest = np.minimum(rows.numbers("prompt_tokens"), rows.numbers("completion_tokens"))
        offsets, ids = rows.flat("token_ids")
        below = np.add.reduceat(np.append(ids < 0, False), offsets[:-1]) * (tokens > 0)
        suspect = (sums != tokens) | (lowest < 0) | rows.present("spans") | (below > 0)
        for row in np.flatnonzero(suspect).tolist():
            for column, message in row_faults(table, rows[row], about):
                yield row, column, message
    elif table == "features":
        for row in range(len(rows)):
            for column, message in row_faults(table, rows[row], about):
                yield row, column, message


def row_faults(
    table: TableName, row: Mapping[str, Any], about: Mapping[str, Any]
) -> Iterator[tuple[str | None, str]]:
    """A column where it is known, and what is wrong with one row."""
    try:
        check_shape(table, row, about)
        if table == "soft_targets":
            yield from doubts(row, about)
        elif table == "generations" and np.min(row["token_ids"], initial=0) < 0:
            yield "token_ids", "a token id is below 0"
        elif table == "features":
            yield from doubtful_features(row)
    except IntegrityError as error:
        yield None, str(error)
    except _UNREADABLE as error:
        yield None, f"it cannot be read as a row ({type(error).__name__}: {error})"


def repeated_feature(file: ShardFile) -> str | None:
    """The first row of `features` that has the name of one before it, whatever their keys say."""
    names = ["text_key", "kind", "layer", "dtype"]
    columns = file.read_all(names).to_pydict()
    first: dict[tuple[Any, ...], int] = {}
    for row, name in enumerate(zip(*(columns[one] for one in names), strict=True)):
        if first.setdefault(name, row) != row:
            return (
                f"row {row}: row {first[name]} has {name[1]} of layer {name[2]} of the same text "
                f"({name[0].hex()}) in {name[3]}"
            )
    return None


def _first_doubt(
    row: Mapping[str, Any], about: Mapping[str, Any], edges: np.ndarray
) -> Doubt | None:
    """The first thing that is wrong with a long row, whichever of its rows it is in."""
    try:
        return next(doubts(row, about, edges), None)
    except (IntegrityError, *_UNREADABLE) as error:
        return "", str(error)


def _named(rows: Rows, about: Mapping[str, Any], of: range, found: Doubt | None) -> Iterator[Fault]:
    """The faults of some rows, of which one has some; `found`: what all of them together have."""
    alone = True
    for row in of:
        for column, message in row_faults("soft_targets", rows[row], about):
            alone = False
            yield row, column, message
    if alone and found is not None:
        column, message = found
        yield of.start, column or None, f"this row and the next {len(of) - 1} together: {message}"
