"""The commands on a store, and how their findings are printed.

They are inspect, query, verify, repair and vacuum.
"""

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...storage.words import counted
from ..printing.numbers import size
from ..printing.text import one_line
from .app import AsJson, StorePath, print_for_people, print_json, words

if TYPE_CHECKING:
    from ...storage.integrity.repair import Repaired
    from ...storage.integrity.shards import Problem
    from ...storage.integrity.vacuum import Vacuumed
    from ...storage.integrity.verify import Report

_SHOWN = 20

_WHY_LEFT = (
    "a snapshot whose shard is gone (delete its file under snapshots/ to give it up), "
    "or rows that are as they were committed but cannot be right (score their prompts again into "
    "another store)."
)


def inspect(
    place: Annotated[
        str,
        typer.Argument(metavar="STORE|RUN_DIR", help="Store (folder or URL), or a run's folder."),
    ],
    key: Annotated[
        str | None,
        typer.Option(help="Key of a row in hex, or its unique beginning; default the first row."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show one sample, token by token: the teacher's top entries and the tail.

    Of a run it shows where its student differs.
    """
    from ..printing.console import Terminal
    from ..report.stored.inspect import show

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    console = Terminal()
    colours = sys.stdout.isatty() and console.color_system is not None and not console.no_color
    sample, parts = show(place, key, columns=columns, colours=colours)
    for part in parts:
        print_for_people(part, columns=80)
    print_json(sample, as_json)


def query(
    store: StorePath,
    sql: Annotated[str, typer.Argument(help="A SELECT over the views.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Ask the store with DuckDB.

    The views are prompts, generations, soft_targets, features, rejects, commits and inputs. A query
    may hold 2 GB in memory and 20 GB on disk; the environment variables STILLROOM_SQL_MEMORY and
    STILLROOM_SQL_DISK give it more or less.
    """
    from ...storage.store.sql import first_rows
    from ...storage.store.store import Store

    found, complete = first_rows(Store.open(store), sql, most=rows)
    from rich.table import Table

    # With an edge: no name and no value begins a line.
    table = Table(*map(one_line, found.column_names), box=None)
    shown = found.to_pylist()
    for row in shown:
        table.add_row(*(one_line(_cell(v)) for v in row.values()))
    print_for_people(table)
    if not shown:
        print_for_people("(no rows)")
    if not complete:
        print_for_people(f"(the first {counted(rows, 'row')}; there are more, see --rows)")
    rows_of_json = [{name: _json_value(value) for name, value in row.items()} for row in shown]
    content = {"rows": rows_of_json, "complete": complete}
    print_json(content, as_json)


def verify(
    store: StorePath,
    deep: Annotated[
        bool, typer.Option("--deep", help="Then let the teacher read a sample of rows again.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="deep: the teacher, a folder or Hub id.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="deep: its Hub revision.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="deep: its dtype; default: as the store's teacher had it.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="deep: folder of its LoRA adapter.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="deep: nf4 or int8, as the store's teacher had it.")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="deep: `auto` spreads it over all GPUs.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="deep: how many rows, over shards and kinds [32].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="deep: which rows [0].")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove a store: every record, every byte of every shard, every row.

    Exit code 3 if anything is wrong.

    Damage is named to file, column and row group. A note is a file that no record names: it holds
    no rows.

    --deep --teacher MODEL finds what no checksum can: targets that are not what this teacher says
    of these tokens. It reads each chosen row twice, to see how far two readings differ, and writes
    nothing.
    """
    from ...storage.integrity.verify import verify as verify_store
    from ...storage.store.store import Store

    opened = Store.open(store)
    asked = None
    given = {"revision": revision, "dtype": dtype, "adapter": adapter, "device_map": device_map}
    given["quantize"] = quantize
    how = {
        name: value
        for name, value in (given | {"rows": rows, "seed": seed}).items()
        if value is not None
    }
    if deep or teacher is not None or how:
        from .deep_verify import deep_json, deep_lines, deep_verify, deeply, find_teacher

        asked = deeply(teacher if deep else None, **how)
        identity = find_teacher(opened, asked)
    report = verify_store(opened)
    for line in verify_lines(report):
        print_for_people(line)
    outcome, ok = verify_json(report), report.ok
    if asked is not None:
        from ..run.progress import StageProgress

        damaged = {problem.file for problem in report.problems if problem.mend}
        found = deep_verify(
            opened, identity, asked, progress=StageProgress("verify", sys.stderr), damaged=damaged
        )
        for line in deep_lines(found):
            print_for_people(line)
        ok = ok and found.ok
        outcome |= {"ok": ok, "deep": deep_json(found)}
    print_json(outcome, as_json)
    if not ok:
        raise typer.Exit(3)


def repair(
    store: StorePath,
    retry_rejects: Annotated[
        str | None,
        typer.Option(
            metavar="REASON[,REASON]",
            help="Also try rejects with these reasons again: engine, too_long ...",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Withdraw what is damaged, so that the next run makes exactly that again.

    Exit code 3 if something is left.

    Reads the whole store, as verify does. Commits with a damaged, missing or forged record or shard
    are withdrawn; their files stay until vacuum. Damaged records of inputs, teachers, bindings,
    engines and snapshots are deleted. It is safe while others write, and any number of times.
    """
    from ...storage.integrity.repair import repair as repair_store
    from ...storage.store.store import Store

    reasons = words([retry_rejects or ""])
    done = repair_store(Store.open(store), retry=reasons)
    for line in repair_lines(done, retry=reasons):
        print_for_people(line)
    print_json(repair_json(done), as_json)
    if not done.ok:
        raise typer.Exit(3)


def vacuum(
    store: StorePath,
    older_than_hours: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Keep younger files, by the store's own clock: somebody may be writing them.",
        ),
    ] = 24.0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List what would go; remove nothing. (A file is written for a moment, to read the "
            "store's clock.)",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what no record and no snapshot names.

    That is temporary files, orphaned and withdrawn shards, and old claims.

    What a live commit, a snapshot or an inputs record names is never touched.
    """
    from ...storage.integrity.vacuum import vacuum as vacuum_store
    from ...storage.store.store import Store

    done = vacuum_store(Store.open(store), older_than_hours=older_than_hours, dry_run=dry_run)
    for line in vacuum_lines(done, dry_run=dry_run):
        print_for_people(line)
    print_json(vacuum_json(done, dry_run=dry_run), as_json)


def _json_value(value: Any) -> Any:
    """What JSON can hold: null for numbers that it has no words for, text for what is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _json_value(part) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # an interval is one value
        return str(value)
    if isinstance(value, list | tuple):
        return [_json_value(part) for part in value]
    return value if value is None or isinstance(value, str | int) else _cell(value)


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def verify_lines(report: "Report") -> list[str]:
    """What `verify` found, for people."""
    tables = [(name, t) for name, t in report.tables.items() if t.shards]
    lines = [
        f"{name:<13} {counted(t.rows, 'row')} in {counted(t.shards, 'shard')}, {size(t.bytes)}"
        for name, t in tables
    ]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"PROBLEM {_problem(p)}" for p in report.problems]
    if report.ok:
        return [*lines, "the store is whole"]
    count, left = len(report.problems), sum(not problem.mend for problem in report.problems)
    advice = []
    if left < count:
        advice.append("`stillroom repair` withdraws what is damaged; then run again.")
    if left:
        advice.append(f"{left} cannot be repaired: {_WHY_LEFT}")
    return [*lines, f"{_problems(report.problems)}. {' '.join(advice)}"]


def verify_json(report: "Report") -> dict[str, Any]:
    """What `verify` found, for programs."""
    return {
        "ok": report.ok,
        "tables": {name: asdict(table) for name, table in report.tables.items()},
        "problems": [asdict(problem) for problem in report.problems],
        "notes": report.notes,
    }


def repair_lines(done: "Repaired", *, retry: Sequence[str] = ()) -> list[str]:
    """What `repair` did, for people; `retry`: reasons of rejects that were to be tried again."""
    lines = []
    for commit in done.withdrawn:
        rows = "an unknown number of rows" if commit.rows is None else counted(commit.rows, "row")
        lines.append(f"withdrawn {commit.record}, {rows}: {commit.reason}")
    lines += [
        f"removed   {name}: it is damaged; the next run makes it again" for name in done.removed
    ]
    lines += [f"rewritten {name}: what it withdraws stays withdrawn" for name in done.rewritten]
    lines += [
        f"to be tried again: {counted(count, 'reject')} ({reason})"
        for reason, count in sorted(done.retried.items())
    ]
    lines += [
        f"no rejects have the reason {reason}" for reason in retry if reason not in done.retried
    ]
    lines += [f"LEFT      {_problem(problem)}" for problem in done.left]
    if done.left:
        lines.append(f"{_problems(done.left)} cannot be repaired: {_WHY_LEFT}")
    changed = done.withdrawn or done.removed or done.rewritten
    if changed:
        lines.append("run the recipe again: it makes what is missing")
    return lines if changed or done.left else [*lines, "nothing to repair"]


def repair_json(done: "Repaired") -> dict[str, Any]:
    """What `repair` did, for programs."""
    return {"ok": done.ok, **asdict(done)}


def vacuum_lines(done: "Vacuumed", *, dry_run: bool) -> list[str]:
    """What `vacuum` removed, for people."""
    shown = [f"  {name} ({size(octets)})" for name, octets in done.files.items()]
    if not dry_run and len(shown) > _SHOWN:
        shown = [*shown[:_SHOWN], f"  ... and {len(shown) - _SHOWN} more"]
    what = "would be removed" if dry_run else "removed"
    lines = [*shown, f"{counted(len(done.files), 'file')} {what}, {size(done.bytes)}"]
    if done.waiting:
        lines.append(
            f"too young: {counted(done.waiting, 'more file')} that nothing names; see "
            "--older-than-hours"
        )
    return lines


def vacuum_json(done: "Vacuumed", *, dry_run: bool) -> dict[str, Any]:
    """What `vacuum` removed, for programs."""
    return {"dry_run": dry_run, "bytes": done.bytes, **asdict(done)}


def _problems(problems: Sequence["Problem"]) -> str:
    return counted(len(problems), "problem")


def _problem(problem: "Problem") -> str:
    where = [
        problem.file,
        problem.column and f"column {problem.column}",
        None if problem.row_group is None else f"row group {problem.row_group}",
    ]
    return f"{', '.join(part for part in where if part)}: {problem.message}"
