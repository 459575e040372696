"""The command line. Every command imports what it needs when it needs it, so that help and errors answer at once."""

import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from ...storage.errors import StillroomError, Stopped
from . import import_table as import_cli
from . import publish as publish_cli

app = typer.Typer(
    name="stillroom",
    help="Offline soft-label distillation: run the teacher once, train any number of students from disk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL of the store.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a field: section.key=value. Repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def main() -> None:
    """Entry point: runs a command; a mistake of the user's is a message, never a traceback."""
    try:
        with _signals_raised():
            app()
    except StillroomError as error:
        _fail(error)
    except _SignalCame:
        _fail(Stopped())


class _SignalCame(BaseException):
    """Like KeyboardInterrupt no `Exception`, so no handler on the way takes it for a failure; Typer hides that one."""


@contextmanager
def _signals_raised() -> Iterator[None]:
    """For the time of a command; while a stage runs, `run/process.py` has handlers of its own."""
    before = {number: signal.signal(number, _raise) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise _SignalCame


def _fail(error: StillroomError) -> NoReturn:
    text = f"error: {error}"
    if sys.stderr.isatty():  # which would break the lines inside words
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        text = "\n".join(
            textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")
        )
    sys.stderr.write(f"{text}\n")
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": str(error), "exit_code": error.exit_code}) + "\n")
    sys.exit(error.exit_code)


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where the demo keeps everything.")] = Path("stillroom-demo"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Everything on a laptop CPU in minutes: no network, no downloads, a teacher made on the spot."""
    from ...stages.recipe.load import load_recipe
    from ..demo import make_demo
    from ..run.progress import StageProgress
    from ..run.runner import run as run_recipe

    progress = StageProgress("teacher", sys.stderr, quiet=quiet)
    recipe_path = make_demo(directory, progress)
    progress.finish()
    recipe = load_recipe(recipe_path)
    outcome = run_recipe(recipe, quiet=quiet)
    _outcome(outcome, as_json)
    _print(f"store:  {recipe.storage.dir}\nreport: {outcome['run_dir']}/report.html\nrecipe: {recipe_path}")
    _json(outcome, as_json)


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="File to write.")] = Path("recipe.yaml"),
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
        raise UsageError(f"{recipe}: cannot be written ({error.strerror}). Name another file.") from error
    _print(f"wrote {recipe}. Name your teacher, student and data in it, then: stillroom plan {recipe}")
    _json({"recipe": str(recipe)}, as_json)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """What would run, what is cached, what is stale and why. Writes nothing."""
    from ...stages.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from ..plan.plan import make_plan, refuse_impossible
    from ..run.status import plan_json, plan_table

    made = make_plan(loaded)
    _print(plan_table(made))
    for line in made.stages:
        refuse_impossible(made, line)  # as `run` would
    _json(plan_json(made), as_json)


@app.command()
def run(
    recipe: RecipePath,
    until: Annotated[str | None, typer.Option(help="Last stage to run.")] = None,
    only: Annotated[str | None, typer.Option(help="The one stage to run.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Do what the plan says. Run it again to go on after a stop; what is done is not done twice."""
    from ...stages.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from ..run.runner import run as run_recipe

    outcome = run_recipe(loaded, until=until, only=only, quiet=quiet)
    _outcome(outcome, as_json)
    for line in _made(outcome):
        _print(line)
    _json(outcome, as_json)


@app.command()
def status(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Per stage: rows done, rejected and pending, tokens, bytes/token, tokens/s, wall time."""
    from ...stages.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from ..plan.plan import make_plan
    from ..run.status import stage_facts, status_tables

    stages = stage_facts(loaded, make_plan(loaded))
    _print(status_tables(stages))
    _json({"stages": stages}, as_json)


@app.command()
def inspect(
    place: Annotated[str, typer.Argument(metavar="STORE|RUN_DIR", help="Store (folder or URL), or a run's folder.")],
    key: Annotated[
        str | None, typer.Option(help="Key of a row in hex, or its unique beginning; default the first row.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One sample, token by token: the teacher's top entries, the tail; of a run, where its student differs."""
    from rich.console import Console

    from ..report.inspect import show

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    console = Console()
    colours = sys.stdout.isatty() and console.color_system is not None and not console.no_color
    sample, parts = show(place, key, columns=columns, colours=colours)
    for part in parts:
        _print(part, columns=80)
    _json(sample, as_json)


@app.command()
def query(
    store: StorePath, sql: Annotated[str, typer.Argument(help="A SELECT over the views.")], as_json: AsJson = False
) -> None:
    """DuckDB over the store: prompts, generations, soft_targets, rejects, commits, inputs."""
    from ...storage.store.sql import query as run_query
    from ...storage.store.store import Store

    found = run_query(Store.open(store), sql)
    from rich.table import Table

    from ..numbers import printable

    table = Table(*found.column_names, box=None, pad_edge=False)
    for row in found.slice(0, 100).to_pylist():
        table.add_row(*(printable(_cell(v)) for v in row.values()))
    _print(table)
    if found.num_rows > 100:
        _print(f"({found.num_rows} rows; the first 100 are shown)")
    _json({"rows": json.loads(json.dumps(found.to_pylist(), default=_cell))}, as_json)


@app.command()
def verify(
    store: StorePath,
    deep: Annotated[bool, typer.Option("--deep", help="Then let the teacher read a sample of rows again.")] = False,
    teacher: Annotated[str | None, typer.Option(help="deep: the teacher, a folder or Hub id.")] = None,
    revision: Annotated[str | None, typer.Option(help="deep: its Hub revision.")] = None,
    dtype: Annotated[str | None, typer.Option(help="deep: its dtype; default: as the store's teacher had it.")] = None,
    adapter: Annotated[str | None, typer.Option(help="deep: folder of its LoRA adapter.")] = None,
    device_map: Annotated[str | None, typer.Option(help="deep: `auto` spreads it over all GPUs.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="deep: how many rows, over shards and kinds [32].")] = None,
    seed: Annotated[int | None, typer.Option(help="deep: which rows [0].")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove a store: every record, every byte of every shard, every row. Exit code 3 if anything is wrong.

    Damage is named to file, column and row group. A note is a file that no record names: it holds no rows.

    --deep --teacher MODEL finds what no checksum can: targets that are not what this teacher says of these tokens. It
    reads each chosen row twice, to see how far two readings differ, and writes nothing.
    """
    from ...storage.integrity.verify import verify as verify_store
    from ...storage.store.store import Store
    from .upkeep import verify_json, verify_lines

    opened = Store.open(store)
    asked = None
    given = {"revision": revision, "dtype": dtype, "adapter": adapter, "device_map": device_map}
    how = {name: value for name, value in (given | {"rows": rows, "seed": seed}).items() if value is not None}
    if deep or teacher is not None or how:
        from .deep_verify import deep_json, deep_lines, deep_verify, deeply, find_teacher

        asked = deeply(teacher if deep else None, **how)
        identity = find_teacher(opened, asked)
    report = verify_store(opened)
    for line in verify_lines(report):
        _print(line)
    outcome, ok = verify_json(report), report.ok
    if asked is not None:
        from ..run.progress import StageProgress

        damaged = {problem.file for problem in report.problems if problem.mend}
        found = deep_verify(opened, identity, asked, progress=StageProgress("verify", sys.stderr), damaged=damaged)
        for line in deep_lines(found):
            _print(line)
        ok = ok and found.ok
        outcome |= {"ok": ok, "deep": deep_json(found)}
    _json(outcome, as_json)
    if not ok:
        raise typer.Exit(3)


@app.command()
def repair(
    store: StorePath,
    retry_rejects: Annotated[
        str | None,
        typer.Option(metavar="REASON[,REASON]", help="Also try rejects with these reasons again: engine, too_long ..."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Withdraw what is damaged, so that the next run makes exactly that again. Exit code 3 if something is left.

    Reads the whole store, as verify does. Commits with a damaged, missing or forged record or shard are withdrawn;
    their files stay until vacuum. Damaged records of inputs, teachers, bindings and snapshots are deleted. Safe while
    others write, and any number of times.
    """
    from ...storage.integrity.repair import repair as repair_store
    from ...storage.store.store import Store
    from .upkeep import repair_json, repair_lines

    reasons = _words(retry_rejects)
    done = repair_store(Store.open(store), retry=reasons)
    for line in repair_lines(done, retry=reasons):
        _print(line)
    _json(repair_json(done), as_json)
    if not done.ok:
        raise typer.Exit(3)


@app.command()
def vacuum(
    store: StorePath,
    older_than_hours: Annotated[
        float, typer.Option(min=0.0, help="Keep younger files, by the store's own clock: somebody may be writing them.")
    ] = 24.0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List what would go; remove nothing. (A file is written for a moment, to read the store's clock.)",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what no record and no snapshot names: temporary files, orphaned and withdrawn shards, old claims.

    What a live commit, a snapshot or an inputs record names is never touched.
    """
    from ...storage.integrity.vacuum import vacuum as vacuum_store
    from ...storage.store.store import Store
    from .upkeep import vacuum_json, vacuum_lines

    done = vacuum_store(Store.open(store), older_than_hours=older_than_hours, dry_run=dry_run)
    for line in vacuum_lines(done, dry_run=dry_run):
        _print(line)
    _json(vacuum_json(done, dry_run=dry_run), as_json)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None, typer.Option(help="File of the page [RUN_DIR/report.html; of several runs comparison.html, here].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The report of a run as Markdown, and as an HTML page to open from disk.

    Several runs stand side by side, those that differ in the seed only as one.
    """
    from ..report.show import show

    text, page, found = show(run_dirs, out)
    sys.stdout.write(text)
    sys.stderr.write(f"page: {page}\n")
    _json(found, as_json)


@app.command()
def schema() -> None:
    """JSON Schema of the recipe, for editors."""
    from ...stages.recipe.sections import Recipe

    sys.stdout.write(json.dumps(Recipe.model_json_schema(), indent=2) + "\n")


app.command()(publish_cli.export)
app.command()(publish_cli.publish)
app.command("import")(import_cli.import_)


def _outcome(outcome: dict[str, Any], as_json: bool) -> None:
    if outcome["results"]:
        from ..report.report import results_table

        _print(results_table(outcome["results"]))


def _made(outcome: dict[str, Any]) -> list[str]:
    """Where the page and the student are that the stages of this run made, or found made."""
    places = {"evaluate": ("report", "report.html"), "train": ("student", "latest/student")}
    found = [
        (name, Path(outcome["run_dir"]) / file) for stage, (name, file) in places.items() if stage in outcome["stages"]
    ]
    return [f"{name}: {path}" for name, path in found if path.exists()]


def _print(content: Any, *, columns: int = 400) -> None:
    """For people: standard output, above the JSON line; `columns` where that is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else columns
    Console(highlight=False, markup=False, soft_wrap=width == 400, width=width).print(content)


def _json(content: dict[str, Any], wanted: bool) -> None:
    if wanted:
        sys.stdout.write(json.dumps(content) + "\n")


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


if __name__ == "__main__":
    main()
