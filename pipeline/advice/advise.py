"""All advice on a run, of whatever is known of it."""

from collections.abc import Mapping
from typing import Any

from .judged import judged
from .stored import stored
from .table import Advice
from .trained import trained


def advise(
    recipe: Mapping[str, Any],
    *,
    stages: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Mapping[str, Any]],
    evaluation: Mapping[str, Any] | None,
) -> list[Advice]:
    """In the order of the stages; nothing of what is not known yet.

    Args:
        recipe: As records keep it.
        stages: Of each stage what `stored` asks for.
        records: Arm -> `train.json`.
        evaluation: `evaluation.json`; None: not judged yet.
    """
    found = [*stored(recipe, stages), *trained(recipe, records)]
    return found if evaluation is None else [*found, *judged(recipe, evaluation)]


def of_report(report: Mapping[str, Any]) -> list[Advice]:
    """On a run with a report, of what that holds; nothing where it does not know its recipe."""
    recipe = report["settings"].get("recipe")
    if not recipe or not recipe.get("train"):
        return []
    stages = report["facts"].get("stages") or {}
    return advise(recipe, stages=stages, records=report["train"], evaluation=report["evaluation"])
