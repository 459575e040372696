"""What the processes of a stage are told.

They are told the recipe as they read it, and what the plan has found.
"""

from typing import Any

from ...stages.recipe.fields import Arm
from ...stages.recipe.load import recorded
from ...stages.recipe.run_folder import SETTINGS
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import stage_named
from ...storage.credentials import hidden
from ...storage.files.local import LocalFiles
from ...storage.joined import at_commit
from ...storage.keys import canonical_json
from ..plan.lineage import lineages
from ..plan.lines import Plan
from ..plan.teachers import teachers_json


def asked_recipe(recipe: Recipe, plan: Plan, name: str) -> Recipe:
    """As a stage reads it: one that loads a teacher has this one alone."""
    return plan.teacher_of(name).recipe if stage_named(name).loads == "teacher" else recipe


def stage_message(recipe: Recipe, plan: Plan, name: str) -> dict[str, Any]:
    """What each process of a stage is told, but for its own log. A student's folder is begun."""
    stage = stage_named(name)
    if stage.arm is not None:
        _begin_student(recipe, plan, stage.arm)
    # Unset fields stay so: a split that nobody wrote is no wish.
    opened = asked_recipe(recipe, plan, name).model_dump(mode="json", exclude_unset=True)
    # The stage reads the sources at the commits that were planned with and proved.
    opened["storage"]["sources"] = at_commit(recipe.storage.sources, plan.sources)
    return {
        "name": name,
        "recipe": opened,
        "hidden": hidden(),  # what the stage shows and records keeps `${NAME}` too
        "train_dirs": {arm: str(folder) for arm, folder in plan.train_dirs.items()},
        "job": _job(recipe, plan, name),
    }


def _job(recipe: Recipe, plan: Plan, name: str) -> dict[str, Any]:
    stage, binding = stage_named(name), plan.teacher_of(name).bound.binding
    snapshots = {split: s.id for split, s in plan.snapshots.items()}
    if recipe.train is not None and recipe.train.snapshot is not None:
        snapshots["train"] = recipe.train.snapshot
    # The teacher's context limits the prompts that are read, the author's the text that is written.
    reads = binding.context_tokens if stage.name == "data" else binding.author_context_tokens
    return {
        "data_id": binding.data_id,
        "teacher_id": binding.teacher_id,
        "author_id": binding.author_id,
        "earlier_author_id": plan.bound.earlier_author_id,
        "day": binding.day,
        "context_tokens": reads,
        "arm": stage.arm or "student",
        "snapshots": snapshots,
        "partners": {split: s.id for split, s in plan.partners.items()},
        "teachers": teachers_json(plan.teachers),
        "features_id": plan.features.id if plan.features else "",
        "evaluation_id": plan.evaluation_id,
    }


def _begin_student(recipe: Recipe, plan: Plan, arm: Arm) -> None:
    folder = plan.train_dirs[arm]
    files = LocalFiles(folder.parent)
    record: dict[str, Any] = {
        "settings": plan.settings[arm],
        "arm": arm,
        "recipe": recorded(recipe),
        "teacher_id": plan.bound.binding.teacher_id,
    }
    if teachers := teachers_json(plan.teachers):
        record["teachers"] = teachers
    known = [one.bound.teacher for one in plan.teachers]
    if codes := [teacher.code_id for teacher in known if teacher is not None and teacher.runs_code]:
        record["code"] = ", ".join(codes)
    record |= lineages(recipe, plan.teachers)
    files.put_if_absent(f"{folder.name}/{SETTINGS}", canonical_json(record))
