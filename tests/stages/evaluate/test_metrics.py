"""Each measure against its definition.

It is written from the mathematics in float64 numpy with plain loops.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from stillroom.stages.evaluate.metrics import (
    BINS,
    JUDGED,
    Tally,
    bucketed,
    chunk_tokens,
    measure,
    measure_teacher,
)
from stillroom.storage.errors import StillroomError
from stillroom.storage.tables.soft_targets import SoftTargets

pytestmark = pytest.mark.numeric

N, V = 40, 23
ROUNDING = (
    5e-6  # float32 holds a logit of up to 16 to eps / 2 = 6e-8 of it, and so do teacher and model
)


def distribution(
    rng: np.random.Generator, shape: tuple[int, int], sharpness: float = 2.0
) -> np.ndarray:
    z = np.exp(sharpness * rng.normal(size=shape))
    return z / z.sum(axis=1, keepdims=True)


def full_targets(t: np.ndarray, tokens: np.ndarray) -> SoftTargets:
    with np.errstate(divide="ignore"):
        logs = np.log(t)
    entropy = -np.sum(np.where(t > 0, t * np.where(t > 0, logs, 0), 0), axis=1)
    return SoftTargets(
        ids=None,
        logprobs=logs.astype(np.float32),
        tail_logprob=np.full(len(t), -np.inf, np.float32),
        token_logprob=logs[np.arange(len(t)), tokens].astype(np.float32),
        entropy=entropy.astype(np.float32),
    )


def topk_targets(t: np.ndarray, tokens: np.ndarray, k: int) -> SoftTargets:
    ids = np.argsort(-t, axis=1)[:, :k]
    kept = np.take_along_axis(t, ids, axis=1)
    outside = t.copy()
    np.put_along_axis(outside, ids, 0.0, axis=1)
    full = full_targets(t, tokens)
    with np.errstate(divide="ignore"):
        tail = np.log(outside.sum(axis=1))
    return SoftTargets(
        ids=ids.astype(np.int32),
        logprobs=np.log(kept).astype(np.float32),
        tail_logprob=tail.astype(np.float32),
        token_logprob=full.token_logprob,
        entropy=full.entropy,
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Teacher t, model p, tokens."""
    return distribution(rng, (N, V)), distribution(rng, (N, V)), rng.integers(0, V, N)


def logits_of(p: np.ndarray) -> torch.Tensor:
    """Logits are free up to a constant per position."""
    with np.errstate(divide="ignore"):
        return torch.tensor(np.log(p) + np.arange(len(p))[:, None] % 7, dtype=torch.float32)


def slow_kl(
    t: Sequence[Sequence[float]] | np.ndarray, p: Sequence[Sequence[float]] | np.ndarray
) -> list[float]:
    return [
        math.fsum(
            ti * (math.log(ti) - math.log(pi))
            for ti, pi in zip(t_row, p_row, strict=True)
            if ti > 0
        )
        for t_row, p_row in zip(t, p, strict=True)
    ]


def slow_tv(
    t: Sequence[Sequence[float]] | np.ndarray, p: Sequence[Sequence[float]] | np.ndarray
) -> list[float]:
    """The largest difference of the probabilities that the two give to one event.

    That event is all ids with t > p.
    """
    return [
        math.fsum(ti - pi for ti, pi in zip(t_row, p_row, strict=True) if ti > pi)
        for t_row, p_row in zip(t, p, strict=True)
    ]


def slow_acceptance(t: np.ndarray, p: np.ndarray) -> list[float]:
    """A proposed token x ~ p is accepted with probability min(1, t(x) / p(x))."""
    return [
        math.fsum(pi * min(1.0, ti / pi) for ti, pi in zip(t_row, p_row, strict=True) if pi > 0)
        for t_row, p_row in zip(t, p, strict=True)
    ]


def merge(t: np.ndarray, p: np.ndarray, kept: list[list[int]]) -> list[list[list[float]]]:
    """Merge every id that is not kept into one outcome on both sides."""
    merged = []
    for side in (t, p):
        rows = [[row[i] for i in ids] for row, ids in zip(side, kept, strict=True)]
        rest = [
            math.fsum(v for i, v in enumerate(row) if i not in ids)
            for row, ids in zip(side, kept, strict=True)
        ]
        merged.append([[*row, r] for row, r in zip(rows, rest, strict=True)])
    return merged


def slow_bucket_kl(t: np.ndarray, p: np.ndarray, kept: list[list[int]]) -> list[float]:
    """The KL of what is left when all others are merged."""
    return slow_kl(*merge(t, p, kept))


def test_cross_entropy_is_the_mean_of_minus_log_p_and_perplexity_its_exponential(case) -> None:
    _, p, tokens = case
    tally = Tally()
    tally.add(b"a", measure(logits_of(p), torch.tensor(tokens)))
    expected = -sum(math.log(p[i, tokens[i]]) for i in range(N)) / N
    results = tally.results()
    assert results["cross_entropy"] == pytest.approx(expected, rel=1e-6)
    assert results["perplexity"] == pytest.approx(
        math.prod(p[i, tokens[i]] ** (-1 / N) for i in range(N)), rel=1e-5
    )


def test_full_kl_is_the_sum_over_the_vocabulary(case) -> None:
    t, p, tokens = case
    found = measure(logits_of(p), torch.tensor(tokens), full_targets(t, tokens))
    np.testing.assert_allclose(found["kl_teacher"], slow_kl(t, p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_bucket_kl_merges_what_is_not_kept_and_bounds_the_full_kl_from_below(case, k: int) -> None:
    t, p, tokens = case
    reference = topk_targets(t, tokens, k)
    found = measure(logits_of(p), torch.tensor(tokens), reference)["kl_teacher"].numpy()
    assert reference.ids is not None
    np.testing.assert_allclose(
        found, slow_bucket_kl(t, p, reference.ids.tolist()), rtol=1e-5, atol=1e-6
    )
    assert (found <= np.array(slow_kl(t, p)) + 1e-5).all()


def test_with_every_id_kept_the_bucket_is_empty_and_the_kl_is_the_full_one(case) -> None:
    t, p, tokens = case
    found = measure(logits_of(p), torch.tensor(tokens), topk_targets(t, tokens, V))["kl_teacher"]
    np.testing.assert_allclose(found, slow_kl(t, p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [None, 5])
def test_a_model_that_is_the_teacher_has_no_kl_and_agrees_everywhere(case, k: int | None) -> None:
    t, _, tokens = case
    reference = full_targets(t, tokens) if k is None else topk_targets(t, tokens, k)
    found = measure(logits_of(t), torch.tensor(tokens), reference)
    assert found["kl_teacher"].abs().max() < ROUNDING
    assert found["top1_agreement"].all()


def test_ids_that_only_the_model_has_are_ids_of_no_teacher_probability(
    case, rng: np.random.Generator
) -> None:
    t, _, tokens = case
    p = distribution(rng, (N, V + 9))
    padded = np.concatenate([t, np.zeros((N, 9))], axis=1)
    for reference in (full_targets(t, tokens), topk_targets(t, tokens, V)):
        found = measure(logits_of(p), torch.tensor(tokens), reference)
        np.testing.assert_allclose(found["kl_teacher"], slow_kl(padded, p), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found["top1_agreement"], p.argmax(1) == t.argmax(1))


def test_entries_that_the_model_lacks_go_into_the_bucket(case, rng: np.random.Generator) -> None:
    t, _, _ = case
    shared = V - 6
    tokens = rng.integers(0, shared, N)
    p = distribution(rng, (N, shared))
    reference = topk_targets(t, tokens, 9)
    assert reference.ids is not None
    kept = [[i for i in ids if i < shared] for ids in reference.ids.tolist()]
    assert any(len(ids) < 9 for ids in kept)
    with_nothing = np.concatenate([p, np.zeros((N, V - shared))], axis=1)
    found = measure(logits_of(p), torch.tensor(tokens), reference)
    np.testing.assert_allclose(
        found["kl_teacher"], slow_bucket_kl(t, with_nothing, kept), rtol=1e-5, atol=1e-6
    )
    lacking = [
        sum(t[row, i] for i in ids if i >= shared) for row, ids in enumerate(reference.ids.tolist())
    ]
    np.testing.assert_allclose(found["unshared_mass"], lacking, rtol=1e-5, atol=1e-7)


def test_full_targets_with_ids_that_the_model_lacks_are_conditioned_on_the_shared_ids(
    case, rng
) -> None:
    t, _, _ = case
    shared = V - 6
    tokens = rng.integers(0, shared, N)
    p = distribution(rng, (N, shared))
    found = measure(logits_of(p), torch.tensor(tokens), full_targets(t, tokens))
    conditioned = t[:, :shared] / t[:, :shared].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found["kl_teacher"], slow_kl(conditioned, p), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["unshared_mass"], t[:, shared:].sum(axis=1), rtol=1e-5)


def test_top1_agreement_compares_best_ids_and_ties_of_the_teacher_are_all_best() -> None:
    t = np.array([[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]])
    p = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.1, 0.1, 0.8]])
    tokens = np.zeros(4, int)
    for reference in (full_targets(t, tokens), topk_targets(t, tokens, 2)):
        agreement = measure(logits_of(p), torch.tensor(tokens), reference)["top1_agreement"]
        assert agreement.tolist() == [True, True, False, True]


def test_calibration_error_follows_guo_et_al(rng: np.random.Generator) -> None:
    p, tokens = distribution(rng, (2000, 5)), rng.integers(0, 5, 2000)
    tally = Tally()
    for start in range(0, 2000, 300):  # the chunks must not matter
        part = slice(start, start + 300)
        tally.add(bytes([start // 300]), measure(logits_of(p[part]), torch.tensor(tokens[part])))
    expected, filled = 0.0, 0
    for lower, upper in pairwise(np.linspace(0, 1, BINS + 1)):
        members = [i for i in range(2000) if lower < p[i].max() <= upper]
        if members:
            accuracy = np.mean([p[i].argmax() == tokens[i] for i in members])
            confidence = np.mean([p[i].max() for i in members])
            expected += len(members) / 2000 * abs(accuracy - confidence)
            filled += 1
    assert tally.ece() == pytest.approx(expected, rel=1e-5)
    bins = tally.reliability()
    assert len(bins) == filled
    assert sum(b["tokens"] for b in bins) == 2000
    assert all(b["confidence"] <= b["up_to"] + 1e-9 for b in bins)


def test_a_confidence_on_an_edge_is_in_the_bin_below_it() -> None:
    tally = Tally()
    confidence = torch.tensor([0.2, 0.25], dtype=torch.float64)  # 0.2 = 3 / 15 ends the third bin
    correct = torch.tensor([False, True])
    tally.add(b"a", {"cross_entropy": confidence, "confidence": confidence, "correct": correct})
    assert [b["up_to"] for b in tally.reliability()] == [3 / BINS, 4 / BINS]
    assert tally.ece() == pytest.approx((0.2 + 0.75) / 2)


def test_a_certain_and_right_model_is_perfectly_calibrated() -> None:
    tokens = torch.tensor([1, 0, 2])
    logits = torch.full((3, 3), -200.0).scatter(1, tokens[:, None], 0.0)
    tally = Tally()
    tally.add(b"a", measure(logits, tokens))
    assert tally.ece() == 0.0


def test_standard_errors_are_the_ratio_estimators_over_units_and_pairing_cancels_what_arms_share(
    rng,
) -> None:
    first, second = Tally(), Tally()
    counts, sums, other = [3, 10, 4, 7], [], []
    for unit, n in enumerate(counts):
        p, tokens = distribution(rng, (n, V)), rng.integers(0, V, n)
        q = 0.9 * p + 0.1 / V
        for tally, model, kept in ((first, p, sums), (second, q, other)):
            half = n // 2
            for part in (slice(0, half), slice(half, n)):  # two rows of one prompt are one unit
                tally.add(
                    bytes([unit]), measure(logits_of(model)[part], torch.tensor(tokens[part]))
                )
            kept.append(-sum(math.log(model[i, tokens[i]]) for i in range(n)))

    def slow_error(values: list[float]) -> float:
        mean = sum(values) / sum(counts)
        residuals = [v - mean * n for v, n in zip(values, counts, strict=True)]
        return math.sqrt(4 / 3 * sum(r * r for r in residuals)) / sum(counts)

    assert first.results()["cross_entropy_se"] == pytest.approx(slow_error(sums), rel=1e-4)
    gap = first.minus(second)
    assert gap["cross_entropy"] == pytest.approx((sum(sums) - sum(other)) / sum(counts), rel=1e-4)
    assert gap["cross_entropy_se"] == pytest.approx(
        slow_error([a - b for a, b in zip(sums, other, strict=True)]), rel=1e-3
    )
    assert gap["cross_entropy_se"] < slow_error(sums)


def test_one_unit_has_no_standard_error(case) -> None:
    _, p, tokens = case
    tally = Tally()
    tally.add(b"a", measure(logits_of(p), torch.tensor(tokens)))
    assert tally.results()["cross_entropy_se"] is None
    assert (tally.units, tally.tokens) == (1, N)


def test_the_teacher_is_measured_from_what_is_stored_as_its_logits_would_be(case) -> None:
    t, _, tokens = case
    from_logits, stored = Tally(), Tally()
    from_logits.add(b"a", measure(logits_of(t), torch.tensor(tokens)))
    for reference in (full_targets(t, tokens), topk_targets(t, tokens, 4)):
        stored = Tally()
        stored.add(b"a", measure_teacher(reference, torch.tensor(tokens)))
        results = stored.results()
        for name in ("cross_entropy", "perplexity", "ece"):
            assert results[name] == pytest.approx(from_logits.results()[name], rel=1e-5)
        assert (results["kl_teacher"], results["top1_agreement"]) == (0.0, 1.0)
        assert (results["tv_teacher"], results["acceptance"]) == (0.0, 1.0)
        assert results["entropy"] == pytest.approx(-np.sum(t * np.log(t)) / N, rel=1e-5)


def test_a_model_without_a_teacher_has_no_kl_field(case) -> None:
    _, p, tokens = case
    tally = Tally()
    tally.add(b"a", measure(logits_of(p), torch.tensor(tokens)))
    assert not {"kl_teacher", "tv_teacher", "acceptance", "top1_agreement"} & set(tally.results())


def test_kl_is_finite_where_the_teacher_is_certain() -> None:
    t = np.array([[1.0, 0.0, 0.0]])
    p = np.array([[0.5, 0.25, 0.25]])
    for reference in (full_targets(t, np.zeros(1, int)), topk_targets(t, np.zeros(1, int), 1)):
        kl = measure(logits_of(p), torch.tensor([0]), reference)["kl_teacher"]
        assert kl.item() == pytest.approx(math.log(2), rel=1e-6)


def test_putting_all_others_in_a_bucket_does_not_touch_the_inputs(case) -> None:
    t, p, tokens = case
    reference = topk_targets(t, tokens, 4)
    logprobs = logits_of(p).log_softmax(-1)
    before = logprobs.clone()
    parts = [
        torch.tensor(reference.ids).long(),
        torch.tensor(reference.logprobs),
        torch.tensor(reference.tail_logprob),
    ]
    bucketed(*parts, logprobs=logprobs)
    assert torch.equal(logprobs, before)


def test_on_full_targets_total_variation_and_acceptance_are_what_they_are_defined_as(case) -> None:
    t, p, tokens = case
    found = measure(logits_of(p), torch.tensor(tokens), full_targets(t, tokens))
    np.testing.assert_allclose(found["tv_teacher"], slow_tv(t, p), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["acceptance"], slow_acceptance(t, p), rtol=1e-5, atol=1e-6)
    assert (found["tv_teacher"] <= (found["kl_teacher"] / 2).sqrt()).all()  # Pinsker's inequality


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_over_a_bucket_total_variation_is_a_lower_bound_and_acceptance_an_upper_one(
    case, k: int
) -> None:
    t, p, tokens = case
    reference = topk_targets(t, tokens, k)
    assert reference.ids is not None
    found = measure(logits_of(p), torch.tensor(tokens), reference)
    merged = slow_tv(*merge(t, p, reference.ids.tolist()))
    np.testing.assert_allclose(found["tv_teacher"], merged, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["acceptance"], 1 - np.array(merged), rtol=1e-5, atol=1e-6)
    whole, bound = np.array(slow_tv(t, p)), found["tv_teacher"].numpy()
    assert (bound <= whole + ROUNDING).all()
    assert (found["acceptance"].numpy() >= np.array(slow_acceptance(t, p)) - ROUNDING).all()
    assert (bound[whole > 0.01] < whole[whole > 0.01] - 1e-4).any() == (
        k < V - 1
    )  # one id alone is no bucket
    assert (found["tv_teacher"] <= (found["kl_teacher"] / 2).sqrt() + ROUNDING).all()


@pytest.mark.parametrize("k", [None, 5])
def test_a_model_that_is_the_teacher_has_all_its_tokens_accepted_and_its_opposite_none(
    case, k: int | None
) -> None:
    t, _, tokens = case
    reference = full_targets(t, tokens) if k is None else topk_targets(t, tokens, k)
    found = measure(logits_of(t), torch.tensor(tokens), reference)
    np.testing.assert_allclose(found["tv_teacher"], 0.0, atol=ROUNDING)
    np.testing.assert_allclose(found["acceptance"], 1.0, atol=ROUNDING)
    certain = np.zeros((2, V))
    certain[:, 3] = 1.0
    reference = (
        full_targets(certain, np.full(2, 3))
        if k is None
        else topk_targets(certain, np.full(2, 3), 1)
    )
    elsewhere = torch.full((2, V), -200.0)
    elsewhere[:, 4] = 200.0
    found = measure(elsewhere, torch.full((2,), 3), reference)
    assert found["tv_teacher"].tolist() == [1.0, 1.0]
    assert found["acceptance"].tolist() == [0.0, 0.0]


def test_ids_that_the_model_lacks_are_never_proposed_and_never_accepted(
    case, rng: np.random.Generator
) -> None:
    t, _, _ = case
    shared = V - 6
    tokens, p = rng.integers(0, shared, N), distribution(rng, (N, shared))
    with_nothing = np.concatenate([p, np.zeros((N, V - shared))], axis=1)
    whole = measure(logits_of(p), torch.tensor(tokens), full_targets(t, tokens))
    np.testing.assert_allclose(whole["tv_teacher"], slow_tv(t, with_nothing), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        whole["acceptance"], slow_acceptance(t, with_nothing), rtol=1e-5, atol=1e-6
    )
    reference = topk_targets(t, tokens, 9)
    assert reference.ids is not None
    kept = [[i for i in ids if i < shared] for ids in reference.ids.tolist()]
    found = measure(logits_of(p), torch.tensor(tokens), reference)
    np.testing.assert_allclose(
        found["tv_teacher"], slow_tv(*merge(t, with_nothing, kept)), rtol=1e-5, atol=1e-6
    )


def test_every_measure_has_a_standard_error_and_so_has_every_paired_difference(rng) -> None:
    first, second = Tally(), Tally()
    for unit, n in enumerate([3, 10, 4, 7, 5]):
        t, tokens = distribution(rng, (n, V)), rng.integers(0, V, n)
        p = 0.4 * t + 0.6 * distribution(rng, (n, V))
        for tally, model in ((first, p), (second, 0.9 * p + 0.1 / V)):
            tally.add(
                bytes([unit]),
                measure(logits_of(model), torch.tensor(tokens), full_targets(t, tokens)),
            )
    one, other, gap = first.results(), second.results(), first.minus(second)
    names = [name for name in JUDGED if name != "accuracy"]  # of classes only
    assert list(gap) == [key for name in names for key in (name, f"{name}_se")]
    for name in names:
        assert gap[name] == pytest.approx(one[name] - other[name], abs=1e-12)
        assert 0 < one[f"{name}_se"] < 1
    assert gap["acceptance"] == pytest.approx(-gap["tv_teacher"], abs=1e-7)
    assert gap["acceptance_se"] == pytest.approx(gap["tv_teacher_se"], rel=1e-4)
    assert gap["tv_teacher_se"] < one["tv_teacher_se"]  # what arms share cancels


def test_the_standard_error_of_the_calibration_error_is_its_spread_over_draws_of_prompts() -> None:
    """Over-confident in every bin, so that no gap changes its sign: 150 draws of 30 prompts."""
    rng = np.random.default_rng(11)
    found, stated = [], []
    for _ in range(150):
        tally = Tally()
        for unit in range(30):
            n = int(rng.integers(1, 13))
            confidence = torch.tensor(rng.uniform(0.55, 0.65, n))
            correct = torch.tensor(rng.random(n) < confidence.numpy() - 0.3)
            values = {"cross_entropy": confidence, "confidence": confidence, "correct": correct}
            tally.add(bytes([unit]), values)
        results = tally.results()
        found.append(results["ece"])
        stated.append(results["ece_se"])
    assert np.mean(found) == pytest.approx(0.3, abs=0.01)
    assert np.mean(stated) == pytest.approx(
        np.std(found), rel=0.2
    )  # a spread of 150 draws is known to 6 %


def test_the_error_of_the_calibration_error_pairs_the_sums_of_a_prompt_with_its_tokens() -> None:
    """The standard error does so whichever prompt has its first labelled token first."""
    rng = np.random.default_rng(5)
    rows: list[tuple[bytes, dict[str, torch.Tensor]]] = []
    for unit, n in ((b"a", 2), (b"b", 9)):
        confidence = torch.tensor(rng.uniform(0.55, 0.65, n))
        correct = torch.tensor(rng.random(n) < 0.3)
        values = {"cross_entropy": confidence, "confidence": confidence, "correct": correct}
        rows.append((unit, values))
    stated = []
    for order in (rows, rows[::-1]):
        tally = Tally()
        tally.add(b"a", {"kl_teacher": torch.zeros(1)})  # a text of this prompt without a label
        for unit, values in order:
            tally.add(unit, values)
        stated.append(tally.results()["ece_se"])
    assert stated[0] == pytest.approx(stated[1], rel=1e-9)


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(StillroomError, match="training diverged"):
        measure(torch.full((1, 3), torch.nan), torch.tensor([0]))


def test_chunks_are_bounded() -> None:
    assert chunk_tokens(32_000) * 32_000 * 4 <= 64 * 2**20
    assert chunk_tokens(10**9) == 1
