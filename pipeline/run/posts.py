"""What each worker of a stage has to itself: its log and its devices.

The plan also learns here what to say of how many workers there are.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...stages.ledger.books import SMALLEST_BLOCK
from ...stages.recipe.engines import gpus_of
from ...stages.recipe.run_folder import ALONE, LOGS
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import file_name, needed, stage_named
from ...stages.workers.devices import (
    THREADS,
    VISIBLE,
    cores,
    one_each,
    shared_out,
    threads_of,
    visible_gpus,
)
from ...storage.words import counted
from ..plan.lines import Plan, StagePlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Post:
    """What one worker has to itself, whichever process it is."""

    log: Path
    environment: Mapping[str, str]
    """What it is told beside the runner's own: its devices."""


def post(recipe: Recipe, name: str, environment: Mapping[str, str], *, number: int) -> Post:
    """Of the worker with this number in the run's folder."""
    file = file_name(name)
    log = f"{file}.log" if number == 1 else f"{file}.{number}.log"
    return Post(log=Path(recipe.run.dir) / LOGS / log, environment=environment)


def environments(recipe: Recipe, line: StagePlan) -> list[dict[str, str]]:
    """Of each process that a stage gets on this machine; one alone sees what the runner sees.

    Args:
        recipe: As the stage reads it: of several teachers with this one alone.
        line: What it has to do.

    Raises:
        UsageError: `compute` asks for more than the GPUs are enough for.
    """
    if stage_named(line.name).meets:
        return one_each(recipe.compute.processes, visible_gpus())
    # The process that asks an endpoint sends as many calls at once as there are to send.
    if stage_named(line.name).loads is None or _asks_an_endpoint(recipe, line):
        return [{}]
    # Nobody knows what a stage that waits will have to do.
    most = -(-line.pending // SMALLEST_BLOCK) if line.state == "to do" else None
    return shared_out(
        recipe.compute.workers, visible_gpus(), each=_gpus_each(recipe, line), most=most
    )


def why_alone(recipe: Recipe, plan: Plan, name: str) -> str | None:
    """Why one process does a stage that several had begun and cannot do; None: nothing is known."""
    arm = stage_named(name).arm
    folder = plan.train_dirs.get(arm) if arm else None
    if folder is None or recipe.compute.processes != "auto":
        return None
    said = folder / ALONE
    return said.read_text() if said.is_file() else None


def _asks_an_endpoint(recipe: Recipe, line: StagePlan) -> bool:
    writes = stage_named(line.name).loads == "author"
    return writes and recipe.generate is not None and recipe.generate.remote


def _gpus_each(recipe: Recipe, line: StagePlan) -> int | None:
    """GPUs that one worker needs; None: all that there are."""
    if stage_named(line.name).loads == "author":
        return gpus_of(getattr(recipe.generate, "engine_args", {}))
    if recipe.teacher.device_map is not None:
        return None
    return gpus_of(getattr(recipe.score, "engine_args", {}))


def worker_notes(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """A sentence for each stage that several processes are to do, or were asked to."""
    for line in plan.stages:
        if line.state == "done":
            continue
        if _asks_an_endpoint(recipe, line) and recipe.compute.workers not in ("auto", 1):
            calls = needed(recipe.generate, "generate").concurrency
            yield (
                f"{line.name}: one process asks the endpoint, {calls} calls at once "
                "(generate.concurrency)"
            )
        workers = environments(plan.teacher_of(line.name).recipe, line)
        if len(workers) > 1 and (why := why_alone(recipe, plan, line.name)):
            yield f"{line.name}: one process does it alone. {why}"
        elif len(workers) > 1:
            gpus = [one[VISIBLE] for one in workers if VISIBLE in one]
            on = f", on GPUs {' | '.join(gpus)}" if gpus else ""
            meets = stage_named(line.name).meets
            how = "processes together" if meets else "workers side by side"
            crowd = "" if gpus else _crowd(workers, "processes" if meets else "workers")
            yield f"{line.name}: {len(workers)} {how} on this machine{on}{crowd}"


def _crowd(workers: Sequence[Mapping[str, str]], setting: str) -> str:
    """What to say of more threads than there are cores; empty: each has its own."""
    threads, there = threads_of(workers), cores()
    if threads <= there:
        return ""
    several = len(workers) > there
    lower = [f"compute.{setting} to {there} or less"] if several else []
    own = os.environ.get(THREADS)  # the user has set it; else the cores are shared out
    if own is not None and not (several and own == "1"):
        lower.append(f"{THREADS} (now {own}) to {max(1, there // len(workers))}")
    return (
        f", with {counted(threads, 'thread')} on {counted(there, 'core')}: they wait for one "
        f"another. Set {' and '.join(lower)}"
    )
