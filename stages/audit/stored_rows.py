"""Stored rows to read again: which are chosen, and what they hold."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from ...storage.errors import IntegrityError
from ...storage.store.store import Store
from ...storage.tables.kinds import STRUCTURES
from ...storage.tables.soft_targets import SoftTargets


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

    Left out are those that are known to be damaged, by their files' names, and those that cannot be
    opened.
    """
    found = []
    for commit in store.commits("soft_targets"):
        try:
            about = (
                {}
                if commit.shard.name in damaged
                else store.shard("soft_targets", commit.shard.sha256).about
            )
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
        sampled = STRUCTURES[self.columns["kind"]].drawn
        return (
            {"rounds": self.columns["k"], "proposal": self.columns["proposal"]} if sampled else None
        )


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
        for number, columns in zip(
            numbers, store.rows("soft_targets", {shelf.sha256: numbers}), strict=True
        ):
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
