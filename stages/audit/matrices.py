"""Deep verification of matrices that a store keeps.

These are a teacher's embeddings, and projections, made again from their seed.

What is kept may be off from what is right, number by number, by one step of its dtype there, for
another machine may round the other way, and by 1e-9. Embeddings that an adapter was merged into
were computed: they may be off by 4 eps of the teacher's dtype too.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage.errors import IntegrityError
from ...storage.store.matrices import kept_matrix, matrix_file, names
from ...storage.store.store import Store
from ..recipe.features import EMBEDDINGS
from ..targets.features.projection import PROJECTION, projection_matrix

_FLOOR = 1e-9
_ROWS = 4096
"""That are compared at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredMatrix:
    """A matrix that is made again."""

    file: str
    about: Mapping[str, Any]
    """What it is, by its record."""
    numbers: np.ndarray
    """[R, C] as it is kept; mapped."""
    head: str
    """Of the teacher (`Task.head`)."""

    @property
    def of_teacher(self) -> bool:
        """Only the teacher can say it."""
        return bool(self.about["what"] == EMBEDDINGS)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixRead:
    """A matrix, compared."""

    file: str
    what: str
    shape: tuple[int, ...]
    off: int
    """Numbers that are not right; all where the shape is another."""
    message: str
    """The fault in words; empty: there is none."""


def stored_matrices(store: Store, teacher_id: str) -> list[StoredMatrix]:
    """The embeddings of a teacher, and the projections.

    Those that cannot be read are left out: `verify` names them.
    """
    head, found = _head(store, teacher_id), []
    for name in names(store.files):
        with suppress(IntegrityError):
            kept = kept_matrix(store.files, name)
            if kept is None or not _is_of(kept.about, teacher_id):
                continue
            file, numbers = matrix_file(kept.id), store.matrix(kept.id)
            found.append(StoredMatrix(file=file, about=kept.about, numbers=numbers, head=head))
    return found


def _is_of(about: Mapping[str, Any], teacher_id: str) -> bool:
    what = about.get("what")
    return what == PROJECTION or (what == EMBEDDINGS and about.get("teacher_id") == teacher_id)


def _head(store: Store, teacher_id: str) -> str:
    """What the teacher's targets are of."""
    for commit in store.commits("soft_targets"):
        with suppress(IntegrityError):
            about = store.shard("soft_targets", commit.shard.sha256).about
            if about["teacher_id"] == teacher_id:
                return str(about.get("head", "lm"))
    return "lm"


def made_again(one: StoredMatrix) -> MatrixRead:
    """A projection against the one that its seed gives."""
    right = projection_matrix(*one.numbers.shape)
    return compared(one, right.shape, right.__getitem__, source="what its seed gives")


def compared(
    one: StoredMatrix,
    shape: tuple[int, ...],
    right: Callable[[slice], np.ndarray],
    *,
    source: str,
    relative: float = 0.0,
) -> MatrixRead:
    """A matrix against what it should be.

    Args:
        one: As it is kept.
        shape: That it should have.
        right: Some rows [r, C] float32 of what it should be.
        source: Whose numbers those are, for people.
        relative: Of a number, by which it may be off besides.
    """
    if one.numbers.shape != shape:
        found, expected = (" x ".join(map(str, each)) for each in (one.numbers.shape, shape))
        off, message = one.numbers.size, f"it is {found}, and {source} is {expected}"
    else:
        off, message = _wrong(one.numbers, right, source=source, relative=relative)
    return MatrixRead(
        file=one.file,
        what=str(one.about["what"]),
        shape=one.numbers.shape,
        off=off,
        message=message,
    )


def _wrong(
    kept: np.ndarray, right: Callable[[slice], np.ndarray], *, source: str, relative: float
) -> tuple[int, str]:
    """How many numbers are not right, and the first of them in words; empty where all are."""
    off, first = 0, ""
    for start in range(0, len(kept), _ROWS):
        rows = slice(start, start + _ROWS)
        expected = right(rows)
        missed = np.abs(kept[rows].astype(np.float64) - expected)
        step = np.spacing(np.abs(expected.astype(kept.dtype))).astype(np.float64)
        # What is not a number is not within anything.
        wrong = np.argwhere(~(missed <= step + relative * np.abs(expected) + _FLOOR))
        off += len(wrong)
        if len(wrong) and not first:
            row, column = wrong[0]
            first = (
                f"row {start + row}, column {column} is {kept[start + row, column]:.6g}, and "
                f"{source} is {expected[row, column]:.6g}"
            )
    return off, first
