"""What `verify`, `repair` and `vacuum` found and did, for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...storage.integrity.repair import Repaired
from ...storage.integrity.shards import Problem
from ...storage.integrity.vacuum import Vacuumed
from ...storage.integrity.verify import Report
from ..run.progress import human

_SHOWN = 20


def verify_lines(report: Report) -> list[str]:
    """What `verify` found, for people."""
    tables = [(name, t) for name, t in report.tables.items() if t.shards]
    lines = [f"{name:<13} {t.rows} rows in {t.shards} shards, {human(t.bytes)}B" for name, t in tables]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"PROBLEM {_problem(p)}" for p in report.problems]
    if report.ok:
        return [*lines, "the store is whole"]
    return [*lines, f"{_problems(report.problems)}. `stillroom repair` withdraws what is damaged; then run again."]


def verify_json(report: Report) -> dict[str, Any]:
    """What `verify` found, for programs."""
    return {
        "ok": report.ok,
        "tables": {name: asdict(table) for name, table in report.tables.items()},
        "problems": [asdict(problem) for problem in report.problems],
        "notes": report.notes,
    }


def repair_lines(done: Repaired, *, retry: Sequence[str] = ()) -> list[str]:
    """What `repair` did, for people; `retry`: reasons of rejects that were to be tried again."""
    lines = []
    for commit in done.withdrawn:
        rows = "an unknown number of rows" if commit.rows is None else f"{commit.rows} rows"
        lines.append(f"withdrawn {commit.record}, {rows}: {commit.reason}")
    lines += [f"removed   {name}: it is damaged; the next run makes it again" for name in done.removed]
    lines += [f"rewritten {name}: what it withdraws stays withdrawn" for name in done.rewritten]
    lines += [f"to be tried again: {count} rejects ({reason})" for reason, count in sorted(done.retried.items())]
    lines += [f"no rejects have the reason {reason}" for reason in retry if reason not in done.retried]
    lines += [f"LEFT      {_problem(problem)}" for problem in done.left]
    if done.left:
        lines.append(f"{_problems(done.left)} cannot be repaired: {_WHY_LEFT}")
    changed = done.withdrawn or done.removed or done.rewritten
    if changed:
        lines.append("run the recipe again: it makes what is missing")
    return lines if changed or done.left else [*lines, "nothing to repair"]


_WHY_LEFT = (
    "a snapshot whose shard is gone (delete its file under snapshots/ to give it up), "
    "or rows that are as they were committed but cannot be right."
)


def repair_json(done: Repaired) -> dict[str, Any]:
    """What `repair` did, for programs."""
    return {"ok": done.ok, **asdict(done)}


def vacuum_lines(done: Vacuumed, *, dry_run: bool) -> list[str]:
    """What `vacuum` removed, for people."""
    shown = [f"{name} ({size} bytes)" for name, size in done.files.items()]
    if not dry_run and len(shown) > _SHOWN:
        shown = [*shown[:_SHOWN], f"... and {len(shown) - _SHOWN} more"]
    what = "would be removed" if dry_run else "removed"
    lines = [*shown, f"{len(done.files)} files {what}, {human(done.bytes)}B"]
    if done.waiting:
        lines.append(f"{done.waiting} more files that nothing names are too young; see --older-than-hours")
    return lines


def vacuum_json(done: Vacuumed, *, dry_run: bool) -> dict[str, Any]:
    """What `vacuum` removed, for programs."""
    return {"dry_run": dry_run, "bytes": done.bytes, **asdict(done)}


def _problems(problems: Sequence[Problem]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"


def _problem(problem: Problem) -> str:
    where = [
        problem.file,
        problem.column and f"column {problem.column}",
        None if problem.row_group is None else f"row group {problem.row_group}",
    ]
    return f"{', '.join(part for part in where if part)}: {problem.message}"
