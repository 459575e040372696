"""Losses between samples against their definitions, in value and gradient.

Invariances, groups and extremes are tested too.
"""

import math
from functools import partial

import feature_references as definition
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.stages.losses.features.between_samples import (
    infonce,
    over_groups,
    rkd_angle,
    rkd_distance,
    similarity,
)
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric

T = 0.5
MEASURES = {
    "distance": (rkd_distance, definition.rkd_distance),
    "angle": (rkd_angle, definition.rkd_angle),
    "similarity": (similarity, definition.similarity),
    "infonce": (partial(infonce, temperature=T), partial(definition.infonce, temperature=T)),
}
WIDTHS = {"infonce": 4}  # of the student; the teacher has 4
COUNTS = {
    "distance": lambda g: g * (g - 1),
    "angle": lambda g: g * (g - 1) * (g - 2),
    "similarity": lambda g: g * g if g > 1 else 0,
    "infonce": lambda g: g if g > 1 else 0,
}
every = pytest.mark.parametrize("name", MEASURES)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_sides(name, size, seed=0):
    return normal(size, 4, seed=seed), normal(size, WIDTHS.get(name, 3), seed=seed + 1000)


def value_and_gradient(measure, teacher, student):
    leaf = student.clone().requires_grad_()
    found = measure(teacher, leaf)
    total = found if isinstance(found, torch.Tensor) else found.total
    (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return total.detach(), torch.zeros_like(leaf) if gradient is None else gradient


def assert_is_defined(name, teacher, student, tolerance=1e-4):
    ours, defined = MEASURES[name]
    found = value_and_gradient(ours, teacher, student)
    expected = value_and_gradient(
        lambda t, s: defined(t, s) + 0 * s.sum(), teacher.double(), student.double()
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_each_is_its_definition_in_groups_of_any_size(name, size):
    teacher, student = both_sides(name, size)
    assert_is_defined(name, teacher, student)
    found = MEASURES[name][0](teacher, student)
    assert found.total.dtype == torch.float32
    assert found.count == COUNTS[name](size)
    assert found.count or found.total == 0


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(list(MEASURES)), size=st.integers(1, 5), seed=st.integers(0, 999))
def test_each_is_its_definition_whatever_the_vectors(name, size, seed):
    """Differences near 1, where huber bends, among them."""
    assert_is_defined(name, *both_sides(name, size, seed))


@every
def test_equal_vectors_and_zeros_are_as_defined_and_have_finite_gradients(name):
    """On the student's side, the teacher's, both, and throughout."""
    teacher, student = both_sides(name, 5)
    student[1], student[4] = student[0], 0.0
    assert_is_defined(name, teacher, student)
    teacher[2], teacher[4] = teacher[3], 0.0
    assert_is_defined(name, teacher, student)
    for t, s in (
        (torch.ones_like(teacher), student),
        (teacher, torch.ones_like(student)),
        (torch.zeros_like(teacher), torch.zeros_like(student)),
    ):
        assert_is_defined(name, t, s)


@every
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 65504.0, 1e30])
def test_extreme_vectors_have_finite_values_and_gradients(name, scale):
    """And of the same size, as each is the same at any scale."""
    teacher, student = both_sides(name, 5)
    measure = MEASURES[name][0]
    plain = value_and_gradient(measure, teacher, student)
    found = value_and_gradient(measure, teacher * scale, student * scale)
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1] * scale, plain[1], rtol=1e-3, atol=1e-4)


@every
def test_float16_of_its_largest_numbers_is_finite(name):
    teacher, student = (side.sign() * 65504 for side in both_sides(name, 5))
    total, gradient = value_and_gradient(MEASURES[name][0], teacher.half(), student.half())
    assert total.isfinite()
    assert gradient.isfinite().all()


@every
def test_vectors_that_hardly_differ_have_no_exploding_gradient(name):
    """Vectors are as far apart as rounding takes them.

    Their directions would be noise, with gradients of 10^7.
    """
    teacher, student = both_sides(name, 5)
    student = 1 + 1e-7 * student
    _, gradient = value_and_gradient(MEASURES[name][0], teacher, student)
    assert gradient.abs().max() < 100


@every
def test_a_student_that_is_turned_is_as_far_off_and_a_scaled_one_too(name):
    """InfoNCE compares with the teacher's own directions: there both sides are turned."""
    measure = MEASURES[name][0]
    teacher, student = both_sides(name, 6)
    width = student.shape[1]
    turn = torch.linalg.qr(normal(width, width, seed=7)).Q
    turned = (teacher @ turn if name == "infonce" else teacher, student @ turn)
    plain = measure(teacher, student).total
    torch.testing.assert_close(measure(*turned).total, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measure(teacher, 3 * student).total, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["distance", "angle", "similarity"])
def test_where_the_origin_is_matters_to_similarity_alone(name):
    measure = MEASURES[name][0]
    teacher, student = both_sides(name, 6)
    moved = measure(teacher, student + torch.tensor([2.0, -1.0, 0.5])).total
    same = torch.allclose(moved, measure(teacher, student).total, rtol=1e-4)
    assert same == (name != "similarity")


@every
def test_the_order_of_the_samples_does_not_matter(name):
    measure = MEASURES[name][0]
    teacher, student = both_sides(name, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        measure(teacher[order], student[order]).total, measure(teacher, student).total
    )
    assert not torch.allclose(
        measure(teacher, student[order]).total, measure(teacher, student).total
    )


@pytest.mark.parametrize("name", ["distance", "angle", "similarity"])
def test_at_equality_value_and_gradient_are_zero(name):
    teacher, _ = both_sides(name, 6)
    turned = 2 * teacher @ torch.linalg.qr(normal(4, 4, seed=7)).Q
    for student in (teacher, turned):
        total, gradient = value_and_gradient(MEASURES[name][0], teacher, student)
        assert 0 <= total < 1e-8
        assert gradient.abs().max() < 1e-4


def test_infonce_of_vectors_as_far_apart_as_can_be_is_its_known_minimum():
    """Five corners of a regular simplex, whose cosines are all -1/4."""
    corners = torch.eye(5) - 1 / 5
    total, gradient = value_and_gradient(MEASURES["infonce"][0], corners, corners)
    torch.testing.assert_close(total, torch.tensor(5 * math.log(1 + 4 * math.exp(-1.25 / T))))
    assert gradient.abs().max() < 1e-5


def test_infonce_stays_within_its_bounds():
    teacher = normal(6, 4)
    for student in (teacher, -teacher, torch.ones(6, 4), normal(6, 4, seed=3)):
        mean = infonce(teacher, student, temperature=T).total / 6
        assert math.log(1 + 5 * math.exp(-2 / T)) < mean < math.log(6) + 2 / T


def test_a_low_temperature_is_finite():
    teacher, student = both_sides("infonce", 5)
    for temperature in (1e-3, 1e-6):
        found = value_and_gradient(partial(infonce, temperature=temperature), teacher, student)
        assert all(part.isfinite().all() for part in found)


@every
@pytest.mark.parametrize("per_pass", [1, 2, 4])
def test_groups_in_passes_of_any_size_make_the_same_sums(name, per_pass):
    """Eleven samples in groups of three, the last of two.

    Each is alone, two are in a pass, or all at once.
    """
    measure = MEASURES[name][0]
    teacher, student = both_sides(name, 11)
    leaf = student.requires_grad_()
    groups = zip(teacher.split(3), leaf.split(3), strict=True)
    each = [measure(*group) for group in groups]
    passes = zip(teacher.split(3 * per_pass), leaf.split(3 * per_pass), strict=True)
    found = [over_groups(measure, *one, group=3) for one in passes]
    assert len(found) == math.ceil(4 / per_pass)
    assert sum(one.count for one in found) == sum(one.count for one in each)
    sums = [sum(one.total for one in some) for some in (found, each)]
    torch.testing.assert_close(*sums)
    torch.testing.assert_close(
        *(torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in sums)
    )
    assert not torch.allclose(measure(teacher, leaf).total, sums[0])


@every
def test_autocast_changes_nothing_and_the_teacher_gets_no_gradient(name):
    teacher, student = (side.requires_grad_() for side in both_sides(name, 5))
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total = MEASURES[name][0](teacher, student).total
        found.append((total, *torch.autograd.grad(total, student, retain_graph=True)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    total.backward()
    assert teacher.grad is None


def test_infonce_refuses_other_widths_and_temperatures():
    teacher, student = both_sides("distance", 5)
    with pytest.raises(UsageError, match=r"teacher's vectors are \[5, 4\], the student's \[5, 3\]"):
        infonce(teacher, student, temperature=T)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="Expected a number above 0"):
            infonce(teacher, teacher, temperature=temperature)
