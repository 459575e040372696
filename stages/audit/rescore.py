"""Deep verification: the teacher reads a sample of rows again.

What it says is compared with what is stored.

`differences.py` has the comparison and what a row may be off by, `faults.py` what is the matter
with one that is. Nothing is written. Of imported rows only the entries are compared, and the token
that is there where it is one: what a foreign table does not hold is bounded
(`stages/data/importing/row.py`), not said by a teacher.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..models.identity import Identity
from ..workers.job import Progress
from .differences import Quantity, SecondReading, over_rows
from .faults import Fault, explain
from .features import FeaturesRead
from .stored_rows import StoredRow
from .teacher_reader import reader_of

TOGETHER = 4
"""Rows read among one another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OffRow:
    """A row whose targets are not what the teacher says."""

    key: str
    shard: str
    row: int
    kind: str
    quantities: dict[str, float]
    """The quantities that are off -> mean difference, nats."""
    fault: Fault
    message: str
    """The fault in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescored:
    """What deep verification found, and what it did not look at."""

    teacher: Identity
    rows: int
    tokens: int
    kinds: dict[str, int]
    """Rows of each kind."""
    imported: int
    """Of the rows, those of which the entries alone were compared."""
    quantities: dict[str, Quantity]
    off: list[OffRow]
    engines: dict[str, int] = field(default_factory=dict)
    """Of the rows, how many each engine made; all are read again by transformers."""
    other_teachers: dict[str, int] = field(default_factory=dict)
    """Not read: other teachers -> their rows."""
    classes: int = 0
    """Not read: rows of a classification head."""
    damaged: int = 0
    """Not read: rows of shards that are damaged."""
    features: FeaturesRead | None = None
    """What was read of the teacher's features; None: there are none."""

    @property
    def ok(self) -> bool:
        """Whether all that was read is right."""
        return not self.off and (self.features is None or self.features.ok)

    @classmethod
    def nothing(cls, teacher: Identity) -> "Rescored":
        """Where no targets can be read again."""
        return cls(teacher=teacher, rows=0, tokens=0, kinds={}, imported=0, quantities={}, off=[])


def rescore(
    teacher: Identity, rows: Sequence[StoredRow], *, device_map: str | None, progress: Progress
) -> Rescored:
    """Read rows again and compare.

    Args:
        teacher: Whose rows they are; is loaded.
        rows: Of one head, with a target for each of their tokens or words; by `choose_rows`.
        device_map: As the recipe's `teacher.device_map`.
        progress: Where to say how far it is.

    Raises:
        UsageError: the teacher does not load, or its head is not understood.
    """
    progress.say(f"loading {teacher.folder}")
    reader = reader_of(teacher, rows, device_map=device_map)
    progress.start(total=len(rows), unit="rows")
    readings: list[SecondReading] = []
    for start in range(0, len(rows), TOGETHER):
        few = rows[start : start + TOGETHER]
        readings += reader.read(few)
        progress.advance(len(few))
    limits = over_rows(readings, reader.eps)
    off = []
    for reading in readings:
        if quantities := reading.off(limits):
            fault, message = explain(reading, reader=reader, readings=readings, limits=limits)
            off.append(_off_row(reading.row, quantities, fault=fault, message=message))
    return Rescored(
        teacher=teacher,
        rows=len(rows),
        tokens=sum(row.span_tokens for row in rows),
        kinds=dict(Counter(row.kind for row in rows)),
        imported=sum(row.imported for row in rows),
        quantities=limits,
        off=off,
        engines=dict(Counter(row.engine for row in rows)),
    )


def _off_row(row: StoredRow, quantities: dict[str, float], *, fault: Fault, message: str) -> OffRow:
    return OffRow(
        key=row.key.hex(),
        shard=row.shard,
        row=row.number,
        kind=row.kind,
        quantities=quantities,
        fault=fault,
        message=message,
    )
