"""The plan of a student.

It says which training runs are done, in which folder, and whether they were judged.
"""

from pathlib import Path
from typing import Any

from ...stages.evaluate.stage import NUMBERS
from ...stages.recipe.evaluate import HELD_OUT_FIELDS
from ...stages.recipe.fields import Arm
from ...stages.recipe.kinds import Score
from ...stages.recipe.load import changed_fields
from ...stages.recipe.run_folder import (
    EVALUATED,
    SETTINGS,
    as_a_run_writes,
    begun_runs,
    read_record,
    training_run,
)
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import STAGES, Stage, needed, stage_named
from ...stages.train.stage import arm_loss
from ...storage.bounds import integer, mapping
from ...storage.credentials import all_shown
from ...storage.errors import UsageError
from ...storage.keys import content_id
from .lines import Plan, StagePlan
from .resolve import copied_id, student_id


def plan_students(recipe: Recipe, plan: Plan, *, ready: bool) -> None:
    """Add the lines of the student and of its baseline, and where they are kept."""
    with_baseline = recipe.evaluate.baseline and recipe.score is not None
    snapshot = needed(recipe.train, "train").snapshot
    if snapshot is None and "train" in plan.snapshots:
        snapshot = plan.snapshots["train"].id
    lacks = "for training rows: all were rejected or set aside"
    for stage in STAGES:
        arm = stage.arm
        if arm is None or (arm == "baseline" and not with_baseline):
            continue
        if not ready or snapshot is None:
            why = lacks if ready else "for the rows before it"
            plan.stages.append(StagePlan(name=stage.name, state="waits", why=why))
            continue
        settings = train_settings(recipe, snapshot, arm)
        if plan.features is not None and arm == "student":
            settings["features"] = plan.features.id
        if plan.embeddings and arm == "student":
            settings["embeddings"] = plan.embeddings
        if recipe.several and arm == "student":
            partners = plan.partners.get("train")
            settings["partners"] = partners.id if partners is not None else None
            settings["teachers"] = _teachers(plan)
        settings["student"]["identity"] = _student_identity(recipe, plan, settings)
        folder = training_run(Path(recipe.run.dir), content_id("train", **settings))
        recorded = _recorded(settings)
        plan.settings[arm], plan.train_dirs[arm] = recorded, folder
        plan.stages.append(_student_line(stage, recipe, folder, recorded))
    _plan_evaluate(recipe, plan)


def train_settings(recipe: Recipe, snapshot: str, arm: Arm) -> dict[str, Any]:
    """What decides a student.

    Its hash names the folder, and a change in it is why a student is trained again.
    """
    asked = arm_loss(recipe, arm)
    loss = asked.model_dump(mode="json", exclude=asked.unhashed())
    if loss["soft_weight"] == 0:
        # What says how the divergence is computed decides nothing.
        loss = {n: loss[n] for n in ("soft_weight", "hard_weight", "features") if n in loss}
    no_matter = {
        "snapshot",
        "audit",
        "kernel",
        "wandb",
        "checkpoint_every_seconds",
        "checkpoint_every_steps",
    }
    student, train = needed(recipe.student, "student"), needed(recipe.train, "train")
    return {
        "snapshot": snapshot,
        "student": student.model_dump(mode="json", exclude=student.unhashed()),
        "loss": loss,
        "train": train.model_dump(mode="json", exclude=no_matter),
        "run": {"seed": recipe.run.seed},
        "score": _entries(recipe.score) if recipe.score and arm == "student" else None,
    }


def _teachers(plan: Plan) -> dict[str, Any]:
    """What decides a student of several teachers.

    It is who they are, what each is asked for, and what its word weighs.
    """
    own = {"weight", "where", "budget_tokens"}
    return {
        one.name: {"id": one.id, **one.asked.model_dump(mode="json", include=own)}
        for one in plan.teachers
        if one.asked is not None
    }


def _entries(score: Score) -> dict[str, Any]:
    """What the student sees of targets that may be stored with more than the recipe asks."""
    seen = {"targets", *score.kind.settings}
    return score.model_dump(mode="json", include=seen)


def _student_identity(recipe: Recipe, plan: Plan, settings: dict[str, Any]) -> str | None:
    """The identity of the model that the student begins as.

    Where that model is gone, it is the one that a run with these settings began with.
    """
    student = needed(recipe.student, "student")
    copies = student.from_teacher_layers is not None
    if len(plan.teachers) > 1 and student.config is not None and not copies:
        return (
            plan.bound.binding.teacher_id
        )  # its config is changed; the rows name no first teacher
    try:
        if copies:
            return copied_id(recipe, plan.bound, write=plan.write)
        return student_id(recipe, write=plan.write)
    except UsageError:
        for file in begun_runs(Path(recipe.run.dir)):
            with as_a_run_writes(file):
                begun = read_record(file)["settings"]
                identity = begun["student"].pop("identity", None)
            if begun in (settings, _recorded(settings)):
                return str(identity)
        if plan.write or copies:
            raise
        return None


def _recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as their record has them.

    So the hash is over what the student's name stands for.
    """
    student = settings["student"]
    return settings | {"student": student | {"model": all_shown(student["model"])}}


def _student_line(
    stage: Stage, recipe: Recipe, folder: Path, settings: dict[str, Any]
) -> StagePlan:
    line = StagePlan(name=stage.name, state="to do")
    done = folder / stage.record
    if done.is_file():
        facts = read_record(done)
        with as_a_run_writes(done):
            line.state, line.tokens = "done", integer(facts["tokens"])
            line.planned = line.committed = integer(facts["samples"])
    elif (folder / SETTINGS).is_file():
        line.why = "was interrupted: goes on from its last checkpoint"
    else:
        line.why = _what_changed(Path(recipe.run.dir), settings) or "new"
    return line


def _what_changed(run_dir: Path, settings: dict[str, Any]) -> str:
    """Against the nearest finished student of this run folder: the fields that differ."""
    differences = []
    for file in begun_runs(run_dir):
        with as_a_run_writes(file):
            changes = changed_fields(mapping(read_record(file)["settings"]), settings)
        differences.append(changes)
    nearest = min(differences, key=len, default=[])
    return ", ".join(nearest[:4]) + (f" and {len(nearest) - 4} more" if len(nearest) > 4 else "")


def _plan_evaluate(recipe: Recipe, plan: Plan) -> None:
    if recipe.data.holdout == 0 and not recipe.evaluate.names_rows:
        return
    line = StagePlan(name="evaluate", state="waits")
    plan.stages.append(line)
    trained = [other.state for other in plan.stages if stage_named(other.name).arm]
    if "waits" in trained:
        line.why = "for the student"
        return
    if "test" not in plan.snapshots:
        line.why = "for held-out rows: all were rejected or left out"
        return
    test = plan.snapshots["test"]
    folders = {arm: path.name for arm, path in plan.train_dirs.items()}
    # The rows that judge are known by their snapshot.
    how = recipe.evaluate.model_dump(mode="json", exclude=set(HELD_OUT_FIELDS))
    if how["generate"] and how["generate"]["normalize"] == "none":
        del how["generate"]["normalize"]  # as before there was one
    if "test" in plan.partners:
        how["partners"] = plan.partners["test"].id
    references = plan.bound.binding.data_id if recipe.evaluate.generate else None
    plan.evaluation_id = content_id(
        "evaluate", test=test.id, arms=folders, how=how, references=references, measures=NUMBERS
    )
    line.planned = test.rows
    all_trained = set(trained) == {"done"}
    file = plan.train_dirs["student"] / EVALUATED
    if all_trained and file.is_file() and read_record(file).get("id") == plan.evaluation_id:
        line.state, line.committed = "done", test.rows
        return
    line.state, line.pending = "to do", test.rows
    line.why = "" if all_trained else "the student is trained first"
