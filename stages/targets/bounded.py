"""Soft targets of the best entries alone, where nobody says what the other ids have.

What is outside is bounded. With p_i the probabilities of the K best of V ids, S their sum in
float64 and e how far off S may be:

    tail_logprob    log(1 - S). Where e may hide all of that, the log of e
    tail_bound      nats that tail_logprob may be off by. The tail is between 1 - S - e and
                    1 - S + e, and no less than the token that is there, where that is no
                    entry; infinity where it may be nothing
    entropy         -sum_i p_i log p_i - m log c: m the least that the tail can be, and none
                    outside has more than c, the least entry or the tail; so this is the least
                    that it can be
    e               sum_i p_i (2^-24 (sqrt(V) + 4 (1 + |log p_i|)) + r): float32 rounds log p_i,
                    and each of the V terms of the sum that it is normalised by; r is what it
                    was rounded by besides. S - 1 if that is more

Not all of the best may be entries, where nobody can tell which id one of them is: c is then the
greatest of those.

The token that is there has its log-probability whether it is an entry or not. Nothing here imports
torch.
"""

from dataclasses import dataclass

import numpy as np

from ...storage.tables.soft_targets import SoftTargets
from .best_entries import ENTRIES
from .spec import Kept

HALF_ULP = 2.0**-24


@dataclass(frozen=True, slots=True, eq=False)
class Bounded:
    """Soft targets of N positions, and how far off their tails may be."""

    targets: SoftTargets
    tail_bound: np.ndarray | None
    """[N] nats; None: tails and entropies are exact. Else the entropies are lower bounds."""


@dataclass(frozen=True, slots=True, eq=False)
class Best:
    """The best entries at N positions, best first."""

    ids: np.ndarray
    """[N, K]"""
    logprobs: np.ndarray
    """[N, K] float32, of the whole vocabulary."""
    token_ids: np.ndarray
    """[N] the tokens that are there."""
    token_logprob: np.ndarray
    """[N] float32"""
    entries: np.ndarray | None = None
    """[N] how many of the K there are; None: all."""
    most_outside: np.ndarray | None = None
    """[N] the most that the log-probability of an id which is no entry can be; None: the least
    entry's."""
    rounding: float = 0.0
    """r, nats that each log-probability was rounded by before it came."""


def bounded_targets(best: Best, kept: Kept, vocab_size: int) -> Bounded:
    """What is kept of the best entries, as many as `kept` asks for at most.

    Raises:
        FloatingPointError: an entry is none: of a nucleus, or of numbers that are broken.
    """
    n, most = best.logprobs.shape
    each = np.full(n, most) if best.entries is None else best.entries
    there = np.arange(most) < each[:, None]
    if not np.isfinite(best.logprobs[there]).all():
        raise FloatingPointError(
            "an entry has no probability: the teacher's numbers are broken, or of a part of its "
            "vocabulary"
        )
    logprobs = np.where(there, best.logprobs, 0.0).astype(np.float64)
    probs = np.where(there, np.exp(logprobs), 0.0)
    entries = each
    if kept.kind in ENTRIES:
        entries = np.minimum(ENTRIES[kept.kind](probs.cumsum(axis=1), kept), each)
    used = np.arange(most) < entries[:, None]
    probs = np.where(used, probs, 0.0)
    inside = ((best.ids == best.token_ids[:, None]) & used).any(axis=1)
    token = np.where(inside, 0.0, np.exp(best.token_logprob, dtype=np.float64))
    rounded = HALF_ULP * (np.sqrt(vocab_size) + 4 * (1 - logprobs)) + best.rounding
    rest = 1 - probs.sum(axis=1)
    error = np.maximum((probs * rounded).sum(axis=1), -rest)
    tail = np.maximum(np.maximum(rest, error), token)
    least = np.maximum(rest - error, token)
    with np.errstate(divide="ignore"):
        bound = np.maximum(np.log((rest + error) / tail), np.log(tail / np.maximum(least, 0.0)))
    outside = logprobs[np.arange(n), entries - 1]
    if best.most_outside is not None:
        outside = np.maximum(outside, best.most_outside)
    outside = np.minimum(outside, np.log(tail))
    entropy = (
        -(probs * np.where(used, logprobs, 0.0)).sum(axis=1) - np.maximum(least, 0.0) * outside
    )
    widest = int(entries.max(initial=0))
    there = used[:, :widest]
    uneven = kept.kind in ENTRIES or (best.entries is not None and (entries != kept.k).any())
    targets = SoftTargets(
        ids=np.where(there, best.ids[:, :widest], -1).astype(np.int32),
        logprobs=np.where(there, best.logprobs[:, :widest], -np.inf).astype(np.float32),
        tail_logprob=np.log(tail).astype(np.float32),
        token_logprob=best.token_logprob.astype(np.float32),
        entropy=np.clip(entropy, 0.0, np.log(vocab_size)).astype(np.float32),
        entries=entries.astype(np.int32) if uneven else None,
    )
    # Its own rounding to float32 may not make it too small.
    return Bounded(targets, (np.maximum(bound, 0.0) + HALF_ULP * np.abs(np.log(tail))) * (1 + 1e-6))
