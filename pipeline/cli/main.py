"""The command line.

Every command imports what it needs when it needs it, so that help and errors answer at once.
"""

import json
import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from ...storage.credentials import as_written
from ...storage.errors import StillroomError, name_too_long
from ...storage.store.stopping import at_work, stop_signals, stopped_by
from ..printing.text import show_line, show_text
from . import doctor, import_table, launch, publish, store
from .app import (
    AllowCode,
    AsJson,
    Overrides,
    Quiet,
    RecipePath,
    app,
    print_for_people,
    print_json,
)
from .streams import outlive_terminal


def main() -> None:
    """Entry point: runs a command; a mistake of the user's is a message, never a traceback."""
    outlive_terminal()
    with _signals_raised():
        try:
            app()
        except StillroomError as error:
            _hear_nothing()
            _fail(error)
        except _SignalCame as came:
            _fail(stopped_by(came.number))
        except OSError as error:
            too_long = name_too_long(error, "a file or folder")
            if too_long is None:
                raise
            _hear_nothing()
            _fail(too_long)


class _SignalCame(BaseException):
    """A signal came: like KeyboardInterrupt it is no `Exception`.

    So no handler on the way takes it for a failure. Typer hides KeyboardInterrupt itself.
    """

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _signals_raised() -> Iterator[None]:
    """For the time of a command; while a stage runs, `run/process.py` has handlers of its own.

    A command that failed or was stopped hears none to the end of its process, so that a second
    signal does not change its exit code.
    """
    before = {number: signal.signal(number, _raise) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == _raise:
                signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _hear_nothing()  # another signal must not end the ending
    raise _SignalCame(number)


def _hear_nothing() -> None:
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def _fail(error: StillroomError, *, at_once: bool = False) -> NoReturn:
    show_text(f"{_error_text(error)}\n", sys.stderr)
    print_json({"error": str(error), "exit_code": error.exit_code}, "--json" in sys.argv)
    if at_once or at_work():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)
    sys.exit(error.exit_code)


def _error_text(error: StillroomError) -> str:
    """The message of an error.

    All lines but the first are indented, so that no name in it begins a line of its own.
    """
    lines = f"error: {error}".replace("\n", "\n  ").split("\n")
    if sys.stderr.isatty():  # which would break the lines inside words
        width = 80
        with suppress(OSError):  # it may hang up meanwhile
            width = os.get_terminal_size(sys.stderr.fileno()).columns or width
        lines = [
            textwrap.fill(
                line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
            for line in lines
        ]
    return "\n".join(lines)


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Option("--dir", help="Where the demo keeps everything.")
    ] = Path("stillroom-demo"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run everything on a laptop CPU in minutes.

    It needs no network and no downloads; the teacher is made on the spot.
    """
    from ...stages.recipe.load import load_recipe
    from ...stages.recipe.run_folder import REPORT_PAGE
    from ..demo import make_demo
    from ..run.progress import StageProgress
    from ..run.runner import run as run_recipe

    progress = StageProgress("teacher", sys.stderr, quiet=quiet)
    recipe_path = make_demo(directory, progress)
    progress.finish()
    recipe = load_recipe(recipe_path)
    outcome = run_recipe(recipe, quiet=quiet)
    _outcome(outcome)
    print_for_people(f"store:  {as_written(recipe.storage.dir)}")
    print_for_people(f"report: {outcome['run_dir']}/{REPORT_PAGE}")
    print_for_people(f"recipe: {recipe_path}")
    print_json(outcome, as_json)


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="File to write.")] = Path(
        "recipe.yaml"
    ),
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe to start from."""
    from importlib.resources import files

    from ...storage.errors import UsageError

    if recipe.exists():
        raise UsageError(f"{recipe}: exists already. Name another file, or move it away.")
    try:
        recipe.write_text(files("stillroom.pipeline.recipes").joinpath("template.yaml").read_text())
    except OSError as error:
        raise UsageError(
            f"{recipe}: cannot be written ({error.strerror}). Name another file."
        ) from error
    print_for_people(
        f"wrote {recipe}. Name your teacher, student and data in it, then: stillroom plan {recipe}"
    )
    print_json({"recipe": str(recipe)}, as_json)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """What would run, what is cached, what is stale and why. Writes nothing."""
    from ...stages.models.students.factory_file import refuse_code
    from ...stages.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    refuse_code(loaded, allowed=allow_code)
    from ..plan.endpoint import price
    from ..plan.plan import make_plan, refuse_impossible
    from ..run.advised import advice_of
    from ..run.posts import worker_notes
    from ..run.status import plan_json, plan_table

    made = make_plan(loaded)
    made.note(*worker_notes(loaded, made))
    if made.warning:
        print_for_people(made.warning)
    print_for_people(plan_table(made))
    for note in made.notes:
        if note != made.warning:
            print_for_people(note)
    if said := price(made):
        print_for_people(said)
    advice = [one.json() for one in advice_of(loaded, made)]
    _advise(advice)
    for line in made.stages:
        refuse_impossible(made, line)  # as `run` would
    print_json(plan_json(made) | {"advice": advice}, as_json)


@app.command()
def run(
    recipe: RecipePath,
    until: Annotated[str | None, typer.Option(help="Last stage to run.")] = None,
    only: Annotated[str | None, typer.Option(help="The one stage to run.")] = None,
    overrides: Overrides = None,
    worker: Annotated[
        bool,
        typer.Option(
            "--worker",
            help="Be one worker of many, with the devices that are visible; start no others.",
        ),
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Do what the plan says. Run it again to go on after a stop; what is done is not done twice."""
    from ...stages.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from ..run.runner import run as run_recipe

    outcome = run_recipe(
        loaded, until=until, only=only, quiet=quiet, allow_code=allow_code, worker=worker
    )
    _outcome(outcome)
    if loaded.student is None:
        print_for_people(f"store: {as_written(loaded.storage.dir)}")
    for line in _made(outcome):
        print_for_people(line)
    print_json(outcome, as_json)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """One rank of stage two, under torchrun or srun; alone where nobody has launched it.

    Trains the students from what is stored, and judges them. On one machine `run` starts the ranks
    itself.
    """
    from ...stages.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from ...stages.workers.ranks import Ranks
    from ..run.rank import SaidElsewhere
    from ..run.rank import train as run_rank

    try:
        outcome = run_rank(loaded, quiet=quiet, allow_code=allow_code)
    except SaidElsewhere as error:
        os._exit(error.exit_code)
    except StillroomError as error:
        if Ranks.here().count == 1:
            raise
        _hear_nothing()
        _fail(error, at_once=True)  # a thread may wait in torch for a rank that is gone
    if outcome is not None:
        _outcome(outcome)
        for line in _made(outcome):
            print_for_people(line)
        print_json(outcome, as_json)


@app.command()
def status(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Per stage: rows done, rejected and pending, tokens, bytes/token, tokens/s, wall time."""
    from ...stages.recipe.load import load_recipe
    from ...stages.recipe.run_folder import LOGS
    from ...stages.workers.locks import workers_at_work

    loaded = load_recipe(recipe, overrides)
    from ..plan.plan import make_plan
    from ..run.advised import advice_of
    from ..run.status import stage_facts, status_tables

    made = make_plan(loaded)
    stages = stage_facts(loaded, made)
    print_for_people(status_tables(stages))
    workers = workers_at_work(Path(loaded.run.dir) / LOGS)
    made.note(*([f"at work in {loaded.run.dir} now: {workers}"] if workers else []))
    for note in made.notes:
        print_for_people(note)
    advice = [one.json() for one in advice_of(loaded, made, stages)]
    _advise(advice)
    found = {"notes": [*made.notes], "workers": workers, "stages": stages, "advice": advice}
    print_json(found, as_json)


@app.command()
def report(
    run_dirs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN_DIR...", help="Run folders; several are compared."),
    ] = None,
    teachers: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="In place of runs: the teachers of a store."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the page [RUN_DIR/report.html; of several runs comparison.html, here]."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The report of a run as Markdown, and as an HTML page to open from disk.

    Several runs stand side by side, those that differ in the seed only as one. --teachers lays the
    teachers of a store side by side: kept mass, entropy, and the KL between two on the same texts.
    """
    text, page, found = _reported(run_dirs or [], teachers, out)
    show_text(text)
    show_line(f"page: {page}", sys.stderr)
    print_json(found, as_json)


def _reported(
    run_dirs: list[Path], teachers: str | None, out: Path | None
) -> tuple[str, Path, dict[str, Any]]:
    """Of runs, or of the teachers of a store."""
    from ...storage.errors import UsageError

    if bool(run_dirs) == (teachers is not None):
        raise UsageError("report: name run folders, or --teachers STORE, not both or neither.")
    if teachers is not None:
        from ..report.stored.teachers_page import show as show_teachers

        return show_teachers(teachers, out)
    from ..report.report import show

    return show(run_dirs, out)


@app.command()
def schema() -> None:
    """JSON Schema of the recipe, for editors."""
    from ...stages.recipe.sections import Recipe

    show_text(json.dumps(Recipe.model_json_schema(), indent=2) + "\n")


app.command()(launch.launch)
app.command()(publish.export)
app.command()(publish.publish)
app.command("import")(import_table.import_)
app.command()(store.inspect)
app.command()(store.query)
app.command()(store.verify)
app.command()(store.repair)
app.command()(store.vacuum)
app.command()(doctor.doctor)


def _outcome(outcome: dict[str, Any]) -> None:
    if outcome["results"]:
        from ..report.report import results_table

        print_for_people(results_table(outcome["results"]))
    _advise(outcome["advice"])


def _advise(found: list[dict[str, str]]) -> None:
    """What the numbers ask for, a line each."""
    from ..advice.table import Advice

    for one in found:
        print_for_people(Advice(**one).line())


def _made(outcome: dict[str, Any]) -> list[str]:
    """Where the page and the student are that the stages of this run made, or found made."""
    from ...stages.recipe.run_folder import LATEST, REPORT_PAGE, STUDENT

    places = {"evaluate": ("report", REPORT_PAGE), "train": ("student", f"{LATEST}/{STUDENT}")}
    found = [
        (name, Path(outcome["run_dir"]) / file)
        for stage, (name, file) in places.items()
        if stage in outcome["stages"]
    ]
    return [f"{name}: {path}" for name, path in found if path.exists()]
