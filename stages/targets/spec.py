"""What is kept of the teacher's distribution at a position.

It says what the recipe wants, and what held-out rows are judged on.

Nothing here imports torch: the plan asks too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage.tables.kinds import STRUCTURES, Structure
from ..recipe.engines import Generate
from ..recipe.kinds import KINDS, Score

FULL_VOCABULARY = 65_536  # reference targets are the whole distribution up to this vocabulary ...
REFERENCE_K = 4_096  # ... and this many entries plus the tail beyond it
_NAMES = ("kind", "k", "p", "k_min", "draw", "proposal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Settings of soft targets.

    All but `temperatures` are named and stored as the columns of `soft_targets` are.
    """

    kind: str
    """A row of `KINDS`: `topk`, `topp`, `sampled`, `full` ..."""
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

    @property
    def structure(self) -> Structure:
        """What rows of this kind consist of."""
        return STRUCTURES[self.kind]

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
    structure, most = score.structure, min(score.k, vocab_size)
    if structure.whole:  # has every temperature
        return Kept(kind=score.targets, k=vocab_size)
    has = set(score.kind.settings)
    return Kept(
        kind=score.targets,
        k=score.rounds if structure.drawn else most,
        p=_single(score.p or 1.0) if "p" in has else None,
        k_min=min(score.k_min, most) if "k_min" in has else None,
        draw=score.draw if "draw" in has else None,
        proposal=_single(score.proposal) if "proposal" in has else None,
        temperatures=tempered(score),
    )


def reference(score: Score, vocab_size: int) -> Kept:
    """What held-out rows are judged on, whatever the recipe keeps of the others.

    It has the same temperatures.
    """
    if vocab_size <= FULL_VOCABULARY:
        return Kept(kind="full", k=vocab_size)
    return Kept(kind="topk", k=REFERENCE_K, temperatures=tempered(score))


def tempered(score: Score) -> tuple[float, ...]:
    """`score.temperatures` as they are stored: ascending, without 1."""
    return tuple(sorted({_single(t) for t in score.temperatures} - {1.0}))


def kept_while_writing(generate: Generate, vocab_size: int) -> Kept | None:
    """What `generate.keep` keeps of the distribution that each token is drawn from.

    None: nothing is kept.
    """
    if generate.keep is None:
        return None
    return Kept(kind="topk", k=min(generate.keep.k, vocab_size))


def target_bytes(kept: Kept) -> float:
    """About what one scored token takes on disk at 10 mantissa bits, compressed; topp: at most."""
    kind = KINDS[kept.kind]
    entries = kind.bytes_per_entry * kept.k + kind.bytes_per_token
    return entries + 2 * len(kept.temperatures)


def _single(value: float) -> float:
    """The value that float32 has for it: what is stored, and what others ask for."""
    return float(np.float32(value))
