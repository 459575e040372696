"""Advice on a training's curve: its first steps, its end, and the norms of its gradients."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..printing.numbers import count, nats, percent, significant
from .table import CLEAR, FAST_FALL, LEAST_POINTS, MOST_PASSES, NO_MOVE, RISE, SPIKE, Advice, advice

FIRST_POINTS = 3
"""Points whose mean is what the training began with, where it began no higher."""


def trained(
    recipe: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
) -> Iterator[Advice]:
    """Of the training of each arm what its curve says.

    Args:
        recipe: As records keep it.
        records: Arm -> what its `train.json` holds.
    """
    settings = recipe.get("train") or {}
    for arm, record in records.items():
        history = [point for point in record.get("history") or [] if point.get("tokens")]
        yield from _norms(arm, history, settings)
        losses = _losses(history)
        if len(losses) < LEAST_POINTS:
            continue
        yield from _beginning(arm, losses, settings)
        yield from _end(arm, losses, settings, record)


def _losses(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(tokens, loss) along the training.

    Where what was minimised itself moved, the loss is that of a part which did not move.
    """
    moving = history[0].keys() if history else ()
    name = "loss"
    if "soft_weight" in moving or "hard_weight" in moving:
        name = "soft"
    if "temperature" in moving or (name == "soft" and history[0].get("soft") is None):
        name = "hard"
    found = [(point["tokens"], point.get(name)) for point in history]
    return [(tokens, loss) for tokens, loss in found if loss is not None and math.isfinite(loss)]


def _beginning(
    arm: str, losses: Sequence[tuple[int, float]], settings: Mapping[str, Any]
) -> Iterator[Advice]:
    """Steps that are too large, or so small that nothing comes of them."""
    end = losses[-1][0]
    first = statistics.fmean(loss for _, loss in losses[:FIRST_POINTS])
    warm = settings.get("warmup_fraction", 0.0) * end
    after = [(tokens, loss) for tokens, loss in losses if warm < tokens <= warm + 0.1 * end]
    if len(after) >= FIRST_POINTS:
        mean = statistics.fmean(loss for _, loss in after)
        if mean - losses[0][1] > RISE * abs(losses[0][1]):
            numbers = {
                "first": nats(losses[0][1]),
                "loss": nats(mean),
                "tokens": count(after[-1][0]),
            }
            yield advice("rate_too_high", arm, **numbers, rate=changed_rate(settings, 1 / 3))
            return
    quarter = [(tokens, loss) for tokens, loss in losses if tokens <= end / 4]
    last = quarter[-FIRST_POINTS:]
    mean = statistics.fmean(loss for _, loss in last)
    if first > 0 and abs(first - mean) < NO_MOVE * first:
        numbers = {"first": nats(first), "loss": nats(mean), "tokens": count(last[-1][0])}
        yield advice("rate_too_low", arm, **numbers, rate=changed_rate(settings, 3))


def _end(
    arm: str,
    losses: Sequence[tuple[int, float]],
    settings: Mapping[str, Any],
    record: Mapping[str, Any],
) -> Iterator[Advice]:
    """A loss that still falls fast; not where validation was best before the end.

    Nor where there is none, and the text was read so often that it may be known by heart.
    """
    validation, best = record.get("validation") or [], record.get("best")
    if not validation and (record.get("epochs") or 0) > MOST_PASSES:
        return
    if best and validation and best["tokens"] < validation[-1]["tokens"]:
        return
    tenth = len(losses) // 10
    before = [loss for _, loss in losses[-2 * tenth : -tenth]]
    last = [loss for _, loss in losses[-tenth:]]
    means = statistics.fmean(before), statistics.fmean(last)
    fall = means[0] - means[1]
    noise = math.hypot(*(statistics.stdev(part) / math.sqrt(tenth) for part in (before, last)))
    if means[0] <= 0 or fall < FAST_FALL * means[0] or fall < CLEAR * noise:
        return
    numbers = {"fall": percent(fall / means[0]), "loss": nats(means[1])}
    length = f"{changed_length(settings, 2)}, twice what it was"
    yield advice("still_falling", arm, **numbers, length=length)


def _norms(
    arm: str, history: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[Advice]:
    """A norm that is no number, or far above those around it; the largest one."""
    norms = [point.get("grad_norm_most", point.get("grad_norm")) for point in history]
    there = [
        (point["tokens"], norm)
        for point, norm in zip(history, norms, strict=True)
        if norm is not None
    ]
    worst: tuple[float, int, float] | None = None
    for at, (tokens, norm) in enumerate(there):
        if not math.isfinite(norm):
            yield _spike(arm, tokens, norm, "which is no number", settings)
            return
        around = [other for _, other in there[max(0, at - 10) : at + 11] if math.isfinite(other)]
        usual = statistics.median(around)
        if len(there) >= LEAST_POINTS and usual and norm > SPIKE * usual:
            worst = max(worst or (0.0, 0, 0.0), (norm / usual, tokens, norm))
    if worst is not None:
        yield _spike(arm, *worst[1:], f"{worst[0]:.0f} times the median around it", settings)


def _spike(arm: str, tokens: int, norm: float, times: str, settings: Mapping[str, Any]) -> Advice:
    numbers = {"norm": significant(norm) if math.isfinite(norm) else str(norm), "times": times}
    rate = changed_rate(settings, 1 / 3)
    return advice("gradient_norm", arm, **numbers, tokens=count(tokens), rate=rate)


def changed_rate(settings: Mapping[str, Any], times: float) -> str:
    """So many times the learning rate of a recipe's `train`, as a recipe spells it."""
    return f"{times * settings['learning_rate']:.1e}"


def changed_length(settings: Mapping[str, Any], times: int) -> str:
    """So many times the length of a training, as a recipe spells it."""
    name = "epochs" if settings.get("epochs") else "tokens"
    return f"{name}: {times * settings[name]:{'g' if name == 'epochs' else ''}}"
