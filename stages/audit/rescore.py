"""Deep verification: the teacher reads a sample of rows again, and what it says is compared with what is stored.

How far two forward passes of one teacher may differ is measured, not assumed: each row is read
alone and among others, padded (the sums inside depend on that). With d the difference of a stored
number from the row read alone, r what rounding may do, |stored| * 2**-(bits + 1), n the difference
between the readings, a row is right if, per quantity,

    max(d - r)   <=  ABSOLUTE + 4 eps + NOISE * (max n over all rows)
    mean(d - r)  <=  ABSOLUTE + 4 eps + NOISE * (max over rows of mean n)

with eps of the dtype that the teacher computes in (2**-7 in bfloat16). Nothing is written. Of rows
from a foreign table only the entries are compared, and the token that is there where it is one:
what such a table does not hold is bounded (`stages/data/importing/row.py`), not said by a teacher.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...storage.store.store import Store
from ..models.identity import Identity
from ..workers.job import Progress
from .differences import Difference, Fault, differences, off_row
from .stored_rows import Row

if TYPE_CHECKING:
    from .differences import Reading


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


@dataclass(kw_only=True, slots=True)
class Rescored:
    """What deep verification found."""

    teacher_id: str
    rows: int = 0
    tokens: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    imported: int = 0
    """Of the rows, those of which the entries alone were compared."""
    quantities: dict[str, Difference] = field(default_factory=dict)
    off: list[OffRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row that was read is right."""
        return not self.off


def rescore(
    store: Store,
    teacher: Identity,
    rows: Sequence[Row],
    *,
    device_map: str | None,
    progress: Progress,
) -> Rescored:
    """Read rows again and compare.

    Args:
        store: Where they are; not written to.
        teacher: Whose rows they are; is loaded.
        rows: Of language-model heads, by `choose_rows`.
        device_map: As the recipe's `teacher.device_map`.
        progress: Where to say how far it is.

    Raises:
        UsageError: the teacher does not load, or its head is not understood.
    """
    from .faults import explain
    from .teacher_reader import Reader

    progress.say(f"loading {teacher.folder}")
    reader = Reader(teacher, device_map=device_map)
    progress.start(total=len(rows), unit="rows")
    readings: list[Reading] = []
    for start in range(0, len(rows), TOGETHER):
        readings += reader.read(rows[start : start + TOGETHER])
        progress.advance(len(rows[start : start + TOGETHER]))
    found = Rescored(teacher_id=teacher.id, rows=len(rows), tokens=sum(r.span[1] for r in rows))
    found.kinds = dict(Counter(str(row.columns["kind"]) for row in rows))
    found.imported = sum(row.imported for row in rows)
    found.quantities = differences(readings, 4 * reader.eps)
    read = list(zip(rows, readings, strict=True))
    for row, reading in read:
        if off := off_row(reading, found.quantities):
            fault, message = explain(row, reader=reader, read=read, limits=found.quantities)
            where = {
                "key": row.key.hex(),
                "shard": row.shard,
                "row": row.number,
                "kind": row.columns["kind"],
            }
            found.off.append(OffRow(**where, quantities=off, fault=fault, message=message))
    return found
