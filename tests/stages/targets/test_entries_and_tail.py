"""Soft targets from hidden states equal a float64 log-softmax of the same logits.

They do whatever chunk, block and batch.

Sampled targets are checked against the distribution they are drawn from: its mean exactly so far as
chance allows, and the numbers that a Zipf distribution fixes.
"""

import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.stages.models.head import Head
from stillroom.stages.targets import block_sums
from stillroom.stages.targets import entries_and_tail as module
from stillroom.stages.targets.draws import Span
from stillroom.stages.targets.entries_and_tail import Reducer
from stillroom.stages.targets.spec import Kept
from stillroom.storage.errors import UsageError
from stillroom.storage.tables.soft_targets import SoftTargets

pytestmark = pytest.mark.numeric


def case(
    n: int, d: int, v: int, *, scale: float, seed: int
) -> tuple[torch.Tensor, Head, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator) * scale
    head = Head(weight=torch.randn(v, d, generator=generator))
    following = torch.randint(v, (n,), generator=generator)
    logits = head.logits(hidden).double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    truth = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return hidden, head, following, truth


def soft_targets(
    hidden: torch.Tensor, head: Head, next_ids: torch.Tensor, *, kept: Kept, seed: int = 0
) -> SoftTargets:
    """Of one row."""
    (row,) = (
        Reducer(head).launch(hidden, next_ids, kept=kept, spans=[Span(len(hidden), seed)]).rows()
    )
    return row


def topk(k: int, *temperatures: float) -> Kept:
    return Kept(kind="topk", k=k, temperatures=temperatures)


def full(v: int) -> Kept:
    return Kept(kind="full", k=v)


def sampled(
    rounds: int, draw: str = "multinomial", proposal: float = 1.0, at: tuple[float, ...] = ()
) -> Kept:
    return Kept(kind="sampled", k=rounds, draw=draw, proposal=proposal, temperatures=at)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(2, 60),
    k=st.integers(1, 60),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    block=st.sampled_from([1, 3, 8, 128]),
    seed=st.integers(0, 999),
)
def test_entries_tail_token_and_entropy_equal_float64(
    n: int, v: int, k: int, scale: float, block: int, seed: int
) -> None:
    k = min(k, v)
    hidden, head, following, truth = case(n, 5, v, scale=scale, seed=seed)
    with patch.object(module, "BLOCK", block), patch.object(block_sums, "BLOCK", block):
        found = soft_targets(hidden, head, following, kept=topk(k))
    best = -np.sort(-truth, axis=-1)
    np.testing.assert_allclose(found.logprobs, best[:, :k], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(truth, found.ids, 1), found.logprobs, atol=2e-5, rtol=1e-5
    )
    np.testing.assert_allclose(
        np.exp(found.tail_logprob), np.exp(best[:, k:]).sum(-1), atol=1e-6, rtol=1e-4
    )
    np.testing.assert_allclose(
        found.token_logprob, truth[np.arange(n), following], atol=2e-5, rtol=1e-5
    )
    np.testing.assert_allclose(found.entropy, -(np.exp(truth) * truth).sum(-1), atol=1e-4)
    if k == v:
        assert np.isneginf(found.tail_logprob).all()


def test_the_tail_is_exact_where_one_minus_the_sum_would_be_noise() -> None:
    """A tail of 1e-12: float32 cannot say 1 - 1e-12, a logsumexp over what is not kept can."""
    logits = torch.tensor([[30.0, 0.0, 0.0, -1.0]])
    head = Head(weight=torch.eye(4))
    found = soft_targets(logits, head, torch.tensor([0]), kept=topk(1))
    rest = np.log(2 + np.exp(-1.0)) - np.log(np.exp(30.0) + 2 + np.exp(-1.0))
    assert found.tail_logprob[0] == pytest.approx(rest, rel=1e-5)


def test_full_keeps_the_vocabulary_in_id_order() -> None:
    hidden, head, following, truth = case(6, 5, 17, scale=1.0, seed=3)
    found = soft_targets(hidden, head, following, kept=full(17))
    assert found.ids is None
    np.testing.assert_allclose(found.logprobs, truth, atol=2e-5)


def test_chunks_change_nothing_and_bound_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, following, _ = case(23, 5, 31, scale=1.0, seed=1)
    whole = soft_targets(hidden, head, following, kept=topk(4))
    seen = []
    original = Head.exact_logits
    monkeypatch.setattr(
        Head, "exact_logits", lambda self, h: seen.append(len(h)) or original(self, h)
    )
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 31 * 5)
    parts = soft_targets(hidden, head, following, kept=topk(4))
    assert max(seen) == 5
    np.testing.assert_allclose(
        parts.logprobs, whole.logprobs, rtol=1e-6, atol=5e-6
    )  # logits to 8 eps of up to 5
    np.testing.assert_array_equal(parts.ids, whole.ids)


def test_a_tail_far_below_what_float32_can_add_to_the_entries_is_exact() -> None:
    """Sums per block are relative to the block's own maximum.

    e^-300 is no number of float32, its logarithm is.
    """
    logits = torch.full((300, 1), -300.0)
    logits[7] = 0.0
    logits[290:] = -torch.inf
    found = soft_targets(
        torch.ones(1, 1), Head(weight=logits), torch.tensor([299]), kept=topk(1, 2.0)
    )
    assert (found.ids.item(), found.token_logprob[0]) == (7, -np.inf)
    assert found.tail_logprob[0] == pytest.approx(np.log(289) - 300, rel=1e-6)
    assert found.tempered_tails[0, 0] == pytest.approx(np.log(289) - 150, rel=1e-6)
    assert found.entropy[0] == pytest.approx(0.0, abs=1e-6)


def test_equal_logits_are_as_many_distinct_entries() -> None:
    for k in (1, 5, 200, 300):
        found = soft_targets(
            torch.ones(2, 1), Head(weight=torch.ones(300, 1)), torch.tensor([0, 299]), kept=topk(k)
        )
        for row in found.ids:
            assert len(set(row.tolist())) == k
            assert (row >= 0).all()
            assert (row < 300).all()
        np.testing.assert_allclose(found.logprobs, -np.log(300), rtol=1e-6)
        expected = np.log((300 - k) / 300) if k < 300 else -np.inf
        np.testing.assert_allclose(found.tail_logprob, expected, rtol=1e-6, atol=1e-6)


def test_one_broken_number_breaks_the_numbers_of_its_position_alone() -> None:
    hidden, head, following, _ = case(5, 5, 300, scale=1.0, seed=2)
    hidden[3, 0] = torch.nan
    for kept in (topk(4), full(300), sampled(5)):
        found = soft_targets(hidden, head, following, kept=kept)
        assert np.isnan(found.entropy).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(
    "kept",
    [
        topk(4, 0.5, 2.0),
        Kept(kind="topp", k=20, p=0.7, k_min=2),
        sampled(6),
        sampled(6, draw="systematic", proposal=0.7, at=(2.0,)),
        full(300),
    ],
    ids=lambda kept: kept.kind,
)
def test_rows_of_a_batch_are_what_each_is_alone(
    monkeypatch: pytest.MonkeyPatch, kept: Kept
) -> None:
    hidden, head, following, _ = case(19, 5, 300, scale=1.0, seed=4)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 300 * 7)  # chunks end within rows
    spans = [Span(4, 11), Span(1, 12), Span(9, 13), Span(5, 14)]
    start = 0
    for span, row in zip(
        spans, Reducer(head).launch(hidden, following, kept=kept, spans=spans).rows(), strict=True
    ):
        own = slice(start, start + span.positions)
        alone = soft_targets(hidden[own], head, following[own], kept=kept, seed=span.seed)
        columns = row.columns(23)
        for name, value in alone.columns(23).items():
            if value is None:
                assert columns[name] is None
            else:
                # Logits of up to 14, from products of other shapes: 8 eps of them. Ids and counts
                # are integers.
                np.testing.assert_allclose(columns[name], value, atol=1.5e-5, err_msg=name)
        start += span.positions


def test_a_kernel_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "stillroom.stages.targets.block_sums_triton", raising=False)
    gpu, head = torch.device("cuda"), Head(weight=torch.ones(3, 1))
    assert module._chosen(None, gpu) is module.block_sums
    Reducer(head)
    with pytest.raises(
        UsageError, match=r"score\.kernel: triton cannot run, Triton does not import .*Leave it out"
    ):
        module._chosen("triton", gpu)
    with pytest.raises(
        UsageError, match=r"score\.kernel: triton cannot run, .* 'cpu', expected an NVIDIA GPU"
    ):
        Reducer(head, kernel="triton")


def test_an_amd_gpu_gets_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch calls it `cuda` too."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert module._chosen(None, torch.device("cuda")) is module.block_sums
    with pytest.raises(UsageError, match="expected an NVIDIA GPU"):
        module._chosen("triton", torch.device("cuda"))


@pytest.mark.parametrize("proposal", [1.0, 0.7])
def test_of_a_teacher_that_is_not_a_number_no_id_beyond_the_vocabulary_is_drawn(
    proposal: float,
) -> None:
    """On a GPU such an index ends the process, and whatever it was doing."""
    logprobs = torch.zeros(1, 9).log_softmax(-1)
    logprobs[0, 3] = torch.nan
    kept = Kept(kind="sampled", k=4, draw="multinomial", proposal=proposal)
    found = module.targets_of(logprobs, torch.zeros(1, dtype=torch.long), kept=kept)
    assert found.ids is not None
    assert found.ids.max() < 9
    assert np.isnan(found.entropy).all()


@pytest.mark.parametrize("bits", [7, 10, 23])
def test_stored_targets_are_the_truth_to_the_rounding_and_sum_to_one(bits: int) -> None:
    hidden, head, following, truth = case(64, 8, 500, scale=1.0, seed=5)
    stored = soft_targets(hidden, head, following, kept=topk(16)).columns(bits)
    row = SoftTargets.from_row(stored)
    best = -np.sort(-truth, axis=-1)[:, :16]
    np.testing.assert_allclose(row.logprobs, best, rtol=2.0 ** -(bits + 1) + 1e-5, atol=2e-5)
    if bits >= 10:
        total = np.exp(row.logprobs).sum(-1) + np.exp(row.tail_logprob)
        np.testing.assert_allclose(total, 1.0, atol=2e-3)


TEMPERATURES = (0.5, 1.5, 2.0, 4.0)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["topk", "topp"]),
    v=st.integers(2, 60),
    k=st.integers(1, 60),
    bits=st.sampled_from([10, 23]),
    block=st.sampled_from([3, 128]),
    seed=st.integers(0, 999),
)
def test_a_tempered_distribution_is_the_dense_one_to_the_rounding(
    kind: str, v: int, k: int, bits: int, block: int, seed: int
) -> None:
    """Entries, tail and normaliser are those of softmax(z / T) in float64.

    Each rounded number moves by its own share.
    """
    n, k = 7, min(k, v)
    hidden, head, following, truth = case(n, 5, v, scale=1.0, seed=seed)
    kept = Kept(
        kind=kind, k=k, p=0.8 if kind == "topp" else None, k_min=1, temperatures=TEMPERATURES
    )
    with patch.object(module, "BLOCK", block), patch.object(block_sums, "BLOCK", block):
        found = soft_targets(
            hidden, head, following, kept=kept if kind == "topp" else topk(k, *TEMPERATURES)
        )
    row = SoftTargets.from_row(found.columns(bits))
    np.testing.assert_array_equal(row.temperatures, np.array(TEMPERATURES, np.float32))
    for number, t in enumerate(TEMPERATURES):
        dense = truth / t - np.log(np.exp(truth / t).sum(-1, keepdims=True))
        outside = np.ones((n, v + 1), bool)
        np.put_along_axis(outside, row.ids, False, axis=1)  # padding, id -1, goes to the last place
        entries, tail = (
            row.logprobs.astype(np.float64) / t,
            row.tempered_tails[:, number].astype(np.float64),
        )
        normaliser = np.logaddexp(np.log(np.exp(entries).sum(-1)), tail)
        unit = 2.0 ** -(bits + 1)
        worst = (
            unit * np.maximum(np.abs(truth).max(-1) / t, np.nan_to_num(np.abs(tail), posinf=0))
            + 3e-5
        )
        for position in range(n):
            used = row.ids[position] >= 0
            exact = dense[position, row.ids[position, used]]
            assert (
                np.abs(entries[position, used] - normaliser[position] - exact).max()
                <= 2 * worst[position]
            )
            rest = np.exp(dense[position, outside[position, :v]]).sum()
            assert abs(np.exp(tail[position] - normaliser[position]) - rest) <= 2 * worst[
                position
            ] * max(rest, 1e-3)


def zipf(v: int, positions: int) -> tuple[torch.Tensor, Head, torch.Tensor, np.ndarray]:
    """Every position has p_i proportional to 1 / i; hidden states, head, following tokens, p."""
    truth = 1 / np.arange(1, v + 1)
    truth /= truth.sum()
    head = Head(weight=torch.from_numpy(np.log(truth)).float()[:, None])
    return torch.ones(positions, 1), head, torch.zeros(positions, dtype=torch.long), truth


def dense(targets: SoftTargets, v: int) -> np.ndarray:
    """[N, V] what the entries say, 0 elsewhere."""
    found = np.zeros((len(targets.entropy), v + 1))
    np.put_along_axis(
        found, targets.ids, targets.probabilities, axis=1
    )  # padding, id -1, goes to the last place
    return found[:, :v]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(2, 60),
    k=st.integers(1, 60),
    p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    k_min=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_topp_keeps_the_fewest_that_hold_p_and_the_rest_exactly(
    n: int, v: int, k: int, p: float, k_min: int, seed: int
) -> None:
    hidden, head, following, truth = case(n, 5, v, scale=1.0, seed=seed)
    found = soft_targets(hidden, head, following, kept=Kept(kind="topp", p=p, k=k, k_min=k_min))
    best = -np.sort(-truth, axis=-1)
    # up to 60 shares are added in float32, and each comes from a logit of up to 20: (60 + 20) eps
    room = 1e-5
    for t in range(n):
        mass, most = np.exp(best[t]).cumsum(), min(k, v)
        count = found.entries[t]
        assert min(k_min, most) <= count <= most
        assert count == most or mass[count - 1] >= p - room
        assert count <= k_min or mass[count - 2] <= p + room
        np.testing.assert_allclose(found.logprobs[t, :count], best[t, :count], atol=2e-5, rtol=1e-5)
        assert np.isneginf(found.logprobs[t, count:]).all()
        assert (found.ids[t, count:] == -1).all()
        np.testing.assert_allclose(
            np.exp(found.tail_logprob[t]), np.exp(best[t, count:]).sum(), atol=1e-6, rtol=1e-4
        )
    same = soft_targets(hidden, head, following, kept=full(v))
    np.testing.assert_allclose(found.token_logprob, same.token_logprob, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found.entropy, same.entropy, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("draw", ["multinomial", "systematic"])
@pytest.mark.parametrize(
    ("proposal", "at"), [(1.0, ()), (1.0, (2.0,)), (0.7, ()), (1.3, ()), (0.7, (2.0,))]
)
def test_the_mean_of_sampled_targets_is_the_teacher(
    draw: str, proposal: float, at: tuple[float, ...]
) -> None:
    """4,000 positions have one distribution.

    Every id is within its share of 3 standard errors, most within one share.
    """
    n, v = 4000, 40
    hidden, head, following, teacher = zipf(v, n)
    truth = teacher if not at else teacher ** (1 / at[0]) / (teacher ** (1 / at[0])).sum()
    found = soft_targets(
        hidden, head, following, kept=sampled(7, draw=draw, proposal=proposal, at=at), seed=3
    )
    estimate = dense(found, v)
    assert found.entropy == pytest.approx(-(truth * np.log(truth)).sum(), abs=1e-4)
    assert found.token_logprob == pytest.approx(np.log(teacher[0]), abs=1e-5)
    if at:
        assert found.tempered_tails == pytest.approx(
            np.log((teacher ** (1 / at[0])).sum()), abs=1e-4
        )
    error = np.abs(estimate.mean(0) - truth)
    standard = estimate.std(0, ddof=1) / np.sqrt(n)
    assert (error <= 3 * standard + 1e-9).mean() >= 0.95
    assert (error <= 5 * standard + 1e-9).all()
    if proposal == 1.0:
        assert found.weights is None
        assert (found.counts.sum(1) == 7).all()
    else:
        assert found.counts is None


def test_systematic_counts_are_rounded_up_or_down_and_vary_less() -> None:
    n, v, rounds = 500, 40, 9
    hidden, head, following, truth = zipf(v, n)
    spread = {}
    for draw in ("multinomial", "systematic"):
        found = soft_targets(hidden, head, following, kept=sampled(rounds, draw=draw), seed=1)
        spread[draw] = dense(found, v).var(0).sum()
        if draw == "systematic":
            off = dense(found, v) * rounds - rounds * truth
            assert (np.abs(off) < 1 + 1e-5).all()
    expected = {
        "multinomial": (truth * (1 - truth)).sum() / rounds,
        "systematic": (rounds * truth % 1 * (1 - rounds * truth % 1)).sum() / rounds**2,
    }
    for draw, value in spread.items():
        assert value == pytest.approx(expected[draw], rel=0.1)
    assert spread["systematic"] < 0.8 * spread["multinomial"]


def test_the_exact_numbers_of_zipf() -> None:
    """V = 100,000: the head's mass, and the ids that 4, 13 and 50 draws are expected to hit.

    That is the sum of 1 - (1 - p)^R.
    """
    hidden, head, following, truth = zipf(100_000, 300)
    best = soft_targets(hidden[:1], head, following[:1], kept=topk(20))
    kept = np.exp(best.logprobs[0], dtype=np.float64)
    assert kept.sum() == pytest.approx(0.2976, abs=5e-5)
    assert kept[1] / kept.sum() == pytest.approx(0.1390, abs=5e-5)  # the tail dropped
    assert kept[0] * (2 - kept.sum()) == pytest.approx(
        0.1408, abs=5e-5
    )  # the tail given to the token that is there
    for rounds, unique in ((4, 3.94), (13, 12.29), (50, 43.03)):
        assert (1 - (1 - truth) ** rounds).sum() == pytest.approx(unique, abs=5e-3)
        found = soft_targets(hidden, head, following, kept=sampled(rounds), seed=0)
        error = found.entries.std(ddof=1) / np.sqrt(len(found.entries))
        assert abs(found.entries.mean() - unique) < 3 * error


@pytest.mark.parametrize("draw", ["multinomial", "systematic"])
def test_draws_depend_on_seed_and_position_alone(
    monkeypatch: pytest.MonkeyPatch, draw: str
) -> None:
    hidden, head, following, _ = case(23, 5, 31, scale=1.0, seed=1)
    kept = sampled(6, draw=draw, at=(2.0,))
    whole = soft_targets(hidden, head, following, kept=kept, seed=11).columns(23)
    first = soft_targets(hidden[:9], head, following[:9], kept=kept, seed=11).columns(23)
    used = first["entries"].sum()
    np.testing.assert_array_equal(whole["ids"][:used], first["ids"])
    np.testing.assert_array_equal(whole["counts"][:used], first["counts"])
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 31 * 5)
    parts = soft_targets(hidden, head, following, kept=kept, seed=11).columns(23)
    np.testing.assert_array_equal(parts["ids"], whole["ids"])
    other = soft_targets(hidden, head, following, kept=kept, seed=12).columns(23)
    assert not np.array_equal(other["ids"], whole["ids"])


def test_an_id_of_no_probability_is_never_drawn() -> None:
    head = Head(weight=torch.tensor([[-torch.inf], [0.0], [-torch.inf], [0.0], [-torch.inf]]))
    hidden, following = torch.ones(200, 1), torch.ones(200, dtype=torch.long)
    for kept in (sampled(5), sampled(5, draw="systematic", proposal=0.5)):
        found = soft_targets(hidden, head, following, kept=kept)
        assert set(np.unique(found.columns(23)["ids"])) == {1, 3}
        assert found.entropy == pytest.approx(np.log(2))
