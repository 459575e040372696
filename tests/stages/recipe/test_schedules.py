"""Schedules of the loss's settings: where they start, peak and end, and what shapes lie between."""

import itertools
import math

import pytest
from pydantic import ValidationError

from stillroom.stages.recipe.fields import Schedule, extremes, value_at
from stillroom.stages.recipe.sections import Loss

WSD = Schedule(shape="wsd", start=0.2, peak=0.9, end=0.5, warmup_fraction=0.1, decay_fraction=0.2)


@pytest.mark.parametrize("number", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("done", [0.0, 0.3, 1.0, 1.2])
def test_a_number_is_itself_and_so_is_a_flat_schedule(number, done):
    flat = {"start": number, "end": number}
    assert value_at(number, done) == number
    assert value_at(Schedule(shape="linear", **flat), done) == number
    assert value_at(Schedule(shape="cosine", **flat), done) == number
    assert value_at(Schedule(shape="wsd", peak=number, **flat), done) == number


@pytest.mark.parametrize(
    ("shape", "quarter"), [("linear", 1.75), ("cosine", 1.5 + math.cos(math.pi / 4) / 2)]
)
def test_from_start_to_end(shape, quarter):
    schedule = Schedule(shape=shape, start=2.0, end=1.0)
    at = [value_at(schedule, done) for done in (0.0, 0.25, 0.5, 1.0, 1.3)]
    assert at == pytest.approx([2.0, quarter, 1.5, 1.0, 1.0])


def test_warm_up_stable_decay():
    at = [value_at(WSD, done) for done in (0.0, 0.05, 0.1, 0.4, 0.8, 0.9, 1.0)]
    assert at == pytest.approx([0.2, 0.55, 0.9, 0.9, 0.9, 0.7, 0.5])
    steps = [value_at(WSD, n / 1000) for n in range(1001)]
    assert max(abs(b - a) for a, b in itertools.pairwise(steps)) < 0.01  # no jump anywhere
    level = [abs(steps[n + 1] - steps[n]) for n in (800, 999)]
    assert max(level) < 1e-4  # the decay starts and ends level


def test_no_warm_up_and_a_decay_all_along():
    schedule = Schedule(
        shape="wsd", start=0.2, peak=1.0, end=0.0, warmup_fraction=0.0, decay_fraction=1.0
    )
    assert [value_at(schedule, done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_extremes():
    assert extremes(0.3) == (0.3, 0.3)
    assert extremes(WSD) == (0.2, 0.9)
    assert extremes(Schedule(shape="linear", start=1.0, end=0.0)) == (0.0, 1.0)


def test_a_recipe_survives_being_written_and_read_again():
    loss = Loss(soft_weight=WSD, temperature=Schedule(shape="linear", start=2.0, end=1.0))
    assert Loss.model_validate_json(loss.model_dump_json()) == loss


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "linear", "start": 0.0, "end": 1.0, "peak": 1.0}, "belongs to shape 'wsd'"),
        (
            {"shape": "cosine", "start": 0.0, "end": 1.0, "decay_fraction": 0.3},
            "belongs to shape 'wsd'",
        ),
        ({"shape": "wsd", "start": 0.0, "end": 1.0}, "needs a `peak`"),
        (
            {
                "shape": "wsd",
                "start": 0,
                "peak": 1,
                "end": 0,
                "warmup_fraction": 0.6,
                "decay_fraction": 0.6,
            },
            "together are more than 1",
        ),
        ({"shape": "wsd", "start": -0.1, "peak": 1, "end": 0}, "greater than or equal to 0"),
    ],
)
def test_schedules_that_cannot_be(settings, message):
    with pytest.raises(ValidationError, match=message):
        Schedule(**settings)
