"""Whether a loss can be had of what `score` stores.

It says which divergence goes with which targets, tail and temperature.
"""

from ..divergences import owners
from ..fields import Schedule, extremes, value_at
from ..kinds import Score
from ..sections import Loss


def check_loss(loss: Loss, score: Score | None) -> list[tuple[str, str]]:
    """What is wrong with the loss: (dotted path, message)."""
    errors = []
    weights = [loss.soft_weight, loss.hard_weight, *(match.weight for match in loss.features)]
    if not any(value_at(weight, 1.0) for weight in weights):
        when = " at the end" if any(extremes(weight)[1] for weight in weights) else ""
        message = f"soft_weight and hard_weight are both 0{when}: nothing to learn. Set one above 0"
        errors.append(("loss.soft_weight", message))
    errors += _idle(loss)
    if score is not None and extremes(loss.soft_weight)[1] > 0:
        errors += _divergence(loss, score) + _tail(loss, score) + _temperature(loss, score)
    return errors


def _idle(loss: Loss) -> list[tuple[str, str]]:
    """Settings that this divergence would silently ignore."""
    return [
        (
            f"loss.{name}",
            (
                f"belongs to divergence {' and '.join(map(repr, owners(name)))}; this recipe has "
                f"{loss.divergence!r}. Remove it"
            ),
        )
        for name in loss.idle()
    ]


def _divergence(loss: Loss, score: Score) -> list[tuple[str, str]]:
    if not score.structure.drawn or loss.kind.draws_suffice:
        return []
    message = (
        f"{loss.divergence!r} needs the teacher's probability of each outcome, and sampled "
        "targets say it in the mean only. Use 'forward_kl', or score.targets 'topk', 'topp' or "
        "'full'"
    )
    return [("loss.divergence", message)]


def _tail(loss: Loss, score: Score) -> list[tuple[str, str]]:
    if loss.tail == "bucket":
        return []
    if not score.structure.has_tail:
        return [
            ("loss.tail", f"targets {score.targets!r} have no tail (got {loss.tail!r}). Remove it")
        ]
    if loss.tail == "renormalize":
        if score.k > 1:
            return []
        message = (
            "'renormalize' compares entries with one another, and score.k is 1. Raise it, or use "
            "'bucket'"
        )
        return [("loss.tail", message)]
    if loss.is_finite_without_tail():
        return []
    message = (
        f"{loss.tail!r} leaves the teacher nothing outside its entries, and {loss.divergence!r} "
        "is infinite where a student has mass there. Use 'bucket' or 'renormalize', or "
        "divergence 'forward_kl' or 'skew_reverse_kl'"
    )
    return [("loss.tail", message)]


def _temperature(loss: Loss, score: Score) -> list[tuple[str, str]]:
    least, greatest = extremes(loss.temperature)
    if score.structure.whole:
        return []
    if least == greatest == 1.0 and not score.structure.drawn:
        return []
    moving = isinstance(loss.temperature, Schedule) and least != greatest
    if score.structure.drawn:
        drawn = score.temperatures[0] if score.temperatures else 1.0
        if not moving and least == drawn:
            return []
        message = (
            "sampled targets serve the temperature they are drawn at, score.temperatures "
            f"{score.temperatures}, and no other (got {_shown(loss)}). Give both the same number"
        )
        return [("loss.temperature", message)]
    if loss.unstored_temperature == "approximate" or (not moving and least in score.temperatures):
        return []
    if moving:
        message = (
            "a schedule passes through temperatures that no store has. Use score.targets 'full', "
            "a number that score.temperatures names, or unstored_temperature: approximate"
        )
    else:
        message = (
            f"{least:g} is not stored: score.temperatures is {score.temperatures}. Add it there, "
            "or set unstored_temperature: approximate"
        )
    return [("loss.temperature", message)]


def _shown(loss: Loss) -> str:
    return f"{loss.temperature:g}" if isinstance(loss.temperature, float) else "a schedule"
