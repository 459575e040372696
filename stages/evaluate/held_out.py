"""The held-out rows that every arm is judged on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.store import Store
from ...storage.tables.soft_targets import SoftTargets
from ...storage.tables.spans import SPAN_COLUMNS, spans_of
from ..workers.clock import Clock
from ..workers.ranks import Ranks

if TYPE_CHECKING:
    from .teachers import HeldOutTeachers, Said

_SPAN = {
    "soft_targets": (
        "key",
        "prompt_key",
        "generation_key",
        "token_ids",
        "span_start",
        "span_tokens",
        "spans",
    ),
    "generations": ("prompt_key", "key", "token_ids", *SPAN_COLUMNS),
}

_TARGETS = ("kind", "k", "entries", "ids", "logprobs", "tail_logprob", "token_logprob", "entropy")


class HeldOut:
    """The rows of the test snapshot: soft targets, or (black-box) generations."""

    def __init__(
        self,
        store: Store,
        snapshot: Snapshot,
        clock: Clock,
        *,
        labelled: bool = False,
        images: bool = False,
        teachers: "HeldOutTeachers | None" = None,
    ) -> None:
        """Take `labelled` texts to classify, or `images`.

        They come with their gold labels where they have one.
        """
        self._store, self._clock = store, clock
        self.snapshot, self.labelled, self.images = snapshot, labelled, images
        self.scored = snapshot.table == "soft_targets"
        self.rows = snapshot.rows
        """How many rows are held out."""
        self.teachers = teachers
        """What several teachers say of them; None: there is one."""

    def spans(self) -> Iterator[dict[str, Any]]:
        """Rows with prompt_key, generation_key, token_ids, spans and span_tokens."""
        return map(_with_span, self._read(*_SPAN[self.snapshot.table]))

    def targets(self, ranks: Ranks | None = None) -> Iterator[dict[str, Any]]:
        """`spans` with what is stored of the teacher's distribution, where it is.

        `ranks`: only those rows that are this one's; None: all.
        """
        columns = [*_SPAN[self.snapshot.table], *(_TARGETS if self.scored else ())]
        columns += ["label", "labels"] if self.scored else []
        columns += ["image"] if self.images else []
        return map(_with_span, self._read(*columns, ranks=ranks))

    def said(self, row: dict[str, Any], own: SoftTargets | None) -> "Said | None":
        """What several teachers say of a row with its own targets.

        It is None where the row has one teacher, or none.
        """
        return None if self.teachers is None or own is None else self.teachers.said(row, own)

    def references(self) -> set[tuple[str, int]]:
        """Kinds of reference targets and their entries per position."""
        return (
            {(row["kind"], row["k"]) for row in self._read("kind", "k")} if self.scored else set()
        )

    def _read(self, *columns: str, ranks: Ranks | None = None) -> Iterator[dict[str, Any]]:
        """Read each row with its number in the snapshot.

        Where one of several ranks is asked for, its rows alone are read.
        """
        rank, count, first = (ranks.rank, ranks.count, 0) if ranks else (0, 1, 0)
        for shard in self.snapshot.shards:
            numbers = range(first, first + len(shard.rows))
            own = slice((rank - first) % count, None, count)
            first += len(shard.rows)
            if numbers[own]:
                rows = self._store.rows(
                    self.snapshot.table, {shard.sha256: shard.rows[own]}, columns
                )
                for number, row in zip(numbers[own], self._clock.each("disk", rows), strict=True):
                    yield row | {"number": number}


def _with_span(row: dict[str, Any]) -> dict[str, Any]:
    """One form for both tables."""
    spans = spans_of(row)
    if "span_start" in row:
        return row | {"spans": spans}
    scored = int(spans[:, 1].sum())
    return row | {"generation_key": row["key"], "spans": spans, "span_tokens": scored}
