"""What each of several teachers said of a training's samples.

It is found by the sample's number, and read when a pass needs it.

The file `teachers/<id>/` in the student's folder says where each row is
(`storage/snapshots/partners.py`), as that of features does.
"""

import threading
from collections.abc import Sequence

import numpy as np

from ...storage.errors import IntegrityError
from ...storage.files.base import FilesOnDisk
from ...storage.keys import content_id
from ...storage.snapshots.companions import RowsBeside
from ...storage.snapshots.partners import ITSELF, NONE, partner_places
from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.store import Store
from ...storage.tables.soft_targets import LISTS, SoftTargets
from ...storage.tables.spans import spans_of
from .features import kept_places

_FOLDER = "teachers"
_COLUMNS = ("token_ids", "span_start", "span_tokens", "spans", "k", *LISTS)


class TeacherSource:
    """The targets of all teachers, by sample of one snapshot."""

    def __init__(self, beside: RowsBeside | None, places: np.ndarray) -> None:
        """Keep the places as `partner_places` made them.

        Without rows beside the samples, `beside` is None.
        """
        self._beside, self._places = beside, places
        self._one_reads = threading.Lock()

    def of_text(
        self, number: int, token_ids: np.ndarray, spans: np.ndarray, own: SoftTargets
    ) -> list[tuple[int, SoftTargets]]:
        """The number and the normalised targets of each teacher that has scored a sample.

        They are in the teachers' order.

        Args:
            number: The sample's, in the snapshot.
            token_ids: [T] its own.
            spans: [S, 2] of its scored tokens.
            own: The targets in its own row.

        Raises:
            IntegrityError: what was found is of another text.
        """
        found = []
        for teacher, place in enumerate(self._places[number].tolist()):
            if place == ITSELF:
                found.append((teacher, own))
            elif place != NONE:
                found.append((teacher, self._read(place, number, token_ids, spans)))
        return found

    def _read(
        self, place: int, number: int, token_ids: np.ndarray, spans: np.ndarray
    ) -> SoftTargets:
        assert self._beside is not None
        with self._one_reads:
            row = self._beside.row(place)
        same = np.array_equal(row["token_ids"], token_ids)
        if not same or not np.array_equal(spans_of(row), spans):
            raise IntegrityError(
                f"teachers: what another teacher said of sample {number} is of another text. "
                f"Delete the folder `{_FOLDER}` of the student, and run again."
            )
        return SoftTargets.from_row(row).normalised()


def open_teachers(
    store: Store,
    samples: Snapshot,
    partners: Snapshot | None,
    *,
    teachers: Sequence[str],
    files: FilesOnDisk,
) -> TeacherSource:
    """Find the rows of all teachers of a snapshot's samples, or take what was found before.

    Args:
        store: Of both snapshots.
        samples: What is trained on, or validated.
        partners: The rows beside them; None: no sample has two teachers.
        teachers: Their identities, in the recipe's order.
        files: The student's folder.
    """
    beside = partners.id if partners is not None else None
    asked = content_id("partners", samples=samples.id, beside=beside, teachers=list(teachers))

    def make() -> np.ndarray:
        return partner_places(store, samples, partners, teachers)

    return _source(store, partners, kept_places(files, f"{_FOLDER}/{asked}", make))


def find_rows(
    store: Store, samples: Snapshot, partners: Snapshot | None, teachers: Sequence[str]
) -> TeacherSource:
    """The same of rows that are read once: nothing is kept."""
    return _source(store, partners, partner_places(store, samples, partners, teachers))


def _source(store: Store, partners: Snapshot | None, places: np.ndarray) -> TeacherSource:
    rows = None if partners is None else RowsBeside(store, partners, _COLUMNS)
    return TeacherSource(rows, places)
