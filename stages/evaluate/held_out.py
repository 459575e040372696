"""The held-out rows that every arm is judged on."""

from collections.abc import Iterator
from typing import Any

from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.store import Store
from ..targets.alignment import scored_span
from ..workers.clock import Clock

_SPAN = {
    "soft_targets": (
        "key",
        "prompt_key",
        "generation_key",
        "token_ids",
        "span_start",
        "span_tokens",
    ),
    "generations": ("prompt_key", "key", "token_ids", "prompt_tokens"),
}

_TARGETS = ("kind", "k", "ids", "logprobs", "tail_logprob", "token_logprob", "entropy")


class HeldOut:
    """The rows of the test snapshot: soft targets, or (black-box) generations."""

    def __init__(
        self, store: Store, snapshot: Snapshot, clock: Clock, *, classified: bool = False
    ) -> None:
        """`classified`: texts with their classes; those without a gold label are left out, they judge nobody."""
        self._store, self.classified, self._clock = store, classified, clock
        self.snapshot = snapshot
        self.scored = snapshot.table == "soft_targets"
        self.rows = (
            sum(row["label"] is not None for row in self._read("label"))
            if classified
            else snapshot.rows
        )
        """How many rows are held out."""

    def spans(self) -> Iterator[dict[str, Any]]:
        """Rows with prompt_key, generation_key, token_ids, start and span_tokens."""
        return map(_with_span, self._read(*_SPAN[self.snapshot.table]))

    def targets(self) -> Iterator[dict[str, Any]]:
        """`spans` with what is stored of the teacher's distribution, where it is."""
        more = _TARGETS if self.scored else ()
        if self.classified:
            found = self._read(*_SPAN[self.snapshot.table], *more, "label")
            return (_with_span(row) for row in found if row["label"] is not None)
        return map(_with_span, self._read(*_SPAN[self.snapshot.table], *more))

    def references(self) -> set[tuple[str, int]]:
        """Kinds of reference targets and their entries per position."""
        return (
            {(row["kind"], row["k"]) for row in self._read("kind", "k")} if self.scored else set()
        )

    def _read(self, *columns: str) -> Iterator[dict[str, Any]]:
        for shard in self.snapshot.shards:
            rows = self._store.rows(self.snapshot.table, {shard.sha256: shard.rows}, columns)
            yield from self._clock.each("disk", rows)


def _with_span(row: dict[str, Any]) -> dict[str, Any]:
    """One form for both tables."""
    if "span_start" in row:
        return row | {"start": row["span_start"]}
    start, span = scored_span(row["prompt_tokens"], len(row["token_ids"]))
    return row | {"generation_key": row["key"], "start": start, "span_tokens": span}
