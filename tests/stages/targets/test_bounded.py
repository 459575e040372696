"""The best entries alone: the tail is within its bound, and the entropy no more than it is.

The definition is that of float64.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.stages.targets.bounded import Best, bounded_targets
from stillroom.stages.targets.spec import Kept

V = 300


def best_of(logits: np.ndarray, k: int, tokens: np.ndarray) -> tuple[Best, np.ndarray]:
    """What an engine says in float32, and the truth in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    truth = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    ids = np.argsort(-truth, axis=1, kind="stable")[:, :k]
    said = truth.astype(np.float32)
    own = said[np.arange(len(tokens)), tokens]
    return Best(ids, np.take_along_axis(said, ids, axis=1), tokens, own), truth


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sharp=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    kept=st.sampled_from(
        [Kept(kind="topk", k=1), Kept(kind="topk", k=20), Kept(kind="topp", k=20, p=0.9, k_min=2)]
    ),
)
def test_tails_and_entropies_are_within_what_is_said(seed: int, sharp: float, kept: Kept) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, 9)
    best, truth = best_of(rng.normal(size=(9, V)) * sharp, kept.k, tokens)
    found = bounded_targets(best, kept, V)
    targets, bound = found.targets, found.tail_bound
    assert bound is not None
    assert targets.ids is not None
    assert targets.tail_logprob is not None
    outside = truth.copy()
    for row, ids in zip(outside, targets.ids, strict=True):
        row[ids[ids >= 0]] = -np.inf
    tail = np.log(np.exp(outside).sum(axis=1))
    assert (np.abs(targets.tail_logprob - tail) <= bound).all()
    assert (bound >= 0).all()
    # Where float32 can tell the tail, the bound is of use.
    assert (bound[tail > -6] < 1e-2).all()
    assert (targets.entropy <= -(np.exp(truth) * truth).sum(axis=1) + 1e-5).all()
    total = np.exp(targets.logprobs).sum(axis=1) + np.exp(targets.tail_logprob)
    np.testing.assert_allclose(total, 1.0, atol=1e-4)


def test_the_token_that_is_there_bounds_a_tail_that_float32_hides() -> None:
    """Entries sum to 1 in float32. Of what is outside one token is known.

    The tail has no less than that.
    """
    logits = np.full((2, V), -30.0)
    logits[:, 0], logits[:, 1] = 20.0, 3.0
    best, _ = best_of(logits, 1, np.array([1, 0]))
    found = bounded_targets(best, Kept(kind="topk", k=1), V)
    assert found.tail_bound is not None
    known, unknown = found.tail_bound
    assert np.isfinite(known)
    assert unknown == np.inf
    assert found.targets.tail_logprob is not None
    assert found.targets.tail_logprob[0] >= best.token_logprob[0] - 1e-6


def test_an_entry_without_probability_is_never_taken() -> None:
    """As engines give those outside a nucleus."""
    best, _ = best_of(np.zeros((1, V)), 3, np.array([0]))
    best.logprobs[0, 2] = -np.inf
    with pytest.raises(FloatingPointError, match="no probability"):
        bounded_targets(best, Kept(kind="topk", k=3), V)
