"""The divergences as functions of outcomes.

It is tested for their limits, their bounds, and zero probabilities on either side.
"""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import DIVERGENCES, alpha_beta, jsd, skew_forward_kl, skew_reverse_kl

from stillroom.stages.losses import divergences as ours
from stillroom.stages.losses.objective import Objective
from stillroom.stages.recipe.divergences import DIVERGENCES as TABLE
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric

SETTINGS = {
    "skew_forward_kl": {"skew": 0.1},
    "skew_reverse_kl": {"skew": 0.1},
    "jsd": {"jsd_weight": 0.5},
    "alpha_beta": {"alpha_beta": (0.2, 0.7)},
    "adaptive_kl": {"head_mass": 0.5},
}
ALL = list(DIVERGENCES)
EXPONENTS = [
    (0.2, 0.7),
    (1.5, -0.4),
    (0.0, 0.8),
    (0.8, 0.0),
    (1.0, 0.0),
    (0.0, 1.0),
    (1e-6, 0.8),
    (0.8, 1e-6),
    (1e-4, 1e-4),
    (2.0, 3.0),
]


def measure(name, teacher, student, **changes):
    return getattr(ours, name)(teacher, student, **SETTINGS.get(name, {}) | changes)


def distributions(n=6, outcomes=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = 2 * torch.randn(2, n, outcomes, generator=generator).to(dtype)
    return teacher.log_softmax(-1), student.log_softmax(-1)


def value_and_gradient(function, teacher, student):
    leaf = student.clone().requires_grad_()
    value = function(teacher, leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def by_rows(definition):
    """A definition of one token's divergence as a function of log-probabilities [N, K + 1]."""
    return lambda t, p: torch.stack(
        [definition(list(a), list(b)) for a, b in zip(t.exp(), p.exp(), strict=True)]
    )


def assert_is(function, definition, teacher, student, tolerance=2e-5):
    found = value_and_gradient(function, teacher, student)
    expected = value_and_gradient(by_rows(definition), teacher.double(), student.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("exponents", EXPONENTS)
def test_alpha_beta_and_its_limits(exponents):
    a, b = exponents
    assert_is(
        lambda t, p: ours.alpha_beta(t, p, alpha_beta=(a, b)),
        lambda t, p: alpha_beta(t, p, a, b),
        *distributions(),
    )


@pytest.mark.parametrize("exponents", [(1e-30, 0.0), (0.0, 1e-30), (1e-30, 1e-30)])
def test_as_both_exponents_vanish_alpha_beta_is_half_the_squared_log_ratio(exponents):
    """The limit at a + b = 0 that is approached from where exponents are allowed."""
    assert_is(
        lambda t, p: ours.alpha_beta(t, p, alpha_beta=exponents),
        lambda t, p: alpha_beta(t, p, 0, 0),
        *distributions(),
    )


@pytest.mark.parametrize("exponents", [(100.0, 100.0), (100.0, 0.0), (0.0, 100.0), (1e-30, 100.0)])
@pytest.mark.parametrize("far", [50.0, 1000.0])
def test_alpha_beta_is_finite_at_every_exponent_that_is_allowed(exponents, far):
    """The student finds unlikely what the teacher is sure of.

    Its probability is far below the least normal float32.
    """
    teacher = torch.tensor([[0.0, -torch.inf, -far], [-far, 0.0, -torch.inf]])
    student = torch.tensor([[-far, 0.0, -torch.inf], [0.0, -far, -far]])
    found = value_and_gradient(
        lambda t, p: ours.alpha_beta(t, p, alpha_beta=exponents), teacher, student
    )
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize(
    ("divergence", "parameters"),
    [
        ("alpha_beta", {"alpha_beta": (1.0, -1.0)}),
        ("alpha_beta", {"alpha_beta": (0.0, 0.0)}),
        ("alpha_beta", {"alpha_beta": (101.0, 0.0)}),
        ("jsd", {"jsd_weight": 0.0}),
        ("jsd", {"jsd_weight": 1.0}),
        ("skew_forward_kl", {"skew": 1.0}),
        ("skew_reverse_kl", {"skew": math.nan}),
        ("adaptive_kl", {"head_mass": 1.0}),
    ],
)
def test_parameters_without_a_finite_loss_that_teaches_are_refused_outside_of_recipes_too(
    divergence, parameters
):
    (name,) = parameters
    with pytest.raises(UsageError, match=f"^Objective: {name}: .*got"):
        Objective(divergence=divergence, parameters=parameters)


def test_alpha_beta_holds_both_kls():
    teacher, student = distributions()
    for exponents, name in (((1.0, 0.0), "forward_kl"), ((0.0, 1.0), "reverse_kl")):
        found = ours.alpha_beta(teacher, student, alpha_beta=exponents)
        torch.testing.assert_close(found, measure(name, teacher, student))


@pytest.mark.parametrize("skew", [0.0, 0.3, 0.9])
def test_skews(skew):
    teacher, student = distributions()
    for name, definition in (
        ("skew_forward_kl", skew_forward_kl),
        ("skew_reverse_kl", skew_reverse_kl),
    ):
        assert_is(
            lambda t, p, name=name: measure(name, t, p, skew=skew),
            lambda t, p, definition=definition: definition(t, p, skew),
            teacher,
            student,
        )
        if skew == 0:
            plain = measure(name.removeprefix("skew_"), teacher, student)
            assert torch.equal(measure(name, teacher, student, skew=0.0), plain)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_jsd_at_other_weights(weight):
    teacher, student = distributions()
    assert_is(
        lambda t, p: ours.jsd(t, p, jsd_weight=weight),
        lambda t, p: jsd(t, p, weight),
        teacher,
        student,
    )
    mirrored = ours.jsd(student, teacher, jsd_weight=1 - weight)
    torch.testing.assert_close(ours.jsd(teacher, student, jsd_weight=weight), mirrored)
    assert (ours.jsd(teacher, student, jsd_weight=0.5) <= math.log(2)).all()


def test_total_variation_is_half_of_l1_and_complements_acceptance():
    teacher, student = distributions()
    t, p = teacher.double().exp(), student.double().exp()
    found = ours.total_variation(teacher, student).double()
    torch.testing.assert_close(found, (t - p).abs().sum(-1) / 2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(1 - found, torch.minimum(t, p).sum(-1), rtol=1e-6, atol=1e-6)


class TestAdaptive:
    def test_the_head_is_found_in_any_order(self):
        """Where peers apply the order of the sorted teacher to entries that are not sorted."""
        teacher, student = distributions(outcomes=9)
        mixed = torch.cat([torch.randperm(8), torch.tensor([8])])
        a = value_and_gradient(lambda t, p: measure("adaptive_kl", t, p), teacher, student)
        b = value_and_gradient(
            lambda t, p: measure("adaptive_kl", t, p), teacher[:, mixed], student[:, mixed]
        )
        torch.testing.assert_close(a[0], b[0])
        torch.testing.assert_close(a[1][:, mixed], b[1])

    @pytest.mark.parametrize(
        ("mass", "head"),
        [(0.29, [0]), (0.31, [0]), (0.56, [0, 1]), (0.81, [0, 1, 2]), (0.99, [0, 1, 2])],
    )
    def test_the_shares_by_hand(self, mass, head):
        t, p = torch.tensor([0.3, 0.25, 0.25, 0.2]), torch.tensor([0.1, 0.2, 0.3, 0.4])
        gaps = (t - p).abs()
        share = gaps[head].sum() / gaps.sum()
        t, p = t.log()[None], p.log()[None]
        expected = share * ours.forward_kl(t, p) + (1 - share) * ours.reverse_kl(t, p)
        torch.testing.assert_close(ours.adaptive_kl(t, p, head_mass=mass), expected)

    def test_no_gradient_goes_through_the_shares(self):
        teacher, student = distributions()
        _, found = value_and_gradient(lambda t, p: measure("adaptive_kl", t, p), teacher, student)
        forward, reverse = (
            value_and_gradient(lambda t, p, name=name: measure(name, t, p), teacher, student)
            for name in ("forward_kl", "reverse_kl")
        )
        share = (measure("adaptive_kl", teacher, student) - reverse[0]) / (forward[0] - reverse[0])
        expected = share[:, None] * forward[1] + (1 - share[:, None]) * reverse[1]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def sparse(seed):
    """Distributions with zeros on either side and on both, the best of each kept."""
    teacher, student = distributions(n=8, outcomes=7, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for side in (teacher, student):
        zero = torch.rand(side.shape, generator=generator) < 0.4
        side[zero.scatter(-1, side.argmax(-1, keepdim=True), False)] = -math.inf
    return teacher.log_softmax(-1), student.log_softmax(-1)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_zeros_on_either_side_are_finite_and_the_definition(name, seed):
    teacher, student = sparse(seed)
    value, gradient = value_and_gradient(lambda t, p: measure(name, t, p), teacher, student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    expected = by_rows(DIVERGENCES[name])(teacher.double(), student.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert (gradient[student == -math.inf] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(ALL),
    seed=st.integers(0, 10**6),
    outcomes=st.integers(2, 8),
    zeros=st.booleans(),
)
def test_never_negative_and_zero_at_equality(name, seed, outcomes, zeros):
    teacher, student = sparse(seed) if zeros else distributions(outcomes=outcomes, seed=seed)
    # Terms of up to 1 from log-probabilities that are known to eps * 20; alpha_beta divides its
    # sums by a * b.
    rounding = 20 * torch.finfo(torch.float32).eps / (0.2 * 0.7 if name == "alpha_beta" else 1)
    assert measure(name, teacher, student).min() > -rounding
    for same in (teacher, student):
        assert measure(name, same, same).abs().max() < rounding


def test_the_alpha_beta_of_exponents_that_sum_to_one_falls_when_outcomes_join():
    teacher, student = distributions(outcomes=6)
    joined = [
        torch.cat([x[:, :3], x[:, 3:].logsumexp(-1, keepdim=True)], -1) for x in (teacher, student)
    ]
    for alpha in (0.3, 0.5, 1.4):
        coarse, fine = (
            ours.alpha_beta(*pair, alpha_beta=(alpha, 1 - alpha))
            for pair in (joined, (teacher, student))
        )
        assert (
            fine - coarse
        ).min() > -1e-5  # 20 eps, divided by exponents whose product is 0.21 at the least


@pytest.mark.parametrize("name", TABLE)
def test_the_table_says_what_the_function_does(name):
    """The equation stands beside the code that needs it and in the table; the source likewise."""
    row, said = TABLE[name], " ".join(getattr(ours, name).__doc__.split())
    assert row.equation in said
    assert row.source.rpartition("arXiv ")[2] in Path(ours.__file__).read_text("utf-8")
