"""The kinds of soft targets that a recipe can ask for: one row each. All who need a fact about a kind ask here.

A new one is a row here, one in `storage/tables/kinds.py` (what its rows consist of), and, where it does
not keep all k best entries, a function in `stages/targets/best_entries.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ...storage.tables.kinds import STRUCTURES


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetKind:
    """What a recipe can say of one kind, and what serves it."""

    settings: tuple[str, ...] = ()
    """Its fields of `score`."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Settings without a usable default, with what the kind does with them and what to try."""
    words: str
    """It for people, with the settings in braces."""
    kept: str = ""
    """What it keeps, in a figure's title; k and p in braces."""
    served_by: tuple[str, ...] = ()
    """Other kinds whose stored rows serve too, where they are whole or have k entries or more."""
    covers: Mapping[str, Literal[">=", "<=", "="]] = field(default_factory=dict)
    """How a column of a stored row of this kind must compare with what is asked for, to serve it."""
    bytes_per_entry: float
    """About what an entry takes on disk at 10 mantissa bits, compressed."""
    bytes_per_token: float
    """What a scored token takes besides."""


KINDS = {
    "topk": TargetKind(
        settings=("k",),
        words="topk, {k} entries per position",
        kept="best {k:,}",
        served_by=("full",),
        covers={"k": ">="},
        bytes_per_entry=2.6,
        bytes_per_token=8,
    ),
    "topp": TargetKind(
        settings=("p", "k", "k_min"),
        needs={"p": "keeps the fewest entries that hold a mass of p. Try 0.9"},
        words="topp, mass {p} in at most {k} entries per position",
        kept="topp, mass {p:g}",
        served_by=("topk", "full"),
        covers={"k": ">=", "p": ">=", "k_min": ">="},
        bytes_per_entry=2.6,
        bytes_per_token=8,
    ),
    "sampled": TargetKind(
        settings=("rounds", "draw", "proposal"),
        words="sampled, {rounds} draws per position ({draw})",
        covers={"k": "=", "draw": "=", "proposal": "="},
        bytes_per_entry=1.1,
        bytes_per_token=8,
    ),
    "full": TargetKind(
        words="full, the whole distribution",
        bytes_per_entry=1.5,
        bytes_per_token=0,
    ),
}

if TYPE_CHECKING:
    Targets = str
else:
    Targets = Literal[tuple(KINDS)]

WHOLE = tuple(name for name in KINDS if STRUCTURES[name].whole)
"""The kinds that have every id."""


def kinds_with(setting: str) -> list[str]:
    """The kinds that have this setting."""
    return [name for name, kind in KINDS.items() if setting in kind.settings]
