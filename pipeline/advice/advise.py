"""All advice on a run, of whatever is known of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    if evaluation is None:
        return found
    judgements = list(judged(recipe, evaluation, prompts=(stages.get("data") or {}).get("rows")))
    if any(one.name == "learned_nothing" for one in judgements):
        # Its curve began as it went on: one number for the rate is enough.
        found = [one for one in found if (one.name, one.about) != ("rate_too_low", "student")]
    return found + judgements


def of_report(report: Mapping[str, Any]) -> list[Advice]:
    """On a run with a report, of what that holds; nothing where it does not know its recipe."""
    recipe = report["settings"].get("recipe")
    if not recipe or not recipe.get("train"):
        return []
    stages = report["facts"].get("stages") or {}
    return advise(recipe, stages=stages, records=report["train"], evaluation=report["evaluation"])


@dataclass(kw_only=True, slots=True)
class Shared:
    """An advice, and the runs that have it."""

    advice: Advice
    """Of the first of them, with its numbers."""
    runs: list[str]
    alike: bool = True
    """Whether the others have the same numbers."""

    def json(self) -> dict[str, Any]:
        """It for programs."""
        return {"runs": self.runs, **self.advice.json()}


def of_reports(groups: Iterable[Mapping[str, Mapping[str, Any]]]) -> list[Shared]:
    """On several runs: each advice once, with the runs that have it.

    Args:
        groups: Reports by run folder. Those of a group differ in their seed alone: an advice of
            one is that of another whose numbers are a little different.
    """
    found: list[Shared] = []
    for group in groups:
        for run, report in group.items():
            for one in of_report(report):
                same = next((s for s in found if _is_same(s, one, group)), None)
                if same is None:
                    found.append(Shared(advice=one, runs=[run]))
                else:
                    same.runs.append(run)
                    same.alike = same.alike and same.advice == one
    return found


def _is_same(known: Shared, one: Advice, group: Mapping[str, Any]) -> bool:
    if known.runs[0] not in group:
        return known.advice == one
    return (known.advice.name, known.advice.about) == (one.name, one.about)
