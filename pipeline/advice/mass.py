"""Mass of the teacher that the recipe's entries hold, measured on stored rows, and K for enough.

Held-out rows are stored whole, whatever the recipe keeps of the others (above a vocabulary of
65,536 their 4,096 best ids are stored). So of any K their first positions say what it would hold:
nothing is extrapolated.
"""

from typing import Any

import numpy as np

from ...stages.targets.best_entries import ENTRIES
from ...stages.targets.spec import REFERENCE_K, Kept
from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.store import Store
from ...storage.tables.soft_targets import SoftTargets
from .table import ENOUGH_MASS

ROWS, VALUES = 1_024, 1 << 23
"""Looked at, at most: rows, and log-probabilities of all their positions together, which a second
sorts. The mean mass of 2,048 positions is about 0.01 off, of the 128 that a vocabulary of 65,536
leaves 0.04."""
_COLUMNS = (
    "kind",
    "k",
    "span_tokens",
    "ids",
    "logprobs",
    "tail_logprob",
    "token_logprob",
    "entropy",
)


def held_mass(store: Store, held_out: Snapshot, kept: Kept) -> dict[str, Any] | None:
    """What `kept` holds of the teacher, a mean over held-out positions.

    Args:
        store: Where the rows are.
        held_out: Rows of soft targets that are judged on.
        kept: What the recipe keeps; of targets without a tail nothing is said.

    Returns:
        `entries` and `mass` of a position; `enough`, the entries that would hold `ENOUGH_MASS`
        (None: more than are stored); `positions`, how many were looked at. None: no row tells.
    """
    if held_out.table != "soft_targets" or not kept.structure.has_tail:
        return None
    best = _best(store, held_out)
    if best is None:
        return None
    within = best[:, : kept.k]
    counts = np.full(len(best), within.shape[1])
    if kept.kind in ENTRIES:
        counts = ENTRIES[kept.kind](within, kept)
    mean = best.mean(0)
    enough = int(np.searchsorted(mean, ENOUGH_MASS)) + 1
    return {
        "entries": round(float(counts.mean()), 1),
        "mass": round(float(np.take_along_axis(within, counts[:, None] - 1, 1).mean()), 4),
        "enough": enough if enough <= best.shape[1] else None,
        "positions": len(best),
    }


def _best(store: Store, held_out: Snapshot) -> np.ndarray | None:
    """[n, m] mass that the best 1, 2, ... m ids hold, at the first positions.

    The number m is the fewest that a row has.
    """
    found: list[np.ndarray] = []
    shard = held_out.shards[0]
    rows = store.rows(held_out.table, {shard.sha256: shard.rows[:ROWS]}, _COLUMNS)
    left = VALUES
    for row in rows:
        targets = SoftTargets.from_row(row).normalised()
        if targets.logprobs is None or targets.entries is not None:
            continue  # draws, or positions that differ: what is here if nobody could make others
        part = targets.logprobs[: max(1, left // targets.logprobs.shape[1])]
        left -= part.size
        sure = -np.sort(-part, axis=1)[:, :REFERENCE_K]
        found.append(np.exp(sure.astype(np.float64)).cumsum(1))
        if left < part.shape[1]:
            break
    if not found:
        return None
    most = min(part.shape[1] for part in found)
    best: np.ndarray = np.concatenate([part[:, :most] for part in found])
    return best
