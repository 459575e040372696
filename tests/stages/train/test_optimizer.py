"""Schedules and which parameters decay."""

import itertools

import pytest
import torch
from torch import nn

from stillroom.stages.recipe.sections import Train
from stillroom.stages.train.optimizer import learning_rate, make_optimizer


def train(**changes):
    return Train(
        **{"tokens": 1000, "learning_rate": 2.0, "warmup_fraction": 0.1, "final_fraction": 0.25}
        | changes
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warms_up_to_the_peak_and_never_rises_again(schedule):
    rates = [learning_rate(i / 1000, train(schedule=schedule)) for i in range(1, 1001)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[49] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(2.0)
    assert all(b <= a for a, b in itertools.pairwise(rates[99:]))
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.5)


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("cosine", 1.25), ("linear", 1.25), ("constant", 2.0), ("wsd", 2.0)]
)
def test_halfway_between_warm_up_and_end(schedule, halfway):
    assert learning_rate(0.55, train(schedule=schedule)) == pytest.approx(halfway)


def test_wsd_falls_in_the_last_fifth():
    at = [learning_rate(done, train(schedule="wsd")) for done in (0.8, 0.9, 1.0, 1.3)]
    assert at == pytest.approx([2.0, 1.25, 0.5, 0.5])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_no_warm_up_and_a_long_one(schedule):
    assert learning_rate(1e-9, train(schedule=schedule, warmup_fraction=0.0)) == pytest.approx(2.0)
    assert learning_rate(0.95, train(schedule=schedule, warmup_fraction=0.95)) == pytest.approx(2.0)


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 4))
    model[0].weight.requires_grad_(False)
    groups = make_optimizer(model, train(weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.3, [(4, 3)]),
        (0.0, [(3,), (3,), (4,)]),
    ]


def test_a_step_is_adamw_by_hand():
    parameter = nn.Parameter(torch.tensor([[2.0]]))
    model = nn.Module()
    model.weight = parameter
    optimizer = make_optimizer(model, train(weight_decay=0.1, learning_rate=0.5))
    parameter.grad = torch.tensor([[3.0]])
    optimizer.step()
    # In the first step both moments are unbiased to g and g^2, so the update is the sign of g; the
    # rest is decay.
    assert float(parameter.detach()) == pytest.approx(2 - 0.5 * 0.1 * 2 - 0.5)
