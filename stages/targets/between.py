"""How far apart two stored distributions over the same outcomes are.

The answer is a divergence, or a lower bound of it.

Each side says the probability of its entries, and of all others together. Where both are full the
KL is exact. Else both are compared over the ids that both have as entries, with all other ids as
one outcome:

    sum_i p_i log(p_i / q_i) + r_p log(r_p / r_q),    i in both,  r = 1 - sum_i

Joining outcomes never makes a KL larger (log sum inequality; Cover and Thomas, Elements of
Information Theory, theorem 2.7.1), so this is a lower bound.
This module needs numpy alone, for reports.

Letters: N positions, K entries of a side, M entries that both sides have.
"""

from dataclasses import dataclass

import numpy as np

from ...storage.tables.soft_targets import SoftTargets

_ENTRIES = 1 << 20
"""Of a side, looked at together: more would be held in memory as numbers of 64 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Between:
    """Two rows of the same tokens; nats."""

    forward: np.ndarray
    """[N] KL(p || q)"""
    backward: np.ndarray
    """[N] KL(q || p)"""
    exact: bool
    """Whether all outcomes are told apart; else both are lower bounds."""


def between(p: SoftTargets, q: SoftTargets) -> Between:
    """Of two distributions at each of N positions, neither of them sampled."""
    p, q = p.normalised(), q.normalised()
    assert p.logprobs is not None
    assert q.logprobs is not None
    n = len(p.entropy)
    step = max(1, _ENTRIES // max(p.logprobs.shape[1], q.logprobs.shape[1], 1))
    parts = [slice(start, start + step) for start in range(0, n, step)]
    found = [_both_ways(p.positions(part), q.positions(part)) for part in parts]
    forward, backward = (np.concatenate([f[way] for f in found]) for way in (0, 1))
    same = p.logprobs.shape == q.logprobs.shape
    return Between(forward=forward, backward=backward, exact=_full(p) and _full(q) and same)


def _full(targets: SoftTargets) -> bool:
    return targets.ids is None


def _both_ways(p: SoftTargets, q: SoftTargets) -> tuple[np.ndarray, np.ndarray]:
    """[N] KL(p || q) and KL(q || p)."""
    n = len(p.entropy)
    (at, p_keys), (_, q_keys) = _keys(p), _keys(q)
    _, in_p, in_q = np.intersect1d(p_keys, q_keys, assume_unique=True, return_indices=True)
    log_p, log_q = _flat(p)[in_p], _flat(q)[in_q]
    where = at[in_p]
    rest_p, rest_q = (_rest(side, kept) for side, kept in ((p, in_p), (q, in_q)))
    return (
        np.bincount(where, _terms(log_p, log_q), n) + _terms(rest_p, rest_q),
        np.bincount(where, _terms(log_q, log_p), n) + _terms(rest_q, rest_p),
    )


def _keys(targets: SoftTargets) -> tuple[np.ndarray, np.ndarray]:
    """[E] the position of each entry, and a number that names position and id."""
    assert targets.logprobs is not None
    n, k = targets.logprobs.shape
    ids = np.broadcast_to(np.arange(k), (n, k)) if targets.ids is None else targets.ids
    positions, places = np.nonzero(ids >= 0)
    keys = positions.astype(np.int64) << 32 | ids[positions, places].astype(np.int64)
    return positions, keys


def _flat(targets: SoftTargets) -> np.ndarray:
    """[E] float64 log probability of each entry, in the order of `_keys`."""
    assert targets.logprobs is not None
    there = slice(None) if targets.ids is None else targets.ids >= 0
    flat: np.ndarray = targets.logprobs[there].reshape(-1).astype(np.float64)
    return flat


def _rest(targets: SoftTargets, shared: np.ndarray) -> np.ndarray:
    """[N] float64 log probability of all ids that are not among the shared entries."""
    n, (positions, _), flat = len(targets.entropy), _keys(targets), _flat(targets)
    alone = np.ones(len(flat), bool)
    alone[shared] = False
    left = np.bincount(positions[alone], np.exp(flat[alone]), n)
    if targets.tail_logprob is not None:
        left = left + np.exp(targets.tail_logprob.astype(np.float64))
    with np.errstate(divide="ignore"):
        log_left: np.ndarray = np.log(left)
    return log_left


def _terms(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """P log(p / q) of each; 0 where p is 0, infinite where only q is."""
    with np.errstate(invalid="ignore"):
        terms: np.ndarray = np.exp(log_p) * (log_p - log_q)
    return np.where(np.isneginf(log_p), 0.0, terms)
