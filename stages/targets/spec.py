"""What is kept of the teacher's distribution at a position: what the recipe wants, what held-out rows are judged on.

Nothing here imports torch: the plan asks too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..recipe.sections import Score

FULL_VOCABULARY = 65_536  # reference targets are the whole distribution up to this vocabulary ...
REFERENCE_K = 4_096  # ... and this many entries plus the tail beyond it
_NAMES = ("kind", "k", "p", "k_min", "draw", "proposal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Settings of soft targets; all but `temperatures` are named and stored as the columns of `soft_targets` are."""

    kind: str
    """`topk`, `topp`, `sampled` or `full`."""
    k: int
    """Entries at most; sampled: draws per position; full: the vocabulary size."""
    p: float | None = None
    """topp: mass to keep."""
    k_min: int | None = None
    """topp: entries at least."""
    draw: str | None = None
    """sampled: `multinomial` or `systematic`."""
    proposal: float | None = None
    """sampled: drawn from the teacher to this power."""
    temperatures: tuple[float, ...] = ()
    """Others than 1, ascending, in float32's values; sampled: the one that is drawn at."""

    def columns(self) -> dict[str, Any]:
        """The settings as columns of a row; `SoftTargets.columns` has the temperatures."""
        return {name: getattr(self, name) for name in _NAMES}

    def named(self) -> dict[str, Any]:
        """Those that this kind has, for a row's key and a shard's description."""
        found = self.columns() | {"temperatures": self.temperatures}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Kept":
        """What a stored row was made with."""
        stored = row.get("temperatures")
        temperatures = () if stored is None else tuple(stored.tolist())
        return cls(**{name: row[name] for name in _NAMES}, temperatures=temperatures)


def wanted(score: Score, vocab_size: int) -> Kept:
    """What a recipe keeps of a teacher with this vocabulary (V)."""
    temperatures = tempered(score)
    kind, most = score.targets, min(score.k, vocab_size)
    if kind == "topp":
        least = min(score.k_min, most)
        return Kept(
            kind=kind, k=most, p=_single(score.p or 1.0), k_min=least, temperatures=temperatures
        )
    if kind == "sampled":
        proposal = _single(score.proposal)
        return Kept(
            kind=kind, k=score.rounds, draw=score.draw, proposal=proposal, temperatures=temperatures
        )
    if kind == "full":  # has every temperature
        return Kept(kind=kind, k=vocab_size)
    return Kept(kind=kind, k=most, temperatures=temperatures)


def reference(score: Score, vocab_size: int) -> Kept:
    """What held-out rows are judged on, whatever the recipe keeps of the others: at the same temperatures."""
    if vocab_size <= FULL_VOCABULARY:
        return Kept(kind="full", k=vocab_size)
    return Kept(kind="topk", k=REFERENCE_K, temperatures=tempered(score))


def tempered(score: Score) -> tuple[float, ...]:
    """`score.temperatures` as they are stored: ascending, without 1."""
    return tuple(sorted({_single(t) for t in score.temperatures} - {1.0}))


def target_bytes(kept: Kept) -> float:
    """About what one scored token takes on disk at 10 mantissa bits, compressed; topp: at most."""
    entries = {"full": 1.5 * kept.k, "sampled": 1.1 * kept.k + 8}.get(kept.kind, 2.6 * kept.k + 8)
    return entries + 2 * len(kept.temperatures)


def _single(value: float) -> float:
    """The value that float32 has for it: what is stored, and what others ask for."""
    return float(np.float32(value))
