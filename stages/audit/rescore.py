"""Deep verification: the teacher reads a sample of rows again, and what it says is compared with what is stored.

How far two forward passes of one teacher may differ is measured, not assumed: each row is read alone and among others,
padded (the sums inside depend on that). With d the difference of a stored number from the row read alone, r what
rounding may do, |stored| * 2**-(bits + 1), n the difference between the readings, a row is right if, per quantity,

    max(d - r)   <=  ABSOLUTE + 4 eps + NOISE * (max n over all rows)
    mean(d - r)  <=  ABSOLUTE + 4 eps + NOISE * (max over rows of mean n)

with eps of the dtype that the teacher computes in (2**-7 in bfloat16). Nothing is written. Of rows from a foreign
table only the entries are compared, and the token that is there where it is one: what such a table does not hold is
bounded (`stages/data/importing/row.py`), not said by a teacher.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...storage.errors import IntegrityError
from ...storage.store.store import Store
from ...storage.tables.soft_targets import SoftTargets
from ..models.identity import Identity
from ..workers.job import Progress

if TYPE_CHECKING:
    from .teacher_reader import Reading

Fault = Literal["shifted by one position", "other tokens'", "other numbers"]

ABSOLUTE = 1e-3
"""Nats: float32 sums of another machine."""
NOISE = 4.0
DEVIATIONS = 6.0
"""Standard deviations at which drawn ids are no longer drawn from this teacher."""
TOGETHER = 4
"""Rows read among one another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shelf:
    """What a shard of soft targets holds."""

    sha256: str
    name: str
    teacher_id: str
    head: str
    rows: dict[str, int]
    """Kind -> rows."""
    imported: bool = False
    """Whether the rows come from a foreign table."""


def shelves(store: Store, *, damaged: Collection[str] = ()) -> list[Shelf]:
    """The live shards of soft targets, by what they say of themselves.

    Left out are those that are known to be damaged, by their files' names, and those that cannot be opened.
    """
    found = []
    for commit in store.commits("soft_targets"):
        try:
            about = {} if commit.shard.name in damaged else store.shard("soft_targets", commit.shard.sha256).about
        except IntegrityError:
            about = {}
        if not about:
            continue
        rows = {kind: int(counts["rows"]) for kind, counts in about["statistics"].items()}
        teacher, head = str(about["teacher_id"]), str(about.get("head", "lm"))
        names = {"sha256": commit.shard.sha256, "name": commit.shard.name}
        imported = about.get("stage") == "import"
        found.append(Shelf(**names, teacher_id=teacher, head=head, rows=rows, imported=imported))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A stored row that is read again."""

    key: bytes
    shard: str
    number: int
    """Index in the shard."""
    columns: dict[str, Any]
    targets: SoftTargets
    imported: bool = False
    """Of a foreign table: the entropy, the tail and a token that is no entry are bounds."""

    @property
    def span(self) -> tuple[int, int]:
        """`span_start` and `span_tokens`."""
        return self.columns["span_start"], self.columns["span_tokens"]

    @property
    def draw(self) -> dict[str, float] | None:
        """How sampled targets were drawn; None for other kinds."""
        sampled = self.columns["kind"] == "sampled"
        return {"rounds": self.columns["k"], "proposal": self.columns["proposal"]} if sampled else None


def choose_rows(store: Store, found: Sequence[Shelf], *, rows: int, seed: int) -> list[Row]:
    """Random rows of some shards: as many of each kind as there are, up to `rows` together; in shard order."""
    rng = np.random.default_rng(seed)
    totals: Counter[str] = Counter()
    for shelf in found:
        totals.update(shelf.rows)
    chosen: dict[str, list[tuple[str, int]]] = {}
    for kind, count in _shares(totals, rows).items():
        for number in rng.choice(totals[kind], count, replace=False).tolist():
            sha256, place = _on_shelf(found, kind, number)
            chosen.setdefault(sha256, []).append((kind, place))
    result = []
    for shelf in found:
        numbers = _row_numbers(store, shelf.sha256, chosen.get(shelf.sha256, ()))
        for number, columns in zip(numbers, store.rows("soft_targets", {shelf.sha256: numbers}), strict=True):
            targets = SoftTargets.from_row(columns)
            where = {"key": columns["key"], "shard": shelf.name, "number": number}
            result.append(Row(**where, columns=columns, targets=targets, imported=shelf.imported))
    return result


def _shares(totals: Mapping[str, int], rows: int) -> dict[str, int]:
    shares = dict.fromkeys(sorted(totals), 0)
    for kind in cycle(shares):
        if sum(shares.values()) >= min(rows, sum(totals.values())):
            return shares
        shares[kind] += shares[kind] < totals[kind]
    return shares


def _on_shelf(found: Sequence[Shelf], kind: str, number: int) -> tuple[str, int]:
    """The shard with the `number`-th row of a kind, and which of its rows of that kind it is."""
    for shelf in found:
        if number < shelf.rows.get(kind, 0):
            return shelf.sha256, number
        number -= shelf.rows.get(kind, 0)
    raise AssertionError


def _row_numbers(store: Store, sha256: str, places: Sequence[tuple[str, int]]) -> list[int]:
    """The rows of a shard that are the n-th of their kinds, ascending."""
    if not places:
        return []
    kinds = np.array(store.shard("soft_targets", sha256).read_all(["kind"])["kind"].to_pylist())
    return sorted(int(np.flatnonzero(kinds == kind)[place]) for kind, place in places)


@dataclass(kw_only=True, slots=True)
class Difference:
    """One quantity over all rows that were read, in nats; `draws`: over rows, their mean over positions."""

    values: int = 0
    worst: float = 0.0
    mean: float = 0.0
    noise_worst: float = 0.0
    """Between the two readings of the teacher."""
    noise_mean: float = 0.0
    tolerance_worst: float = 0.0
    """Rounding comes on top, and in `draws` chance."""
    tolerance_mean: float = 0.0
    slack_worst: float = 0.0
    """What comes on top, at most."""


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
    store: Store, teacher: Identity, rows: Sequence[Row], *, device_map: str | None, progress: Progress
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
    found.quantities = _differences(readings, 4 * reader.eps)
    read = list(zip(rows, readings, strict=True))
    for row, reading in read:
        if off := _off(reading, found.quantities):
            fault, message = explain(row, reader=reader, read=read, limits=found.quantities)
            where = {"key": row.key.hex(), "shard": row.shard, "row": row.number, "kind": row.columns["kind"]}
            found.off.append(OffRow(**where, quantities=off, fault=fault, message=message))
    return found


def _differences(readings: Sequence["Reading"], allowance: float) -> dict[str, Difference]:
    result: dict[str, Difference] = {}
    for name in sorted({name for reading in readings for name in reading.parts}):
        parts = [reading.parts[name] for reading in readings if name in reading.parts]
        values = sum(part.values for part in parts)
        result[name] = Difference(
            values=values,
            worst=max(part.worst for part in parts),
            mean=sum(part.mean * part.values for part in parts) / values,
            noise_worst=max(part.noise_worst for part in parts),
            noise_mean=sum(part.noise_mean * part.values for part in parts) / values,
            tolerance_worst=ABSOLUTE + allowance + NOISE * max(part.noise_worst for part in parts),
            tolerance_mean=ABSOLUTE + allowance + NOISE * max(part.noise_mean for part in parts),
            slack_worst=max(part.slack_worst for part in parts),
        )
    return result


def _off(reading: "Reading", limits: Mapping[str, Difference]) -> dict[str, float]:
    return {name: part.mean for name, part in reading.parts.items() if not part.within(limits[name])}
