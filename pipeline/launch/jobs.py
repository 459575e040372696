"""What a launcher starts: a run as three jobs, one after the other.

The second of them has many workers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...stages.models.students.factory_file import refuse_code
from ...stages.recipe.engines import gpus_of
from ...stages.recipe.load import load_recipe
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import stage_named
from ...storage.errors import UsageError
from ...storage.store.hashes import FileHashes
from ...storage.store.store import Store
from ..plan.lines import Plan
from ..plan.plan import make_plan, refuse_impossible

FOLDER = "launch"
"""In the run's folder: what a launcher writes, and what its jobs say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A recipe that is to be launched, as the command line names it."""

    path: Path
    recipe: Recipe
    plan: Plan
    overrides: Sequence[str] = ()
    allow_code: bool = False

    @property
    def given(self) -> tuple[str, ...]:
        """The words that every command of it has."""
        overrides = (word for one in self.overrides for word in ("--set", one))
        return (str(self.path.resolve()), *overrides, *(["--allow-code"] * self.allow_code))


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One command line, done by one process or by many alike."""

    name: Literal["prompts", "workers", "train"]
    words: tuple[str, ...]
    """Of the command line, after `stillroom`."""
    stages: tuple[str, ...] = field(default=())
    """The lines of the plan that it leaves done."""


def opened(
    path: Path,
    overrides: Sequence[str],
    *,
    allow_code: bool,
    refuse: Callable[[Recipe], None],
    write: bool = True,
) -> Launch:
    """A recipe with its plan; what no worker could do is refused before any is started.

    Args:
        path: The recipe.
        overrides: `section.key=value`.
        allow_code: Whether `student.factory` may run.
        refuse: Raises where the launcher cannot do it; asked before the plan is made.
        write: Whether models may be downloaded and hashes remembered, as `run` does first.

    Raises:
        UsageError: the recipe is wrong, or a stage of it cannot be done.
    """
    recipe = load_recipe(path, list(overrides))
    refuse_code(recipe, allowed=allow_code)
    refuse(recipe)
    plan = make_plan(recipe, write=write)
    for line in plan.stages:
        refuse_impossible(plan, line)
    return Launch(path=path, recipe=recipe, plan=plan, overrides=overrides, allow_code=allow_code)


def begin(recipe: Recipe) -> None:
    """Make its store, which remembers what the plan hashed; when nothing more can be refused."""
    Store.open(recipe.storage.dir, create=True)
    FileHashes(recipe.storage.dir, remember=True).keep()


def jobs(launch: Launch, *, training: tuple[str, ...]) -> list[Job]:
    """Those with work to do, in their order.

    The first one does what one process does: the prompts, and the text where an endpoint writes it,
    for its budget is that of one process.

    Args:
        launch: What is launched.
        training: The first word or words of the command that trains.
    """
    generate = launch.recipe.generate
    asks = generate is not None and generate.remote
    first = ("--until", "generate") if asks else ("--only", "data")
    alone = ("data", "generate") if asks else ("data",)
    rooms = {line.name: stage_named(line.name).room for line in launch.plan.stages}
    shared = [name for name, room in rooms.items() if room in ("generate", "score")]
    found = (
        Job(
            name="prompts",
            words=("run", *launch.given, *first),
            stages=tuple(name for name, room in rooms.items() if room in alone),
        ),
        Job(
            name="workers",
            words=("run", *launch.given, "--worker", "--until", "score"),
            stages=tuple(name for name in shared if rooms[name] not in alone),
        ),
        Job(
            name="train",
            words=(*training, *launch.given),
            stages=tuple(name for name, room in rooms.items() if room in ("train", "evaluate")),
        ),
    )
    done = {line.name for line in launch.plan.stages if line.state == "done"}
    return [job for job in found if not done.issuperset(job.stages)]


def unused(found: Sequence[Job], given: Mapping[str, object]) -> list[str]:
    """Options that were given and are of a job that is left out, each with why.

    Args:
        found: The jobs.
        given: What the command line says, by its options.
    """
    names = {job.name for job in found}
    of = {
        "--workers": ("workers", "there is nothing left that workers could share"),
        # 0 is no such case: it counts for the training too.
        "--gpus": ("workers", "there is nothing left that workers could share"),
        "--ranks": ("train", "there is nothing left to train"),
        "--nodes": ("train", "there is nothing left to train"),
    }
    return [
        f"{option}: not used, for {why}"
        for option, (job, why) in of.items()
        if given.get(option) and job not in names
    ]


def workers_asked(recipe: Recipe, workers: int | None) -> int | None:
    """How many workers stage one gets: as the command says, else the recipe; None: neither does."""
    if workers is not None:
        return workers
    return None if recipe.compute.workers == "auto" else recipe.compute.workers


def gpus_each(recipe: Recipe, gpus: int | None) -> int:
    """GPUs of one worker: as the command says, else what the engines' arguments need.

    Raises:
        UsageError: the recipe leaves it to the machine, or its engines need more than the command
            gives.
    """
    engines = [recipe.generate, recipe.score]
    needed = max(gpus_of(getattr(engine, "engine_args", {})) for engine in engines)
    if gpus is not None:
        if 0 < gpus < needed:
            raise UsageError(
                f"--gpus: {gpus}, but by engine_args an engine of a worker needs {needed}. Give "
                f"--gpus {needed}, or leave it out."
            )
        return gpus
    if recipe.teacher.device_map is not None:
        raise UsageError(
            "launch: teacher.device_map spreads the teacher over all GPUs that a worker sees, and "
            "nothing says how many those are to be. Give --gpus N."
        )
    return needed


def ranks_asked(recipe: Recipe, ranks: int | None) -> int | None:
    """Processes that train: as the command says, else the recipe; None: neither does."""
    if ranks is not None:
        return ranks
    return None if recipe.compute.processes == "auto" else recipe.compute.processes
