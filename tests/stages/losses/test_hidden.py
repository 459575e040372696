"""`match: hidden` against its definition in float64: value, gradient, zero at equality, and which layers are paired."""

import numpy as np
import pytest
import torch

from stillroom.stages.losses.features.hidden import hidden_distance
from stillroom.stages.losses.features.matching import Matching, Pair, pairs_of
from stillroom.stages.recipe.features import MATCHES, FeatureLoss, FeatureRequest
from stillroom.stages.targets.features.batch import FeatureTargets

DISTANCES = tuple(MATCHES["hidden"].distances)


def defined(t: np.ndarray, s: np.ndarray, distance: str) -> tuple[float, np.ndarray]:
    """Of one position: the value, and the derivative by s, written out."""
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


def matching(**sizes: int) -> Matching:
    pairs = [
        Pair(asked=0, match="hidden", teacher=("hidden", 3), student=1, distance="mse"),
        Pair(asked=1, match="hidden", teacher=("hidden", 1), student=0, distance="cosine"),
    ]
    widths = {("hidden", 3): sizes["teacher"], ("hidden", 1): sizes["teacher"]}
    return Matching(
        pairs, teacher_widths=widths, student_width=sizes["student"], seed=sizes["seed"]
    )


@pytest.mark.numeric
def test_a_pair_is_summed_over_the_positions_that_are_compared_after_its_map() -> None:
    made = matching(teacher=6, student=4, seed=0)
    rng = np.random.default_rng(2)
    states = {n: torch.from_numpy(rng.normal(size=(2, 5, 4))).float() for n in (0, 1)}
    at = torch.tensor([0, 3, 7, 9])
    theirs = {("hidden", n): torch.from_numpy(rng.normal(size=(4, 6))).float() for n in (1, 3)}
    sums = made(states, FeatureTargets(at=at, states=theirs))
    for pair, found in zip(made.pairs, sums.detach(), strict=True):
        w = made.maps[str(pair.asked)].detach().double().numpy()
        mine = states[pair.student].double().numpy().reshape(10, 4)[at] @ w.T
        both = zip(theirs[pair.teacher].double().numpy(), mine, strict=True)
        assert float(found) == pytest.approx(
            sum(defined(t, s, pair.distance)[0] for t, s in both), rel=1e-5
        )
    sums.sum().backward()
    assert all(w.grad is not None for w in made.maps.values())
    assert made.names == ["hidden_3_to_1_mse", "hidden_1_to_0_cosine"]
    assert made.student_layers == [0, 1]


def test_maps_come_from_the_seed_and_move_no_other_draw() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (matching(teacher=6, student=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    weights = [[w.detach() for w in made.maps.values()] for made in (one, again, other)]
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
        return [(p.teacher[1], p.student) for p in pairs_of([loss], stored, student_blocks=blocks)]

    assert pairs("last", 2) == [(5, 1)]
    assert pairs("uniform", 3) == [(1, 0), (3, 1), (5, 2)]
    assert pairs("uniform", 4) == [(1, 0), (3, 1), (5, 3)]
    assert pairs("uniform", 6) == [(1, 1), (3, 3), (5, 5)]
    assert pairs({5: 0, 1: 1}, 2) == [(1, 1), (5, 0)]
