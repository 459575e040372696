"""Matrices, checked against their records; and rows that name one which is not there any more."""

from collections.abc import Container, Iterator

import numpy as np

from ..errors import IntegrityError
from ..files.base import Files
from ..snapshots.snapshot import Snapshot
from ..store.commits import listed, near, read_commit, record_name
from ..store.matrices import (
    NAMING,
    NamedMatrix,
    kept_matrix,
    matrix_file,
    named_matrices,
    names,
    read_matrix,
    record_file,
)
from ..store.store import Store
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
            said = message.removeprefix(f"{kept.file}: ")
            yield Problem(kept.file, None, None, said, (record, *there))
    known: dict[NamedMatrix, str | None] = {}
    for seq, one in _of_rows(files, sound):
        named.add(matrix_file(one.id))
        if one not in known:
            known[one] = _wrong(files, one.id, one.shape)
        if message := known[one]:
            record = record_name("features", seq)
            yield Problem(record, "projection", None, message, (record,))


def check_matrices(store: Store, features: Snapshot) -> None:
    """See that the matrices are there which rows of a snapshot name.

    Raises:
        IntegrityError: one is missing, damaged, or of another shape than its rows say.
    """
    known: set[NamedMatrix] = set()
    for shard in features.shards:
        rows = store.shard(features.table, shard.sha256).select(shard.rows, NAMING)
        for one in named_matrices(rows) - known:
            shape = store.matrix(one.id).shape
            if shape != one.shape:
                raise IntegrityError(f"{shard.name}: {_of_another_shape(one.id, shape, one.shape)}")
            known.add(one)


def _of_rows(files: Files, sound: Container[str]) -> Iterator[tuple[int, NamedMatrix]]:
    """(commit, matrix) of all live rows that name one.

    Rows of damaged commits and shards are left out: they are reported elsewhere.
    """
    withdrawn = set(listed(files, "features", "retired"))
    for seq in near(listed(files, "features", "commits")):
        if seq in withdrawn:
            continue
        try:
            record = read_commit(files, "features", seq)
        except IntegrityError:
            continue
        if record is not None and record[0].shard.name in sound:
            rows = ShardFile(files, record[0].shard.name).read_all(NAMING)
            yield from ((seq, one) for one in sorted(named_matrices(rows)))


def _wrong(files: Files, matrix_id: str, shape: tuple[int, int] | None = None) -> str | None:
    """What is wrong with a matrix; `shape`: that it should have."""
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
    if shape is not None and found.shape != shape:
        return _of_another_shape(matrix_id, found.shape, shape)
    return None


def _of_another_shape(matrix_id: str, found: tuple[int, ...], expected: tuple[int, int]) -> str:
    return (
        f"{matrix_file(matrix_id)}: the matrix is {' x '.join(map(str, found))}, and rows that "
        f"name it say {' x '.join(map(str, expected))}"
    )
