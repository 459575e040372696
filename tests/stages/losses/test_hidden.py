"""`match: hidden` against its definition in float64.

It is tested for value, gradient, zero at equality, and which layers are paired.
"""

from typing import Any

import numpy as np
import pytest
import torch

from stillroom.stages.losses.features.hidden import hidden_distance
from stillroom.stages.losses.features.matching import Matching, pairs_of, parts_of
from stillroom.stages.losses.features.part import StepSize
from stillroom.stages.recipe.features import MATCHES, FeatureLoss, FeatureRequest
from stillroom.stages.targets.features.batch import FeatureTargets
from stillroom.stages.targets.features.shown import Shown
from stillroom.storage.tables.features import Layout

DISTANCES = tuple(MATCHES["hidden"].distances)


def defined(t: np.ndarray, s: np.ndarray, distance: str) -> tuple[float, np.ndarray]:
    """The value of one position, and the derivative by s, written out."""
    d, difference = len(t), s - t
    if distance == "mse":
        return (difference**2).sum() / d, 2 * difference / d
    if distance == "smooth_l1":
        small = np.abs(difference) < 1
        value = np.where(small, difference**2 / 2, np.abs(difference) - 0.5).sum() / d
        return value, np.where(small, difference, np.sign(difference)) / d
    a, b = np.linalg.norm(s), np.linalg.norm(t)
    cosine = s @ t / (a * b)
    return 1 - cosine, -(t / (a * b) - cosine * s / a**2)


@pytest.mark.numeric
@pytest.mark.parametrize("distance", DISTANCES)
def test_value_and_gradient_are_those_of_the_definition(distance: str) -> None:
    rng = np.random.default_rng(0)
    t, s = rng.normal(size=(2, 9, 12)) * 1.5
    mine = torch.from_numpy(s).float().requires_grad_()
    theirs = torch.from_numpy(t).float().requires_grad_()
    found = hidden_distance(theirs, mine, distance=distance)
    found.sum().backward()
    values, gradients = zip(
        *(defined(*both, distance) for both in zip(t, s, strict=True)), strict=True
    )
    np.testing.assert_allclose(found.detach().numpy(), values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine.grad.numpy(), np.stack(gradients), rtol=1e-4, atol=1e-6)
    assert theirs.grad is None, "the teacher is a constant"


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_states_are_at_no_distance(distance: str) -> None:
    states = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 8)))
    found = hidden_distance(states, states.clone(), distance=distance)
    assert float(found.abs().max()) <= 1e-6


LOSSES = [
    FeatureLoss(match="hidden", layers={3: 1}),
    FeatureLoss(match="hidden", layers={1: 0}, distance="cosine"),
]
STORED = [FeatureRequest(what="hidden", layers=[1, 3])]


def matching(**sizes: int) -> Matching:
    known: dict[str, Any] = {
        "layouts": {("hidden", n): Layout(width=sizes["teacher"]) for n in (1, 3)},
        "student_width": sizes["student"],
        "seed": sizes["seed"],
    }
    pairs = pairs_of(LOSSES, STORED, student_blocks=2)
    return Matching([part for pair in pairs for part in parts_of(pair, **known)])


@pytest.mark.numeric
def test_a_pair_is_summed_over_the_positions_that_are_compared_after_its_map() -> None:
    """Two samples of three and four tokens stand in rows of five positions."""
    made = matching(teacher=6, student=4, seed=0)
    rng = np.random.default_rng(2)
    states = {n: torch.from_numpy(rng.normal(size=(2, 5, 4))).float() for n in (0, 1)}
    found = [
        {("hidden", n): rng.normal(size=(tokens, 6)).astype(np.float32) for n in (1, 3)}
        for tokens in (3, 4)
    ]
    where = [np.array([0, 2]), np.array([1, 3])]
    targets = FeatureTargets.of(found, lengths=[3, 4], starts=[0, 5], compared=where)
    sums = made(Shown(states, {}, {}), targets)
    for part, loss, total in zip(made.parts, LOSSES, sums.detach(), strict=True):
        ((teacher, student),) = loss.layers.items()  # type: ignore[union-attr]
        w = part.map.detach().double().numpy()
        mine = states[student].double().numpy().reshape(10, 4)[[0, 2, 6, 8]] @ w.T
        theirs = [one["hidden", teacher][p] for one, p in zip(found, where, strict=True)]
        both = zip(np.concatenate(theirs).astype(np.float64), mine, strict=True)
        assert float(total) == pytest.approx(
            sum(defined(t, s, loss.distance)[0] for t, s in both), rel=1e-5
        )
    sums.sum().backward()
    assert all(w.grad is not None for w in made.parameters())
    assert made.names == ["hidden_3_to_1_mse", "hidden_1_to_0_cosine"]
    assert made.needs == [("hidden", 1), ("hidden", 0)]
    assert made.counts(StepSize(compared=4, tokens=7, samples=2)) == [4, 4]


def test_maps_come_from_the_seed_and_move_no_other_draw() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (matching(teacher=6, student=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    weights = [[w.detach() for w in made.parameters()] for made in (one, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
    assert not torch.equal(*weights[0]), "pairs begin with maps of their own"
    assert all(w.abs().max() <= 0.5 for w in weights[0])


def test_where_the_widths_are_equal_there_is_no_map() -> None:
    assert not list(matching(teacher=4, student=4, seed=0).parameters())


def test_which_layers_are_paired() -> None:
    stored = [FeatureRequest(what="hidden", layers=[5, 1, 3])]

    def pairs(layers: object, blocks: int) -> list[tuple[int, int]]:
        loss = FeatureLoss(match="hidden", layers=layers)  # type: ignore[arg-type]
        return [(p.teacher, p.student) for p in pairs_of([loss], stored, student_blocks=blocks)]

    assert pairs("last", 2) == [(5, 1)]
    assert pairs("uniform", 3) == [(1, 0), (3, 1), (5, 2)]
    assert pairs("uniform", 4) == [(1, 0), (3, 1), (5, 3)]
    assert pairs("uniform", 6) == [(1, 1), (3, 3), (5, 5)]
    assert pairs({5: 0, 1: 1}, 2) == [(1, 1), (5, 0)]
