"""The losses against float64 definitions, in value and gradient.

They are tested at every edge that made a peer's loss wrong.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import objective_of
from references import DIVERGENCES, cross_entropy, over_bucket, softmax

from stillroom.stages.losses.fused_linear import linear_distillation
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.head import Head
from stillroom.stages.targets.batch import TargetBatch, fit_vocabulary
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric

ALL = list(DIVERGENCES)
EPS = torch.finfo(torch.float32).eps
PLAIN = {"softcap": None, "scale": 1.0, "bias": False}
CAPPED = {"softcap": 4.0, "scale": 1.5, "bias": True}


def make_targets(teacher_logits, k):
    """Top-k targets and an exact tail of [N, V] logits; k = None: full."""
    logprobs = teacher_logits.log_softmax(-1)
    labels = torch.arange(len(logprobs)) % logprobs.shape[-1]
    if k is None:
        return TargetBatch(
            labels=labels, logprobs=logprobs, tail_logprob=torch.full((len(logprobs),), -math.inf)
        )
    kept, ids = logprobs.topk(k, -1)
    tail = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1)
    return TargetBatch(labels=labels, ids=ids, logprobs=kept, tail_logprob=tail)


def make_problem(n=7, v=23, d=6, seed=0, head=PLAIN, dtype=torch.float32):
    """Hidden states, head parameters and teacher logits, requiring gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden = normal(n, d).to(dtype).requires_grad_()
    weight = normal(v, d).to(dtype).requires_grad_()
    bias = normal(v).to(dtype).requires_grad_() if head["bias"] else None
    return (
        hidden,
        Head(weight=weight, bias=bias, softcap=head["softcap"], scale=head["scale"]),
        2 * normal(n, v),
    )


def reference_logits(hidden, weight, bias, head):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def reference(hidden, head, targets, divergence):
    """(soft [N], hard [N], gradients of 0.7 * sum soft + 0.3 * sum hard), all float64."""
    leaves = [
        t.detach().double().requires_grad_()
        for t in (hidden, head.weight, head.bias)
        if t is not None
    ]
    logits = reference_logits(leaves[0], leaves[1], leaves[2] if len(leaves) == 3 else None, head)
    soft, hard = [], []
    for n, row in enumerate(logits):
        ids = range(targets.logprobs.shape[-1]) if targets.ids is None else targets.ids[n].tolist()
        entries = [
            (i, math.exp(x))
            for i, x in zip(ids, targets.logprobs[n].double().tolist(), strict=True)
            if i >= 0
        ]
        tail = math.exp(float(targets.tail_logprob[n].double()))
        soft.append(
            over_bucket(divergence, row, [i for i, _ in entries], [t for _, t in entries], tail)
        )
        hard.append(cross_entropy(row, int(targets.labels[n])))
    soft, hard = torch.stack(soft), torch.stack(hard)
    return soft, hard, torch.autograd.grad((0.7 * soft + 0.3 * hard).sum(), leaves)


def rounding(divergence, logits):
    """What float32 leaves of a divergence that is 0.

    A log-probability is a difference of numbers as great as the logits, so it is known to eps times
    the greatest: four such roundings, two on either side. `alpha_beta` divides its difference of
    sums by its exponents, 0.2 * 0.7.
    """
    return (
        4
        * EPS
        * max(1.0, float(logits.abs().max()))
        / (0.2 * 0.7 if divergence == "alpha_beta" else 1)
    )


def objective(divergence):
    return None if divergence is None else objective_of(divergence=divergence)


def measured(hidden, head, targets, divergence, **more):
    found = distilled(hidden, head, targets, objective(divergence), **more)
    leaves = [t for t in (hidden, head.weight, head.bias) if t is not None]
    return found.soft, found.hard, torch.autograd.grad(found.total, leaves)


def distilled(hidden, head, targets, objective, *, soft=0.7, hard=0.3, **more):
    aim = Aim(objective=objective, soft_weight=soft, hard_weight=hard)
    return linear_distillation(hidden, head, targets, aim=aim, **more)


def assert_same(found, expected, *, forward=1e-5, backward=5e-5):
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=forward, atol=forward)
    for a, b in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=backward, atol=backward)


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("head", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("k", [1, 5, 22, 23, None], ids=["k=1", "k=5", "k=V-1", "k=V", "full"])
def test_value_and_gradient_equal_the_definition(divergence, head, k):
    hidden, student, teacher = make_problem(head=head)
    targets = make_targets(teacher, k)
    assert_same(
        measured(hidden, student, targets, divergence),
        reference(hidden, student, targets, divergence),
    )


@pytest.mark.parametrize("divergence", ALL)
def test_every_id_kept_equals_dense(divergence):
    hidden, student, teacher = make_problem()
    sparse = measured(hidden, student, make_targets(teacher, 23), divergence)
    dense = measured(hidden, student, make_targets(teacher, None), divergence)
    assert_same(
        sparse,
        (dense[0].double(), dense[1].double(), [g.double() for g in dense[2]]),
        forward=5e-6,
        backward=2e-5,
    )
    p, t = (
        logits.double().softmax(-1)
        for logits in (reference_logits(hidden, student.weight, None, student), teacher)
    )
    expected = [DIVERGENCES[divergence](list(a), list(b)) for a, b in zip(t, p, strict=True)]
    torch.testing.assert_close(dense[0].double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_forward_gradient_is_the_closed_form():
    """The weight is the identity, so the states are the logits z.

    Then d/dz_j is p_j - t_j, or p_j (1 - t_B / p_B).
    """
    _, _, teacher = make_problem(v=11)
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(3)).requires_grad_()
    targets = make_targets(teacher, 4)
    found = distilled(
        logits, Head(weight=torch.eye(11)), targets, objective_of(), soft=1.0, hard=0.0
    )
    (gradient,) = torch.autograd.grad(found.total, logits)
    for n in range(7):
        p = softmax(logits[n].detach())
        kept = dict(zip(targets.ids[n].tolist(), targets.logprobs[n].exp().tolist(), strict=True))
        outside = sum(float(p[j]) for j in range(11) if j not in kept)
        ratio = math.exp(float(targets.tail_logprob[n])) / outside
        expected = [
            float(p[j]) - kept[j] if j in kept else float(p[j]) * (1 - ratio) for j in range(11)
        ]
        assert gradient[n].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("k", [1, 6, 23, None])
def test_zero_at_equality(divergence, k):
    hidden, student, _ = make_problem()
    with torch.no_grad():
        logits = reference_logits(hidden, student.weight, None, student)
        targets = make_targets(logits, k)
    found = distilled(hidden, student, targets, objective(divergence), soft=1.0, hard=0.0)
    gradients = torch.autograd.grad(found.total, [hidden, student.weight])
    assert found.soft.abs().max() < rounding(divergence, logits)
    if divergence != "total_variation":  # has a corner there: any gradient up to p is right
        # A sum over the seven tokens of what is left of p - t, times states and weights, which are
        # below 4.
        assert max(g.abs().max() for g in gradients) < 7 * 4 * rounding(divergence, logits)


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("k", [1, 4])
def test_finite_where_the_entries_hold_all_mass(divergence, k):
    """Kept mass is 1.0 with no tail at all, while the student has mass outside.

    There DistillKit's value is NaN.
    """
    hidden, student, teacher = make_problem()
    kept = make_targets(teacher, k)
    certain = kept.logprobs - kept.logprobs.logsumexp(-1, keepdim=True)
    targets = TargetBatch(
        labels=kept.labels, ids=kept.ids, logprobs=certain, tail_logprob=torch.full((7,), -math.inf)
    )
    found = measured(hidden, student, targets, divergence)
    assert all(g.isfinite().all() for g in found[2])
    assert_same(found, reference(hidden, student, targets, divergence), backward=5e-4)


@pytest.mark.parametrize("divergence", ALL)
def test_a_full_target_may_hold_impossible_ids(divergence):
    hidden, student, teacher = make_problem()
    teacher[:, ::3] = -math.inf
    targets = make_targets(teacher, None)
    found = measured(hidden, student, targets, divergence)
    assert found[0].isfinite().all()
    assert_same(found, reference(hidden, student, targets, divergence), backward=5e-4)


@pytest.mark.parametrize("divergence", ALL)
def test_extreme_logits_stay_finite_and_right(divergence):
    """A student so sure that everything else underflows.

    One minus the sum of its kept mass would be 0 or negative.
    """
    hidden, _, teacher = make_problem(d=23)
    weight = (60 * torch.eye(23)).requires_grad_()
    extreme = Head(weight=weight)
    targets = make_targets(teacher, 3)
    found = measured(hidden, extreme, targets, divergence)
    assert all(g.isfinite().all() for g in found[2])
    assert_same(found, reference(hidden, extreme, targets, divergence), forward=1e-4, backward=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    v=st.integers(2, 12),
    seed=st.integers(0, 10**6),
    divergence=st.sampled_from(ALL),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    data=st.data(),
)
def test_never_negative_and_always_the_definition(n, v, seed, divergence, spread, data):
    k = data.draw(st.one_of(st.none(), st.integers(1, v)))
    hidden, student, teacher = make_problem(n=n, v=v, seed=seed)
    targets = make_targets(spread * teacher, k)
    found = measured(hidden, student, targets, divergence)
    logits = torch.cat(
        [reference_logits(hidden, student.weight, None, student).detach(), spread * teacher]
    )
    assert float(found[0].detach().min()) > -rounding(divergence, logits)
    assert_same(found, reference(hidden, student, targets, divergence), forward=3e-5, backward=5e-4)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 9),
    chunk=st.integers(1, 12),
    divergence=st.sampled_from([*ALL, None]),
    full=st.booleans(),
)
def test_the_chunk_size_does_not_matter(n, chunk, divergence, full):
    hidden, student, teacher = make_problem(n=n, head=CAPPED)
    targets = make_targets(teacher, None if full else 5)
    whole = measured(hidden, student, targets, divergence)
    parts = measured(hidden, student, targets, divergence, chunk_tokens=chunk)
    for a, b in zip((parts[1], *parts[2]), (whole[1], *whole[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)  # sums of up to 9 tokens, in parts
    assert (parts[0] is None) == (divergence is None)


@pytest.mark.parametrize(
    "divergence", [name for name in ALL if name not in ("alpha_beta", "adaptive_kl")]
)
def test_coarser_buckets_give_a_lower_bound(divergence):
    """Every f-divergence falls when outcomes are put together.

    alpha-beta is one where its exponents sum to 1.
    """
    hidden, student, teacher = make_problem()
    with torch.no_grad():
        by_k = [
            distilled(hidden, student, make_targets(teacher, k), objective(divergence)).soft
            for k in (1, 3, 9, 22, None)
        ]
    # At 22 and at all 23 ids kept the outcomes are the same, so what is between them is rounding.
    assert all((b - a).min() > -16 * EPS * by_k[-1].max() for a, b in pairwise(by_k))
    assert (by_k[-1] - by_k[0]).min() > 1e-3


def test_cross_entropy_alone_looks_at_no_target():
    hidden, student, teacher = make_problem()
    with_targets = distilled(hidden, student, make_targets(teacher, 5), None, soft=1.0, hard=0.5)
    labels_only = TargetBatch(labels=make_targets(teacher, 5).labels)
    without = distilled(hidden, student, labels_only, objective_of(), soft=1.0, hard=0.5)
    assert with_targets.soft is None
    assert without.soft is None
    assert torch.equal(with_targets.hard, without.hard)
    assert torch.equal(without.total, with_targets.total)
    torch.testing.assert_close(without.total.detach(), 0.5 * without.hard.sum())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_bfloat16_is_no_worse_than_naive(divergence):
    """Three ways: float32 truth, the naive loss all in bfloat16, ours on bfloat16 inputs."""
    hidden, student, teacher = make_problem(n=64, v=300, d=32)
    with torch.no_grad():
        hidden, weight = 0.4 * hidden, student.weight
        targets = make_targets(teacher, 16)
        truth = distilled(hidden, Head(weight=weight), targets, objective(divergence)).soft
        ours = distilled(
            hidden.bfloat16(), Head(weight=weight), targets, objective(divergence)
        ).soft
        log_p = (hidden.bfloat16() @ weight.bfloat16().T).log_softmax(-1)
        tail = log_p.scatter(-1, targets.ids, -math.inf).logsumexp(-1)
        p = torch.cat([log_p.gather(-1, targets.ids), tail[:, None]], -1)
        t = torch.cat([targets.logprobs, targets.tail_logprob[:, None]], -1).bfloat16()
        naive = (
            (t.exp() * (t - p) if divergence == "forward_kl" else p.exp() * (p - t)).sum(-1).float()
        )
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().mean() <= (naive - truth).abs().mean()
    assert (ours - truth).abs().max() <= (naive - truth).abs().max() + 1e-2


def test_the_weights_gradient_is_summed_in_float32():
    """Chunks in bfloat16 must not be added up in bfloat16 (256 + 1 is 256 there)."""
    weight = torch.zeros(4, 1, requires_grad=True)
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    targets = TargetBatch(labels=torch.zeros(600, dtype=torch.long))
    distilled(hidden, Head(weight=weight), targets, None, hard=1.0, chunk_tokens=1).total.backward()
    torch.testing.assert_close(weight.grad.flatten(), torch.tensor([-450.0, 150.0, 150.0, 150.0]))


class TestFitVocabulary:
    def test_entries_beyond_the_student_join_the_tail(self):
        _, _, teacher = make_problem(v=20)
        targets = make_targets(teacher, 6)
        fitted = fit_vocabulary(targets, 15)
        for n in range(7):
            kept = targets.ids[n] < 15
            assert fitted.ids[n].tolist() == torch.where(kept, targets.ids[n], -1).tolist()
            dropped = targets.logprobs[n][~kept].exp().sum() + targets.tail_logprob[n].exp()
            assert float(fitted.tail_logprob[n].exp()) == pytest.approx(float(dropped), rel=1e-5)
            assert float(
                fitted.logprobs[n].exp().sum() + fitted.tail_logprob[n].exp()
            ) == pytest.approx(1, rel=1e-5)

    @pytest.mark.parametrize("divergence", ALL)
    @pytest.mark.parametrize("k", [1, 6])
    def test_the_loss_then_equals_the_definition(self, divergence, k):
        hidden, student, _ = make_problem(v=15)
        _, _, teacher = make_problem(v=20, seed=1)
        targets = fit_vocabulary(make_targets(teacher, k), 15)
        assert (targets.ids < 0).any()
        assert_same(
            measured(hidden, student, targets, divergence),
            reference(hidden, student, targets, divergence),
        )

    def test_a_row_may_lose_all_its_entries(self):
        hidden, student, _ = make_problem(v=15)
        targets = TargetBatch(
            labels=torch.zeros(7, dtype=torch.long),
            ids=torch.full((7, 1), 17),
            logprobs=torch.full((7, 1), math.log(0.9)),
            tail_logprob=torch.full((7,), math.log(0.1)),
        )
        for divergence in ALL:  # one outcome is left, of probability 1 on both sides
            found = measured(hidden, student, fit_vocabulary(targets, 15), divergence)
            assert found[0].abs().max() < rounding(divergence, student.weight.detach())
            assert all(g.isfinite().all() for g in found[2])

    @pytest.mark.parametrize("divergence", ALL)
    def test_full_targets_are_conditioned_on_shared_ids(self, divergence):
        hidden, student, _ = make_problem(v=15)
        _, _, teacher = make_problem(v=20, seed=1)
        fitted = fit_vocabulary(make_targets(teacher, None), 15)
        expected = make_targets(teacher[:, :15], None)
        torch.testing.assert_close(fitted.logprobs, expected.logprobs)
        assert_same(
            measured(hidden, student, fitted, divergence),
            reference(hidden, student, expected, divergence),
        )

    @pytest.mark.parametrize("divergence", ALL)
    @pytest.mark.parametrize("k", [4, None])
    def test_a_larger_student_has_its_extra_ids_in_the_tail(self, divergence, k):
        hidden, student, _ = make_problem(v=26)
        _, _, teacher = make_problem(v=20, seed=1)
        targets = fit_vocabulary(make_targets(teacher, k), 26)
        assert_same(
            measured(hidden, student, targets, divergence),
            reference(hidden, student, targets, divergence),
            backward=5e-4,
        )

    def test_draws_beyond_the_student_are_left_out(self):
        drawn = TargetBatch(
            labels=torch.tensor([0]),
            ids=torch.tensor([[3, 17, 5]]),
            probabilities=torch.tensor([[0.5, 0.25, 0.25]]),
            entropy=torch.tensor([1.0]),
        )
        fitted = fit_vocabulary(drawn, 15)
        assert fitted.ids.tolist() == [[3, -1, 5]]
        assert fitted.probabilities.tolist() == [[0.5, 0.0, 0.25]]
        hidden, student, _ = make_problem(n=1, v=15)
        soft = distilled(hidden, student, fitted, objective_of()).soft
        p = softmax(reference_logits(hidden, student.weight, None, student)[0].detach())
        assert float(soft) == pytest.approx(
            -0.5 * math.log(p[3]) - 0.25 * math.log(p[5]) - 1.0, rel=1e-5
        )

    def test_equal_vocabularies_change_nothing(self):
        targets = make_targets(make_problem()[2], 6)
        fitted = fit_vocabulary(targets, 23)
        assert torch.equal(fitted.ids, targets.ids)
        assert torch.equal(fitted.logprobs, targets.logprobs)
        torch.testing.assert_close(fitted.tail_logprob, targets.tail_logprob, rtol=0, atol=0)

    def test_a_hard_target_beyond_the_student_is_refused(self):
        targets = TargetBatch(labels=torch.tensor([3, 151_940]))
        with pytest.raises(UsageError, match=r"has 151936 ids, but the text has token 151940"):
            fit_vocabulary(targets, 151_936)
