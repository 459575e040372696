"""Run a plan, one stage after the other.

Each stage is in a process group of its own, which has ended before the next begins.
"""

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ...stages.models.students.factory_file import refuse_code
from ...stages.recipe.run_folder import (
    ALONE,
    EVALUATED,
    LATEST,
    LOGS,
    as_a_run_writes,
    read_record,
)
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import STAGES, stage_named
from ...stages.train.scalars import refuse_without_wandb
from ...stages.workers.clock import Clock
from ...stages.workers.locks import worker_number
from ...storage.bounds import mapping
from ...storage.errors import NotTogether, StillroomError, UsageError, name_too_long
from ...storage.files.local import LocalFiles
from ...storage.snapshots.snapshot import save_snapshot
from ...storage.store.hashes import FileHashes
from ...storage.store.store import Store
from ...storage.words import all_were, counted, some_are
from ..plan.lineage import kept_files
from ..plan.lines import Plan, StagePlan
from ..plan.plan import make_plan, plan_again, refuse_impossible
from ..plan.resolve import write_down
from ..publish.model_card import write_student_cards
from ..report.report import results_table, write_report
from .advised import advice_of
from .crew import Crew
from .jobs import asked_recipe, stage_message
from .posts import environments, post, why_alone, worker_notes
from .ranked import RankedCrew
from .screen import Screen
from .status import facts
from .timings import Pace

ROOMS = tuple(dict.fromkeys(stage.room for stage in STAGES))


@dataclass(frozen=True, kw_only=True, slots=True)
class Here:
    """Who does the stages of a plan."""

    screen: Screen
    work: Callable[[Recipe, Plan, str], dict[str, Any]]
    """Does a stage, and hands back its answer."""


def run(
    recipe: Recipe,
    *,
    until: str | None = None,
    only: str | None = None,
    quiet: bool = False,
    allow_code: bool = False,
    worker: bool = False,
) -> dict[str, Any]:
    """Do what the plan says is to do; running again goes on where this stopped.

    Args:
        recipe: The recipe.
        until: Last stage to run.
        only: The one stage to run.
        quiet: Print no progress.
        allow_code: Whether `student.factory` may run.
        worker: Be one worker of many, with the devices that are visible: others are started
            elsewhere.

    Returns:
        `{"run_dir", "stages": {name: {"rows", "tokens", "seconds", "state", "clock"}},
        "results": {arm: {...}}, "advice": [{...}], "clock": {...}}`. A stage's clock
        (`stages/workers/clock.py`) splits the seconds of its process. The last one is that of this
        process without them.

    Raises:
        StillroomError: a stage failed; finished rows are kept.
    """
    clock = Clock(began=time.monotonic() - (time.time() - psutil.Process().create_time()))
    names = _chosen(until, only)
    refuse_code(recipe, allowed=allow_code)
    if "train" in names and recipe.train is not None:
        refuse_without_wandb(recipe.train.wandb)
    plan = first_plan(recipe, names, look=partial(_workers, recipe, alone=worker))
    prepare(recipe, plan)
    with worker_number(logs_of(recipe)) as number, Screen(sys.stderr, quiet=quiet) as screen:
        work = partial(_started, screen=screen, number=number, alone=worker)
        outcome = run_stages(recipe, plan, names, Here(screen=screen, work=work))
    spent = clock.seconds()
    spent["other"] -= sum(
        sum(entry["clock"].values()) for entry in outcome["stages"].values() if "clock" in entry
    )
    return outcome | {"clock": {name: round(seconds, 3) for name, seconds in spent.items()}}


def run_stages(recipe: Recipe, plan: Plan, names: tuple[str, ...], here: Here) -> dict[str, Any]:
    """Do what is to do in these rooms, after `first_plan` and `prepare`, and report."""
    run_dir, store = Path(recipe.run.dir), Store.open(recipe.storage.dir)
    done: dict[str, dict[str, Any]] = {}
    pace = Pace(run_dir)
    screen = here.screen
    if plan.warning:
        screen.say(plan.warning)
    chosen = _lines(plan, names)
    screen.plan(plan.stages, chosen=chosen, expected=pace.expected(plan.stages))
    for note in plan.notes:
        if note != plan.warning:
            screen.say(note)
    for name in chosen:
        line = plan.line(name)
        _refuse_waiting(plan, line)
        if line.state == "done":
            done[name] = _cached(line)
            screen.cached(name)
            continue
        began = time.monotonic()
        for snapshot in (*plan.snapshots.values(), *plan.partners.values(), plan.features):
            if snapshot is not None:
                save_snapshot(store, snapshot)
        screen.begin(name)
        answer = here.work(recipe, plan, name)
        plan = plan_again(recipe, plan, name)
        line = plan.line(name)
        done[name] = _finish(line, answer, seconds=time.monotonic() - began)
        pace.keep(name, rows=answer["rows"], clock=done[name]["clock"])
        screen.plan(plan.stages, chosen=chosen, expected=pace.expected(plan.stages))
        screen.end(name, seconds=done[name]["seconds"])
        if answer["left"]:
            screen.say(_left(line))
            if line.state != "done":
                break
    if _is_done(plan, "train"):
        LocalFiles(run_dir).point(LATEST, plan.train_dirs["student"].name)
    write_student_cards(plan.train_dirs.values())
    results = _results(plan)
    if results and "evaluate" in names:
        write_report(run_dir, plan.train_dirs["student"], facts(recipe, plan, done, pace))
    advice = [one.json() for one in advice_of(recipe, plan)]
    return {"run_dir": str(run_dir), "stages": done, "results": results, "advice": advice}


def first_plan(
    recipe: Recipe, names: tuple[str, ...], *, look: Callable[[Plan], Iterable[str]]
) -> Plan:
    """The plan; what it refuses is refused before anything is made, in store or run folder.

    Args:
        recipe: The recipe.
        names: Rooms whose stages are asked for.
        look: Says what people should know of the plan beside its own notes, or refuses it.

    Raises:
        UsageError: a stage that is asked for cannot be done here.
    """
    plan = make_plan(recipe, write=True)
    plan.note(*look(plan))
    left = [line for name in _lines(plan, names) if (line := plan.line(name)).state != "done"]
    for line in left[:1]:
        _refuse_waiting(plan, line)
    for line in left:
        refuse_impossible(plan, line)
    return plan


def _lines(plan: Plan, names: tuple[str, ...]) -> list[str]:
    """The lines of the plan that were asked for."""
    found = [line.name for line in plan.stages if stage_named(line.name).room in names]
    if not found and len(names) == 1:
        raise UsageError(
            f"--only {names[0]}: this recipe has no such stage. It has "
            f"{', '.join(line.name for line in plan.stages)}."
        )
    return found


def _chosen(until: str | None, only: str | None) -> tuple[str, ...]:
    for name in (until, only):
        if name is not None and name not in ROOMS:
            raise UsageError(f"no stage {name!r}. The stages are {', '.join(ROOMS)}.")
    if only is not None and until is not None:
        raise UsageError("--only and --until: give one of them.")
    if only is not None:
        return (only,)
    return ROOMS[: ROOMS.index(until) + 1] if until else ROOMS


def logs_of(recipe: Recipe) -> Path:
    """Where the logs of its run are."""
    return Path(recipe.run.dir) / LOGS


def _refuse_waiting(plan: Plan, line: StagePlan) -> None:
    if line.state == "waits":
        raise UsageError(f"{line.name}: waits {line.why}. Run the stages before it first.")
    refuse_impossible(plan, line)
    if line.name == "generate" and plan.stages[0].state != "done":
        raise UsageError(
            "generate: waits for the prompts, which are not all in the store. Run `--only data` "
            "first."
        )


def prepare(recipe: Recipe, plan: Plan) -> None:
    """Make store and run folder, where they are not there, and write down what the plan resolved.

    Raises:
        StillroomError: one of them cannot be written; neither was made then.
    """
    made: list[Path] = []
    try:
        _make_logs(recipe, made)
        store = Store.open(recipe.storage.dir, create=True)
    except StillroomError:
        for folder in made:
            with suppress(OSError):  # it was never made, or somebody else works there
                folder.rmdir()
        raise
    FileHashes(recipe.storage.dir, remember=True).keep()
    for identity in (*(one.bound.teacher for one in plan.teachers), plan.bound.author):
        if identity is not None:
            store.put_teacher(identity.id, kept_files(identity))
    if plan.bound.published is None:  # else the published folder says so itself
        for one in plan.teachers:
            write_down(one.recipe, one.bound.binding)


def _make_logs(recipe: Recipe, made: list[Path]) -> None:
    """`made` is told the folders that were not there, the innermost first."""
    logs = logs_of(recipe)
    try:
        made += [folder for folder in (logs, *logs.parents) if not folder.exists()]
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = (
            f"run.dir: {recipe.run.dir} cannot be written ({error.strerror}). Name another folder."
        )
        a_file = isinstance(error, NotADirectoryError | FileExistsError)
        other = (UsageError if a_file else StillroomError)(why)
        raise name_too_long(error, recipe.run.dir) or other from error


def _workers(recipe: Recipe, plan: Plan, *, alone: bool) -> Iterable[str]:
    return () if alone else worker_notes(recipe, plan)


def _started(
    recipe: Recipe, plan: Plan, name: str, *, screen: Screen, number: int, alone: bool
) -> dict[str, Any]:
    """The answer of a stage's processes.

    The `number` is the runner's; `alone` lets it start one, whatever is here.
    """
    message, asked = stage_message(recipe, plan, name), asked_recipe(recipe, plan, name)
    alone = alone or why_alone(recipe, plan, name) is not None
    first, *more = [{}] if alone else environments(asked, plan.line(name))
    with ExitStack() as numbers:
        posts = [post(recipe, name, first, number=number)]
        for environment in more:
            another = numbers.enter_context(worker_number(logs_of(recipe)))
            posts.append(post(recipe, name, environment, number=another))
        run_dir, stage = Path(recipe.run.dir), stage_named(name)
        if stage.meets and len(posts) > 1:
            training = plan.train_dirs[stage.arm or "student"]
            ranks = RankedCrew(message, posts, run_dir=run_dir, screen=screen, training=training)
            try:
                return ranks.finish()
            except NotTogether as error:
                if recipe.compute.processes != "auto":
                    raise
                # The recipe asks for no number, and the loaded student alone tells this one.
                LocalFiles(training).replace(ALONE, str(error).encode())
                screen.say(f"{name}: one process does it alone. {error}")
                posts = [post(recipe, name, {}, number=number)]
        return Crew(message, posts, run_dir=run_dir, screen=screen).finish()


def _finish(line: StagePlan, answer: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    """What a stage did, after its line was planned again."""
    partial = answer["left"] > 0
    if line.state == "to do" and not partial:
        raise StillroomError(
            f"{line.name}: ended with {counted(line.pending, 'row')} still to do. Run the same "
            "command to go on."
        )
    if stage_named(line.name).loads and line.committed == 0 and not partial:
        raise StillroomError(
            f"{line.name}: {all_were(line.planned, 'row')} rejected ({line.why}). See `rejects` in "
            "the store."
        )
    return {
        "rows": answer["rows"],
        "tokens": answer["tokens"],
        "seconds": round(seconds, 2),
        "state": "partial" if partial else "done",
        "clock": answer["details"]["clock"],
    } | _lengths(line)


def _left(line: StagePlan) -> str:
    """What to say of a stage whose budget was spent before its rows were."""
    left = some_are(line.pending, line.planned, "row")
    said = f"{line.name}: stopped by its budget, {left} left"
    if line.state == "done":
        return f"{said}; the run goes on with the others (generate.accept_partial)"
    return (
        f"{said}; `stillroom plan` says what they cost. Raise generate.max_usd or "
        "generate.max_tokens_total and run again, or set generate.accept_partial: true to go on "
        "with what is there"
    )


def _cached(line: StagePlan) -> dict[str, Any]:
    found = {"rows": line.committed, "tokens": line.tokens, "seconds": 0.0, "state": "cached"}
    return found | _lengths(line)


def _lengths(line: StagePlan) -> dict[str, Any]:
    """Of the data: how many rows and tokens were cut and rejected for their length."""
    return {"lengths": line.lengths} if line.lengths else {}


def _is_done(plan: Plan, name: str) -> bool:
    line = plan.stage(name)
    return line is not None and line.state == "done"


def _results(plan: Plan) -> dict[str, Any]:
    if not _is_done(plan, "evaluate"):
        return {}
    record = plan.train_dirs["student"] / EVALUATED
    with as_a_run_writes(record):
        results = mapping(read_record(record)["results"])
        results_table(results)  # what cannot be drawn is refused before it is handed on
        return results
