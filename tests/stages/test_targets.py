"""Soft targets from hidden states: equal to a float64 log-softmax of the same logits, whatever the chunk."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.stages import targets as module
from stillroom.stages.head import Head
from stillroom.stages.targets import soft_targets
from stillroom.storage.codec import SoftTargets


def case(n: int, d: int, v: int, *, scale: float, seed: int) -> tuple[torch.Tensor, Head, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator) * scale
    head = Head(weight=torch.randn(v, d, generator=generator))
    following = torch.randint(v, (n,), generator=generator)
    logits = head.logits(hidden).double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    truth = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return hidden, head, following, truth


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(2, 60),
    k=st.integers(1, 60),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 999),
)
def test_entries_tail_token_and_entropy_equal_float64(n: int, v: int, k: int, scale: float, seed: int) -> None:
    k = min(k, v)
    hidden, head, following, truth = case(n, 5, v, scale=scale, seed=seed)
    found = soft_targets(hidden, head, following, kind="topk", k=k)
    best = -np.sort(-truth, axis=-1)
    np.testing.assert_allclose(found.logprobs, best[:, :k], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(truth, found.ids, 1), found.logprobs, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.tail_logprob), np.exp(best[:, k:]).sum(-1), atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(found.token_logprob, truth[np.arange(n), following], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, -(np.exp(truth) * truth).sum(-1), atol=1e-4)
    if k == v:
        assert np.isneginf(found.tail_logprob).all()


def test_the_tail_is_exact_where_one_minus_the_sum_would_be_noise() -> None:
    """A tail of 1e-12: float32 cannot say 1 - 1e-12, a logsumexp over what is not kept can."""
    logits = torch.tensor([[30.0, 0.0, 0.0, -1.0]])
    head = Head(weight=torch.eye(4))
    found = soft_targets(logits, head, torch.tensor([0]), kind="topk", k=1)
    rest = np.log(2 + np.exp(-1.0)) - np.log(np.exp(30.0) + 2 + np.exp(-1.0))
    assert found.tail_logprob[0] == pytest.approx(rest, rel=1e-5)


def test_full_keeps_the_vocabulary_in_id_order() -> None:
    hidden, head, following, truth = case(6, 5, 17, scale=1.0, seed=3)
    found = soft_targets(hidden, head, following, kind="full", k=17)
    assert found.ids is None
    np.testing.assert_allclose(found.logprobs, truth, atol=2e-5)


def test_chunks_change_nothing_and_bound_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, following, _ = case(23, 5, 31, scale=1.0, seed=1)
    whole = soft_targets(hidden, head, following, kind="topk", k=4)
    seen = []
    monkeypatch.setattr(Head, "logits", lambda self, h, original=Head.logits: seen.append(len(h)) or original(self, h))
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 31 * 5)
    parts = soft_targets(hidden, head, following, kind="topk", k=4)
    assert max(seen) == 5
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=1e-6)
    np.testing.assert_array_equal(parts.ids, whole.ids)


@pytest.mark.parametrize("bits", [7, 10, 23])
def test_stored_targets_are_the_truth_to_the_rounding_and_sum_to_one(bits: int) -> None:
    hidden, head, following, truth = case(64, 8, 500, scale=1.0, seed=5)
    stored = soft_targets(hidden, head, following, kind="topk", k=16).columns(bits)
    row = SoftTargets.from_row(stored)
    best = -np.sort(-truth, axis=-1)[:, :16]
    np.testing.assert_allclose(row.logprobs, best, rtol=2.0 ** -(bits + 1) + 1e-5, atol=2e-5)
    if bits >= 10:
        total = np.exp(row.logprobs).sum(-1) + np.exp(row.tail_logprob)
        np.testing.assert_allclose(total, 1.0, atol=2e-3)
