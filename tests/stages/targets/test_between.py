"""How far two stored distributions are apart.

It is compared with the sum over outcomes as it is defined, by loops, in float64.
"""

import math
from itertools import product

import numpy as np
import pytest

from stillroom.stages.targets.between import between
from stillroom.storage.tables.soft_targets import SoftTargets

N, V = 4, 9


def distributions(seed: int, vocabulary: int = V) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(vocabulary, 0.4), N) * (1 - 1e-6) + 1e-6 / vocabulary


def stored(p: np.ndarray, k: int | list[int] | None) -> SoftTargets:
    """Rows of p [N, V]: full, the k best, or as many of the best at each position."""
    nothing = np.zeros(len(p), np.float32)
    if k is None:
        return SoftTargets(
            ids=None,
            logprobs=np.log(p).astype(np.float32),
            tail_logprob=np.full(len(p), -np.inf, np.float32),
            token_logprob=nothing,
            entropy=nothing,
        )
    counts = [k] * len(p) if isinstance(k, int) else k
    ids = np.full((len(p), max(counts)), -1, np.int32)
    logprobs, tails = np.full(ids.shape, -np.inf, np.float32), []
    for row, count in enumerate(counts):
        best = np.argsort(-p[row])
        ids[row, :count] = best[:count]
        logprobs[row, :count] = np.log(p[row][best[:count]])
        rest = p[row][best[count:]].sum()
        tails.append(math.log(rest) if rest else -math.inf)
    entries = None if isinstance(k, int) else np.array(k, np.int32)
    return SoftTargets(
        ids=ids,
        logprobs=logprobs,
        tail_logprob=np.array(tails, np.float32),
        token_logprob=nothing,
        entropy=nothing,
        entries=entries,
    )


def over_outcomes(p: np.ndarray, q: np.ndarray, told_apart: set[int]) -> float:
    """KL over the ids that are told apart and one outcome for all others."""
    outcomes = [(p[i], q[i]) for i in told_apart]
    rest = [i for i in range(max(len(p), len(q))) if i not in told_apart]
    outcomes.append(tuple(sum(d[i] for i in rest if i < len(d)) for d in (p, q)))
    return sum(a * math.log(a / b) for a, b in outcomes if a > 0)


KINDS: list[int | list[int] | None] = [None, 1, 3, V, [1, 4, 2, 3]]


def best(p: np.ndarray, k: int | list[int] | None, row: int) -> set[int]:
    count = len(p) if k is None else k if isinstance(k, int) else k[row]
    return set(np.argsort(-p)[:count].tolist())


@pytest.mark.parametrize(("mine", "theirs"), list(product(KINDS, KINDS)))
def test_it_is_the_divergence_over_what_both_tell_apart_and_never_above_the_whole(
    mine: int | list[int] | None, theirs: int | list[int] | None
) -> None:
    p, q = distributions(0), distributions(1)
    found = between(stored(p, mine), stored(q, theirs))
    whole = (p * np.log(p / q)).sum(1), (q * np.log(q / p)).sum(1)
    for row in range(N):
        apart = best(p[row], mine, row) & best(q[row], theirs, row)
        expected = over_outcomes(p[row], q[row], apart), over_outcomes(q[row], p[row], apart)
        assert (found.forward[row], found.backward[row]) == pytest.approx(expected, abs=2e-6)
        assert found.forward[row] <= whole[0][row] + 2e-6
        assert found.backward[row] <= whole[1][row] + 2e-6
    assert found.exact is (mine is None and theirs is None)
    if found.exact:
        np.testing.assert_allclose(found.forward, whole[0], rtol=0, atol=2e-6)


def test_it_is_nothing_for_equals_and_padding_of_a_vocabulary_is_one_more_outcome() -> None:
    p = distributions(2)
    for k in KINDS:
        same = between(stored(p, k), stored(p, k))
        np.testing.assert_allclose([same.forward, same.backward], 0, atol=1e-12)
    wider = np.concatenate([p * (1 - 1e-3), np.full((N, 1), 1e-3)], axis=1)
    found = between(stored(p, None), stored(wider, None))
    assert not found.exact
    np.testing.assert_allclose(found.forward, -math.log(1 - 1e-3), atol=1e-6)
    assert np.isinf(found.backward).all()  # it says of an id what the other rules out
