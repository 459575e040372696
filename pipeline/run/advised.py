"""Advice on what store and run folder hold now: for `plan`, `status` and the end of `run`."""

from collections.abc import Mapping
from typing import Any

from ...stages.recipe.load import recorded
from ...stages.recipe.run_folder import EVALUATED, TRAINED, as_a_run_writes, read_record
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import stage_named
from ...stages.targets.spec import wanted
from ...storage.errors import IntegrityError
from ...storage.joined import open_store
from ..advice.advise import advise
from ..advice.mass import held_mass
from ..advice.table import Advice
from ..plan.lines import Plan, StagePlan


def held_of(recipe: Recipe, plan: Plan, line: StagePlan) -> dict[str, Any] | None:
    """What the recipe's entries hold of the one teacher whose line it is.

    It is None where that is not known, or not yet.
    """
    held_out = plan.snapshots.get("test")
    if recipe.score is None or held_out is None or len(plan.teachers) > 1:
        return None
    if stage_named(line.name).loads != "teacher":
        return None
    store = open_store(recipe.storage.dir, recipe.storage.sources)
    try:
        return held_mass(store, held_out, wanted(recipe.score, plan.bound.binding.vocab_size))
    except IntegrityError:  # whoever trains on these rows, or verifies them, says so
        return None


def advice_of(
    recipe: Recipe, plan: Plan, stages: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Advice]:
    """All that can be said.

    Args:
        recipe: The recipe.
        plan: Its plan.
        stages: `stage_facts`; None: what the plan's lines say.
    """
    records: dict[str, dict[str, Any]] = {}
    for line in plan.stages:
        stage = stage_named(line.name)
        if stage.record and line.state == "done":
            place = plan.train_dirs[stage.arm or "student"] / stage.record
            records[stage.arm or EVALUATED] = read_record(place)
    evaluation = records.pop(EVALUATED, None)
    with as_a_run_writes(f"{recipe.run.dir}: {TRAINED} or {EVALUATED}"):
        return advise(
            recorded(recipe),
            stages=stages or {line.name: _facts(recipe, plan, line) for line in plan.stages},
            records=records,
            evaluation=evaluation,
        )


def _facts(recipe: Recipe, plan: Plan, line: StagePlan) -> dict[str, Any]:
    """Of a line what advice asks for."""
    rows = {"rows": line.committed, "rejected": line.rejected, "pending": line.pending}
    return rows | {"why": line.why, "held": held_of(recipe, plan, line)}
