"""Matrices, checked against their records; and rows that name one which is not there any more."""

from collections.abc import Container, Iterator

import numpy as np

from ..errors import IntegrityError
from ..files.base import Files
from ..store.commits import listed, near, read_commit, record_name
from ..store.matrices import (
    kept_matrix,
    matrix_file,
    names,
    projection_ids,
    read_matrix,
    record_file,
)
from ..tables.shard import ShardFile
from .shards import Problem


def matrix_problems(files: Files, named: set[str], sound: Container[str]) -> Iterator[Problem]:
    """What is wrong with them.

    A matrix that is damaged goes with its record, and with it the rows that it belongs to: what is
    made again need not have the same bits.

    Args:
        files: The store's.
        named: Takes the files that records and rows name.
        sound: Names of the shards without a problem.
    """
    for name in names(files):
        record = record_file(name)
        named.add(record)
        try:
            kept = kept_matrix(files, name)
        except IntegrityError as error:
            yield Problem(record, None, None, str(error), (record,))
            continue
        if kept is None:  # removed a moment ago
            continue
        named.add(kept.file)
        if message := _wrong(files, kept.id):
            there = (kept.file,) if files.exists(kept.file) else ()
            yield Problem(kept.file, None, None, message, (record, *there))
    known: dict[str, str | None] = {}
    for seq, matrix_id in _of_rows(files, sound):
        named.add(matrix_file(matrix_id))
        if matrix_id not in known:
            known[matrix_id] = _wrong(files, matrix_id)
        if message := known[matrix_id]:
            record = record_name("features", seq)
            yield Problem(record, "projection", None, message, (record,))


def _of_rows(files: Files, sound: Container[str]) -> Iterator[tuple[int, str]]:
    """(commit, matrix) of all live rows that name one; what is wrong with others is known already."""
    withdrawn = set(listed(files, "features", "retired"))
    for seq in near(listed(files, "features", "commits")):
        if seq in withdrawn:
            continue
        try:
            record = read_commit(files, "features", seq)
        except IntegrityError:
            continue
        if record is not None and record[0].shard.name in sound:
            for matrix_id in sorted(projection_ids(ShardFile(files, record[0].shard.name))):
                yield seq, matrix_id


def _wrong(files: Files, matrix_id: str) -> str | None:
    """What is wrong with a matrix."""
    name = matrix_file(matrix_id)
    try:
        if files.sha256(name)[:32] != matrix_id:  # where it lies: a copy may be whole
            return f"{name}: the matrix is damaged (its sha256 is another one)"
        found = read_matrix(files, matrix_id)
    except FileNotFoundError:
        return f"{name}: the matrix is missing"
    except IntegrityError as error:
        return str(error)
    rows = (found[start : start + 4096] for start in range(0, len(found), 4096))
    if not all(np.isfinite(part).all() for part in rows):
        return f"{name}: a number of the matrix is not finite"
    return None
