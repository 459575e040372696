"""Advice on what the evaluation found.

It is on gradients that turn away, on a student that did not move or lost, and on too few tokens.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..printing.numbers import count, decimals, nats, percent
from .remedy import Remedy, accepted, draws, more_entries
from .table import CLEAR, LARGEST_RATE, MOST_DEGREES, NO_MOVE, RESOLVED, Advice, advice
from .trained import changed_length, changed_rate

_WORDS = {"baseline": "the baseline", "student_before": "the student before training"}
_MEASURES = {"kl_teacher": "KL to the teacher", "cross_entropy": "cross-entropy"}


def judged(
    recipe: Mapping[str, Any], evaluation: Mapping[str, Any], *, prompts: int | None = None
) -> Iterator[Advice]:
    """What an `evaluation.json` says.

    Args:
        recipe: As records keep it.
        evaluation: What `evaluation.json` holds.
        prompts: How many the data have; None: nobody knows.
    """
    turned = list(_angles(recipe, evaluation))
    yield from turned
    unmoved = list(_unmoved(recipe, evaluation))
    yield from unmoved
    differences = evaluation.get("differences") or {}
    other = next((arm for arm in _WORDS if arm in differences), None)
    if other is None:
        return
    difference = differences[other]
    measure = next((name for name in _MEASURES if difference.get(name) is not None), None)
    if measure is None or evaluation["results"][other].get(measure) is None:
        return
    if _is_worse(evaluation, other, measure):
        if unmoved:  # that is why, and slower steps would teach it less still
            return
        # Targets that lead elsewhere are why; slower steps would lead there as well.
        remedy = _nearer(recipe) if turned else _slower(recipe)
        yield _worse(evaluation, other, measure, remedy)
    elif other == "baseline":
        yield from _too_few(recipe, evaluation, measure, prompts)


def _angles(recipe: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Iterator[Advice]:
    """How far the sparse soft loss's gradient turns from that of whole targets.

    It is the larger of two angles: of the student as it begins, and as it ends.
    """
    known = [(arm, turned) for arm, turned in (evaluation.get("gradient") or {}).items() if turned]
    angles = {arm: turned.get("angle_degrees") or 0.0 for arm, turned in known}
    arm = max(angles, key=lambda name: angles[name], default="")
    if not known or angles[arm] <= MOST_DEGREES:
        return
    numbers = {"angle": decimals(angles[arm], 0), "tokens": count(dict(known)[arm]["tokens"])}
    yield advice("gradient_angle", arm, **numbers, remedy=_nearer(recipe))


def _unmoved(recipe: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Iterator[Advice]:
    """A student as far from its teacher as before the training."""
    results = evaluation["results"]
    before, after = (
        (results.get(arm) or {}).get("kl_teacher") for arm in ("student_before", "student")
    )
    if not before or after is None or abs(before - after) >= NO_MOVE * before:
        return
    numbers = {"value": decimals(after), "before": decimals(before)}
    small = 10 * recipe["train"]["learning_rate"] <= LARGEST_RATE
    remedy = (
        f"learning_rate: {changed_rate(recipe['train'], 10)}"
        if small
        else changed_length(recipe["train"], 10)
    )
    yield advice("learned_nothing", "student", **numbers, remedy=remedy)


def _nearer(recipe: Mapping[str, Any]) -> str:
    """What brings the gradient nearer.

    It is more draws, the tail, draws in place of entries, or more entries: the first that the
    recipe takes.
    """
    score = recipe["score"]
    if score["targets"] == "sampled":
        rounds = {"score.rounds": 4 * score["rounds"]}
        return Remedy(changes=rounds, why="; the noise of draws halves").words()
    found = []
    if recipe["loss"]["tail"] in ("drop", "renormalize"):
        outside = "; what lies outside the entries is then counted"
        found.append(Remedy(changes={"loss.tail": "bucket"}, why=outside))
    whole = "; nothing is cut off, so its mean is the whole distribution"
    found += [draws(recipe, why=whole), *more_entries(recipe, {"score.k": 4 * score["k"]})]
    fit = accepted(recipe, found)
    return fit[0].words() if fit else "score.k as high as it can be had"


def _slower(recipe: Mapping[str, Any]) -> str:
    rate = changed_rate(recipe["train"], 1 / 3)
    return f"train.learning_rate: {rate}, a third of what it was, for both"


def _is_worse(evaluation: Mapping[str, Any], other: str, measure: str) -> bool:
    """Whether the student is clearly farther off than the baseline, or than before its training."""
    difference = evaluation["differences"][other]
    gap, error = difference[measure], difference.get(f"{measure}_se")
    return error is not None and gap > CLEAR * error


def _worse(evaluation: Mapping[str, Any], other: str, measure: str, remedy: str) -> Advice:
    """What is said of such a student."""
    difference, results = evaluation["differences"][other], evaluation["results"]
    gap, error = difference[measure], difference[f"{measure}_se"]
    numbers = {"measure": _MEASURES[measure], "gap": nats(gap), "error": nats(error)}
    numbers |= {
        "value": nats(results["student"][measure]),
        "against": nats(results[other][measure]),
    }
    return advice("worse", "student", **numbers, other=_WORDS[other], remedy=remedy)


def _too_few(
    recipe: Mapping[str, Any], evaluation: Mapping[str, Any], measure: str, prompts: int | None
) -> Iterator[Advice]:
    """A difference that cannot be told, and could not were it as large as one that matters."""
    difference, base = evaluation["differences"]["baseline"], evaluation["results"]["baseline"]
    gap, error = difference[measure], difference.get(f"{measure}_se")
    scale = abs(base[measure])
    if error is None or not scale or abs(gap) > CLEAR * error or CLEAR * error <= RESOLVED * scale:
        return
    times = math.ceil((CLEAR * error / (RESOLVED * scale)) ** 2)
    tokens = evaluation["measured_on"]["tokens"]
    numbers = {"tokens": count(tokens), "measure": _MEASURES[measure], "other": _WORDS["baseline"]}
    numbers |= {"visible": nats(CLEAR * error), "gap": nats(gap)}
    numbers |= {"share": percent(CLEAR * error / scale, 0), "times": f"{times} times"}
    yield advice(
        "too_few_tokens", "student", **numbers, remedy=_longer(recipe, tokens, times, prompts)
    )


def _longer(recipe: Mapping[str, Any], tokens: int, times: int, prompts: int | None) -> str:
    """So many times the held-out tokens; where there are no more, from elsewhere."""
    changes = {"evaluate.tokens": times * tokens}
    evaluate, holdout = recipe["evaluate"], times * recipe["data"]["holdout"]
    if evaluate.get("source") or evaluate.get("split"):
        if limit := evaluate.get("limit"):
            changes = {"evaluate.limit": times * limit} | changes
    elif prompts is not None and holdout >= prompts:
        whole = f", and held-out rows of your own in evaluate.source: there are {count(prompts)}"
        return f"{Remedy(changes=changes, without=('data.holdout',)).words()}{whole} prompts in all"
    else:
        changes = {"data.holdout": holdout} | changes
    return Remedy(changes=changes).words()
