"""Tail policies, temperatures and sampled targets, against their definitions.

It also shows what they teach in the end.
"""

import math
from itertools import product

import pytest
import torch
from objectives import objective_of
from references import DIVERGENCES, kl, softmax, token_losses

from stillroom.stages.losses.definition import logits_distillation
from stillroom.stages.losses.fused_linear import linear_distillation
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.head import Head
from stillroom.stages.targets.batch import TargetBatch
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric

N, V, D = 5, 9, 4
TAILS = ("bucket", "drop", "renormalize", "to_label")
# reverse KL, and adaptive KL which holds it, are infinite where a teacher gives nothing to what is
# outside its entries.
PERMITTED = [
    (divergence, tail)
    for divergence, tail in product(DIVERGENCES, TAILS)
    if tail in ("bucket", "renormalize") or divergence not in ("reverse_kl", "adaptive_kl")
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets_of(teacher_logits, k, temperature=1.0):
    """The K best and an exact tail; k = None: full. The labels are in and out of the entries."""
    logprobs = (teacher_logits.double() / temperature).log_softmax(-1)
    labels = torch.arange(len(logprobs)) * 2 % logprobs.shape[-1]
    if k is None:
        tail = torch.full((len(logprobs),), -math.inf)
        return TargetBatch(labels=labels, logprobs=logprobs.float(), tail_logprob=tail)
    kept, ids = logprobs.topk(k, -1)
    tail = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1)
    return TargetBatch(labels=labels, ids=ids, logprobs=kept.float(), tail_logprob=tail.float())


def problem():
    hidden, weight = normal(N, D).requires_grad_(), normal(V, D, seed=1).requires_grad_()
    return hidden, weight, 2 * normal(N, V, seed=2)


def distilled(hidden, weight, targets, objective, **more):
    aim = Aim(objective=objective, soft_weight=0.7, hard_weight=0.3)
    return linear_distillation(hidden, Head(weight=weight), targets, aim=aim, **more)


def definition(hidden, weight, teacher, targets, objective):
    """(soft [N], hard [N], gradients), float64, token by token, over both whole vocabularies."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    scale, settings = (
        objective.temperature,
        {"divergence": objective.divergence, "tail": objective.tail},
    )
    losses = []
    for n, row in enumerate(leaves[0] @ leaves[1].T):
        ids = list(range(V)) if targets.ids is None else targets.ids[n].tolist()
        t, label = softmax(teacher[n].double() / scale), int(targets.labels[n])
        losses.append(token_losses(row, t, ids, label, temperature=scale, **settings))
    soft, hard = map(torch.stack, zip(*losses, strict=True))
    return (
        soft.detach(),
        hard.detach(),
        torch.autograd.grad((0.7 * soft + 0.3 * hard).sum(), leaves),
    )


@pytest.mark.parametrize(("divergence", "tail"), PERMITTED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_equal_the_definition(divergence, tail, temperature):
    hidden, weight, teacher = problem()
    objective = objective_of(divergence=divergence, tail=tail, temperature=temperature)
    for k in (1, 3, V, None):
        targets = targets_of(teacher, k, temperature)
        parts = distilled(hidden, weight, targets, objective, chunk_tokens=2)
        gradients = torch.autograd.grad(parts.total, [hidden, weight])
        soft, hard, expected = definition(hidden, weight, teacher, targets, objective)
        torch.testing.assert_close(parts.soft.double(), soft, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(parts.hard.double(), hard, rtol=1e-5, atol=1e-5)
        for found, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("divergence", "tail"), PERMITTED)
def test_finite_where_nothing_is_outside(divergence, tail):
    """Kept mass is 1.0 exactly, by a tail of -inf and by one that float32 rounds away.

    K is 1 and V; some entries are absent.
    """
    logits = normal(3, V).requires_grad_()
    for k, tail_logprob in product((1, V), (-math.inf, -200.0)):
        ids = torch.arange(k).expand(3, k).clone()
        logprobs = torch.full((3, k), -math.log(k))
        if k > 1:  # the last of V is no entry, and its mass the others'
            ids[:, -1], logprobs = -1, torch.full((3, k), -math.log(k - 1))
            logprobs[:, -1] = -math.inf
        targets = TargetBatch(
            labels=torch.tensor([0, 4, 8]),
            ids=ids,
            logprobs=logprobs,
            tail_logprob=torch.full((3,), tail_logprob),
        )
        objective = objective_of(divergence=divergence, tail=tail, temperature=2.0)
        parts = logits_distillation(logits, targets, objective=objective)
        (gradient,) = torch.autograd.grad(parts.soft.sum(), logits)
        assert parts.soft.isfinite().all()
        assert gradient.isfinite().all()
        lost = gradient.sum(-1).abs() / (1 + gradient.abs().sum(-1))
        assert lost.max() < 1e-5  # a softmax: what one logit gains the others lose


@pytest.mark.parametrize(("divergence", "tail"), PERMITTED)
def test_only_moving_the_tail_keeps_the_loss_from_zero_at_equality(divergence, tail):
    """A student that is the teacher has nothing to learn of bucket or ratios.

    The other policies push it off.
    """
    logits = normal(N, V)
    for k, temperature in product((2, 5), (1.0, 2.0)):
        targets = targets_of(logits, k, temperature)
        objective = objective_of(divergence=divergence, tail=tail, temperature=temperature)
        soft = logits_distillation(logits, targets, objective=objective).soft
        if tail in ("bucket", "renormalize"):
            assert (
                soft.abs().max() < 3e-5
            )  # rounding of float32, times T^2, divided by the exponents of alpha_beta
        else:
            assert soft.min() > 1e-3


@pytest.mark.parametrize(("divergence", "tail"), PERMITTED)
def test_full_targets_have_no_tail_to_treat(divergence, tail):
    hidden, weight, teacher = problem()
    found = [
        distilled(
            hidden, weight, targets_of(teacher, None), objective_of(divergence=divergence, tail=t)
        ).soft
        for t in ("bucket", tail)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_counts_squared(divergence):
    """It counts once in the value, as its own power, and once in the gradient.

    So the gradient does not vanish at high temperatures.
    """
    logits, teacher = normal(N, V).requires_grad_(), normal(N, V, seed=3)
    targets = targets_of(teacher, 4, 3.0)
    warm = logits_distillation(
        logits, targets, objective=objective_of(divergence=divergence, temperature=3.0)
    ).soft
    cool = logits_distillation(
        logits / 3.0, targets, objective=objective_of(divergence=divergence)
    ).soft
    torch.testing.assert_close(warm, 9 * cool)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (warm, cool)]
    torch.testing.assert_close(gradients[0], 9 * gradients[1])


def test_the_token_that_is_there_is_learnt_at_temperature_one():
    logits = normal(N, V)
    targets = targets_of(normal(N, V, seed=3), 4, 3.0)
    parts = logits_distillation(logits, targets, objective=objective_of(temperature=3.0))
    assert torch.equal(parts.hard, logits_distillation(logits, targets, objective=None).hard)


def test_logits_and_hidden_states_are_one_loss():
    hidden, weight, teacher = problem()
    for objective in (None, objective_of(divergence="jsd", temperature=2.0)):
        one = distilled(hidden, weight, targets_of(teacher, 3), objective)
        two = logits_distillation(hidden @ weight.T, targets_of(teacher, 3), objective=objective)
        torch.testing.assert_close(one.hard, two.hard)
        assert (one.soft is None) == (objective is None)
        if one.soft is not None:
            torch.testing.assert_close(one.soft, two.soft)
        torch.testing.assert_close(one.total, two.weighted(0.7, 0.3).sum())


class TestSampled:
    def drawn(self, ids, counts, t, temperature=1.0):
        """A batch of one draw per row, of the teacher `t` [V] at this temperature."""
        counts = torch.tensor(counts, dtype=torch.float32)
        entropy = -float((t * t.log()).sum())
        return TargetBatch(
            labels=torch.zeros(len(ids), dtype=torch.long),
            ids=torch.tensor(ids),
            probabilities=counts / counts.sum(-1, keepdim=True),
            entropy=torch.full((len(ids),), entropy),
        )

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_the_mean_over_all_draws_is_forward_kl_over_the_vocabulary(self, temperature):
        """Two draws from four ids, all sixteen pairs by their probabilities: value and gradient."""
        t = softmax(normal(4, seed=4) / temperature)
        logits = normal(4, seed=5).requires_grad_()
        pairs = list(product(range(4), repeat=2))
        chance = torch.tensor([float(t[a] * t[b]) for a, b in pairs])
        ids = [[a, b] if a != b else [a, -1] for a, b in pairs]
        counts = [[1, 1] if a != b else [2, 0] for a, b in pairs]
        objective = objective_of(temperature=temperature)
        targets = self.drawn(ids, counts, t)
        parts = logits_distillation(logits.expand(16, 4), targets, objective=objective)
        mean = (chance * parts.soft).sum()
        (gradient,) = torch.autograd.grad(mean, logits)
        leaf = logits.detach().double().requires_grad_()
        expected = temperature**2 * kl(list(t), list(softmax(leaf / temperature)))
        (right,) = torch.autograd.grad(expected, leaf)
        assert float(mean.detach()) == pytest.approx(
            float(expected.detach()), abs=1e-5
        )  # T^2 * 16 eps
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-6)
        assert parts.soft.min() < 0 < parts.soft.max()

    def test_zero_in_the_mean_at_equality(self):
        t = softmax(normal(4, seed=4))
        targets = self.drawn([[0], [1], [2], [3]], [[1]] * 4, t)
        logits = t.log().float().expand(4, 4)
        soft = logits_distillation(logits, targets, objective=objective_of()).soft
        assert float((t * soft).sum()) == pytest.approx(0, abs=1e-6)

    def test_weights_count_as_they_are(self):
        """Draws from a proposal: an estimate that does not sum to 1 is not rescaled."""
        targets = TargetBatch(
            labels=torch.tensor([0]),
            ids=torch.tensor([[2, 0, -1]]),
            probabilities=torch.tensor([[0.5, 0.2, 0.0]]),
            entropy=torch.tensor([0.9]),
        )
        logits = normal(1, V).requires_grad_()
        soft = logits_distillation(logits, targets, objective=objective_of()).soft
        p = softmax(logits[0].detach())
        assert float(soft.detach()) == pytest.approx(
            -0.5 * math.log(p[2]) - 0.2 * math.log(p[0]) - 0.9, rel=1e-6
        )
        (gradient,) = torch.autograd.grad(soft.sum(), logits)
        estimate = torch.zeros(V).index_add(0, torch.tensor([2, 0]), torch.tensor([0.5, 0.2]))
        torch.testing.assert_close(gradient[0], 0.7 * p.float() - estimate)

    def test_other_divergences_are_refused(self):
        targets = self.drawn([[0]], [[1]], softmax(normal(4)))
        with pytest.raises(UsageError, match=r"loss\.divergence: jsd needs.*Use forward_kl"):
            logits_distillation(normal(1, 4), targets, objective=objective_of(divergence="jsd"))


class TestZipf:
    """One position, 100,000 ids with t_i ~ 1/i, the 20 best kept: what each policy teaches.

    Ids count from 0 here.
    """

    V, K = 100_000, 20

    @pytest.fixture
    def teacher(self):
        weights = 1 / torch.arange(1, self.V + 1, dtype=torch.float64)
        return weights / weights.sum()

    def taught(self, teacher, tail, labels):
        """[N, V] what the student's probabilities are where the gradient of forward KL is zero.

        The gradient with respect to logit j is p_j - target_j at any student for all policies here,
        so the target is p - gradient; that the gradient is zero there is asked of the loss itself.
        """
        targets = TargetBatch(
            labels=torch.tensor(labels),
            ids=torch.arange(self.K).expand(len(labels), -1),
            logprobs=teacher[: self.K].log().float().expand(len(labels), -1),
            tail_logprob=teacher[self.K :].sum().log().float().expand(len(labels)),
        )
        objective = objective_of(tail=tail)
        logits = torch.zeros(len(labels), self.V).requires_grad_()
        (gradient,) = torch.autograd.grad(
            logits_distillation(logits, targets, objective=objective).soft.sum(), logits
        )
        target = (1 / self.V - gradient).clamp_min(1e-30)
        logits = target.log().requires_grad_()
        (gradient,) = torch.autograd.grad(
            logits_distillation(logits, targets, objective=objective).soft.sum(), logits
        )
        assert gradient.abs().max() < 1e-6
        return target.double()

    def test_drop_inflates_the_entries_and_empties_the_rest(self, teacher):
        (target,) = self.taught(teacher, "drop", [0])
        kept = float(teacher[: self.K].sum())
        assert kept == pytest.approx(0.2976, abs=5e-5)
        assert float(target[1]) == pytest.approx(0.1390, abs=5e-5)
        torch.testing.assert_close(target[: self.K], teacher[: self.K] / kept, rtol=1e-4, atol=1e-6)
        assert float(target[self.K :].max()) < 1e-6

    def test_to_label_moves_the_tail_to_the_head_in_the_mean(self, teacher):
        """Over labels drawn from the teacher entries get t (2 - a), the others t (1 - a).

        a is the kept mass.
        """
        kept = float(teacher[: self.K].sum())
        targets = self.taught(teacher, "to_label", [*range(self.K), 777])
        chance = torch.cat([teacher[: self.K], torch.tensor([1 - kept], dtype=torch.float64)])
        mean = (chance[:, None] * targets).sum(0)
        assert float(mean[0]) == pytest.approx(0.1408, abs=5e-5)
        torch.testing.assert_close(
            mean[: self.K], teacher[: self.K] * (2 - kept), rtol=1e-4, atol=1e-6
        )
        # The label 777 stands for all ids outside, so it gets what all of them get.
        assert float(mean[777]) == pytest.approx((1 - kept) ** 2, rel=1e-4)

    def test_the_bucket_leaves_the_head_as_it_is(self, teacher):
        (target,) = self.taught(teacher, "bucket", [0])
        torch.testing.assert_close(target[: self.K], teacher[: self.K], rtol=1e-4, atol=1e-6)
        assert float(target[self.K :].sum()) == pytest.approx(
            float(teacher[self.K :].sum()), rel=1e-4
        )

    def test_renormalize_says_nothing_about_the_mass_of_the_entries(self, teacher):
        """Students with the right ratios and any mass on the entries have a loss of zero."""
        targets = TargetBatch(
            labels=torch.tensor([0]),
            ids=torch.arange(self.K)[None],
            logprobs=teacher[None, : self.K].log().float(),
            tail_logprob=teacher[self.K :].sum().log().float()[None],
        )
        for mass in (0.03, 0.9):
            p = torch.cat(
                [
                    teacher[: self.K] / teacher[: self.K].sum() * mass,
                    teacher[self.K :] * 0 + (1 - mass) / 99_980,
                ]
            )
            soft = logits_distillation(
                p.log().float()[None], targets, objective=objective_of(tail="renormalize")
            ).soft
            assert float(soft) == pytest.approx(0, abs=1e-6)
