"""What stands in the store and the run folder, stage by stage: tables for people, facts for the report."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ..stages.sections import Recipe
from ..stages.writing import versions
from ..storage.commits import Commit
from ..storage.schema import TableName
from ..storage.store import Store
from ..storage.verify import Report
from .plan import Plan
from .progress import duration, human

_TABLE_OF: dict[str, TableName] = {"data": "prompts", "generate": "generations", "score": "soft_targets"}
_TRAINED = {"train": "student", "baseline": "baseline"}


def stage_facts(recipe: Recipe, plan: Plan) -> dict[str, dict[str, Any]]:
    """Per stage: its books (this recipe's rows) and what its table costs (the whole store's)."""
    store = Store.open(recipe.storage.dir) if (Path(recipe.storage.dir) / "STORE.json").is_file() else None
    found = {}
    for line in plan.stages:
        entry: dict[str, Any] = {
            "state": line.state,
            "rows": line.committed,
            "rejected": line.rejected,
            "pending": line.pending,
            "tokens": line.tokens,
            "why": line.why,
        }
        if store is not None and line.name in _TABLE_OF:
            commits = [c for c in store.commits(_TABLE_OF[line.name]) if c.stage == line.name]
            entry |= _costs(commits)
        elif line.state == "done" and line.name in _TRAINED:
            folder = plan.train_dirs["baseline" if line.name == "baseline" else "student"]
            entry["seconds"] = json.loads((folder / "train.json").read_text())["seconds"]
        elif line.state == "done" and line.name == "evaluate":
            record = json.loads((plan.train_dirs["student"] / "evaluation.json").read_text())
            entry |= {"seconds": record["seconds"], "tokens": record["measured_on"]["tokens"]}
        seconds = entry.get("seconds") or 0.0
        work = entry.pop("table_tokens", entry["tokens"])
        entry["tokens_per_second"] = round(work / seconds, 1) if seconds and work else None
        found[line.name] = entry
    return found


def _costs(commits: list[Commit]) -> dict[str, Any]:
    tokens, size = sum(c.tokens for c in commits), sum(c.shard.bytes for c in commits)
    return {
        "table_tokens": tokens,
        "bytes": size,
        "bytes_per_token": round(size / tokens, 2) if tokens else None,
        "seconds": round(sum(c.seconds for c in commits), 2),
    }


def facts(recipe: Recipe, plan: Plan, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the report says about the run besides its results."""
    stages = stage_facts(recipe, plan)
    for name, entry in done.items():
        if entry["state"] == "done":
            stages[name]["seconds_this_run"] = entry["seconds"]
    return {
        "store": recipe.storage.dir,
        "stages": stages,
        "rejects": {name: entry["why"] for name, entry in stages.items() if entry["rejected"]},
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def plan_table(plan: Plan) -> Table:
    """The plan for people; tokens and bytes are those still to do."""
    table = Table("stage", "state", box=None, pad_edge=False)
    for name in ("planned", "done", "rejected", "to do", "tokens", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("why")
    for s in plan.stages:
        counts = [str(c) if c else "-" for c in (s.planned, s.committed, s.rejected, s.pending)]
        sizes = [human(c) if c else "-" for c in (s.tokens_to_do, s.bytes_to_do)]
        table.add_row(s.name, s.state, *counts, *sizes, s.why)
    return table


def status_table(stages: dict[str, dict[str, Any]]) -> Table:
    """The status for people."""
    table = Table("stage", "state", box=None, pad_edge=False)
    for name in ("rows", "rejected", "pending", "tokens", "bytes/token", "tokens/s", "wall"):
        table.add_column(name, justify="right")
    for name, s in stages.items():
        table.add_row(
            name,
            s["state"],
            *(str(s[c]) if s[c] else "-" for c in ("rows", "rejected", "pending")),
            human(s["tokens"]) if s["tokens"] else "-",
            f"{s['bytes_per_token']:.1f}" if s.get("bytes_per_token") else "-",
            human(s["tokens_per_second"]) if s["tokens_per_second"] else "-",
            duration(s["seconds"]) if s.get("seconds") else "-",
        )
    return table


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "teacher_id": plan.bound.binding.teacher_id,
        "stages": {
            s.name: {
                "state": s.state,
                "planned": s.planned,
                "committed": s.committed,
                "rejected": s.rejected,
                "pending": s.pending,
                "tokens": s.tokens,
                "tokens_to_do": s.tokens_to_do,
                "bytes_to_do": s.bytes_to_do,
                "why": s.why,
            }
            for s in plan.stages
        },
    }


def verify_lines(report: Report) -> list[str]:
    """What `verify` found, for people."""
    tables = [(name, t) for name, t in report.tables.items() if t.shards]
    lines = [f"{name:<13} {t.rows} rows in {t.shards} shards, {human(t.bytes)}B" for name, t in tables]
    lines += [f"note: {note}" for note in report.notes]
    for p in report.problems:
        where = [p.file, p.column and f"column {p.column}", None if p.row_group is None else f"row group {p.row_group}"]
        lines.append(f"PROBLEM {', '.join(w for w in where if w)}: {p.message}")
    lines.append("the store is whole" if report.ok else f"{len(report.problems)} problems")
    return lines


def verify_json(report: Report) -> dict[str, Any]:
    """What `verify` found, for programs."""
    return {
        "ok": report.ok,
        "tables": {name: asdict(table) for name, table in report.tables.items()},
        "problems": [asdict(problem) for problem in report.problems],
        "notes": report.notes,
    }
