"""Several teachers of one text: an exact mixture, pooled draws without a bias.

Each token has weights of its own.
"""

import numpy as np
import pytest
import torch

from stillroom.stages.losses.definition import logits_distillation
from stillroom.stages.losses.objective import Objective
from stillroom.stages.targets.batch import TargetBatch, joined, weighed
from stillroom.stages.targets.entries_and_tail import targets_of
from stillroom.stages.targets.spec import Kept
from stillroom.stages.targets.stored import Reading, soft_part
from stillroom.stages.targets.teaching import Teaching, mixed

N, V = 7, 13
WEIGHTS = (0.3, 0.7)


def teachers(count: int = 2) -> torch.Tensor:
    """[J, N, V] float64 distributions."""
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(count, N, V)) * 2)
    return logits.softmax(-1)


LABELS = torch.arange(N) % V


def stored(probabilities: torch.Tensor, kept: Kept, seed: int = 0):
    """Targets of one teacher, as scoring makes them."""
    return targets_of(probabilities.log().float(), LABELS, kept=kept, seed=seed)


def full(probabilities: torch.Tensor):
    return stored(probabilities, Kept(kind="full", k=V)).normalised()


def test_the_mixture_of_full_targets_is_exact() -> None:
    each = teachers()
    found = mixed([full(one) for one in each], np.array(WEIGHTS)[:, None] * np.ones((1, N)))
    true = 0.3 * each[0] + 0.7 * each[1]
    np.testing.assert_allclose(np.exp(found.logprobs), true, atol=3e-7)
    np.testing.assert_allclose(found.entropy, -(true * true.log()).sum(-1), atol=1e-6)
    there = true.gather(-1, LABELS[:, None])[:, 0]
    np.testing.assert_allclose(found.token_logprob, there.log(), atol=1e-6)


def test_a_probability_of_zero_stays_one_in_the_mixture() -> None:
    one, other = teachers()
    one[:, 2] = other[:, 2] = 0.0
    found = mixed([full(one), full(other)], np.full((2, N), 0.5))
    assert (found.logprobs[:, 2] == -np.inf).all()
    assert np.isfinite(found.entropy).all()


@pytest.mark.parametrize("proposal", [1.0, 0.7])
def test_pooled_draws_have_the_mixture_as_their_mean(proposal: float) -> None:
    each, repeats = teachers(), 1_000
    kept = Kept(kind="sampled", k=8, draw="multinomial", proposal=proposal)
    shares = np.array(WEIGHTS)[:, None] * np.ones((1, N))
    sums, squares = np.zeros((N, V)), np.zeros((N, V))
    for repeat in range(repeats):
        drawn = [stored(one, kept, seed=2 * repeat + j) for j, one in enumerate(each)]
        found = mixed(drawn, shares)
        dense = np.zeros((N, V + 1))  # the last column takes the padding
        np.put_along_axis(dense, found.ids, found.weights, axis=1)
        assert (np.sort(found.ids, axis=1)[:, 1:] != np.sort(found.ids, axis=1)[:, :-1])[
            np.sort(found.ids, axis=1)[:, 1:] >= 0
        ].all()
        sums += dense[:, :V]
        squares += dense[:, :V] ** 2
    mean = sums / repeats
    error = np.sqrt((squares / repeats - mean**2) / repeats)
    z = (mean - (0.3 * each[0] + 0.7 * each[1]).numpy()) / np.maximum(error, 1e-9)
    assert np.abs(z).max() < 4.5
    assert 0.7 < (z**2).mean() < 1.3


def gradient(batch: TargetBatch, positions: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of the sum over the positions, in the student's logits."""
    logits = torch.from_numpy(np.random.default_rng(8).normal(size=(N, V))).requires_grad_()
    objective = Objective(temperature=temperature)
    logits_distillation(logits[positions], batch, objective=objective).soft.sum().backward()
    return logits.grad


@pytest.mark.parametrize(("temperature", "equal"), [(1.0, True), (2.0, False)])
def test_the_sum_has_the_gradient_of_the_mixture_at_temperature_1_only(
    temperature: float, equal: bool
) -> None:
    found = [(j, full(one)) for j, one in enumerate(teachers())]
    reading = Reading(temperature=temperature)
    asked = {how: Teaching(weights=WEIGHTS, mixture=how == "mixture") for how in ("sum", "mixture")}
    gradients = {}
    for how, teaching in asked.items():
        said = teaching.of_text(found)
        batch = joined([weighed(soft_part(one, LABELS, reading), share) for one, share in said])
        positions = torch.arange(N).repeat(len(said))
        gradients[how] = gradient(batch, positions, temperature)
    gap = (gradients["sum"] - gradients["mixture"]).norm() / gradients["mixture"].norm()
    assert (gap < 1e-6) if equal else (gap > 0.02)


@pytest.mark.parametrize("each_token", ["entropy", "likelihood"])
def test_weights_of_each_token_keep_their_sum(each_token: str) -> None:
    each = teachers(3)
    found = [(j, full(one)) for j, one in enumerate(each)]
    shares = Teaching(weights=(1.0, 2.0, 0.5), each_token=each_token).shares(found)
    np.testing.assert_allclose(shares.sum(0), 3.5)
    entropy = -(each * each.log()).sum(-1)
    there = each.gather(-1, LABELS.expand(3, N)[..., None])[..., 0]
    raw = ((-entropy).exp() if each_token == "entropy" else there) * torch.tensor(
        [[1.0], [2.0], [0.5]]
    )
    np.testing.assert_allclose(shares, 3.5 * raw / raw.sum(0), atol=1e-5)


def test_weights_of_a_token_that_no_teacher_can_say_are_those_of_the_recipe() -> None:
    each = teachers()
    each[:, 2, LABELS[2]] = 0.0
    each[0, 3, LABELS[3]] = 0.0
    teaching = Teaching(weights=WEIGHTS, each_token="likelihood")
    shares = teaching.shares([(j, full(one)) for j, one in enumerate(each)])
    np.testing.assert_allclose(shares[:, 2], WEIGHTS)
    np.testing.assert_allclose(shares[:, 3], [0.0, 1.0])
    assert np.isfinite(shares).all()


def test_a_text_that_one_teacher_has_alone_has_its_weight() -> None:
    one = full(teachers(1)[0])
    ((same, share),) = Teaching(weights=(1.0, 0.25)).of_text([(1, one)])
    assert same is one
    np.testing.assert_array_equal(share, np.full(N, 0.25))
    ((alone, weight),) = Teaching(weights=(1.0, 0.25), mixture=True).of_text([(1, one)])
    assert alone is one
    assert weight is None
