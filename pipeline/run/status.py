"""What stands in the store and the run folder, stage by stage.

There are tables for people, and facts for the report.
"""

import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from ...stages.recipe.run_folder import as_a_run_writes, read_record
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import stage_named
from ...stages.workers.shard_about import versions
from ...storage.bounds import integer, understood
from ...storage.credentials import all_shown, as_written
from ...storage.files.opening import open_files
from ...storage.store.commits import Commit
from ...storage.store.store import Store
from ...storage.tables.features import ERRORS
from ...storage.tables.kinds import STRUCTURES
from ...storage.tables.shard import ShardFile
from ...storage.words import counted
from ..plan.lines import Plan, equal_texts
from ..plan.teachers import teachers_json
from ..printing.numbers import duration, human, size
from ..printing.text import one_line
from .advised import held_of
from .timings import Pace

FOOTERS = 100
"""Shards whose footers `status` reads, at most; of more it takes so many, evenly chosen."""
_REST = "footer, indexes"


def stage_facts(recipe: Recipe, plan: Plan) -> dict[str, dict[str, Any]]:
    """Per stage: its books (this recipe's rows) and what its table costs (the whole store's)."""
    files = open_files(recipe.storage.dir)
    store = None if files.empty() else Store.from_files(files)
    found = {}
    for line in plan.stages:
        entry: dict[str, Any] = {
            "state": line.state,
            "rows": line.committed,
            "rejected": line.rejected,
            "pending": line.pending,
            "equal": line.equal,
            "tokens": line.tokens,
            "why": line.why,
        }
        if line.lengths:
            entry["lengths"] = line.lengths
        stage = stage_named(line.name)
        if store is not None and stage.table is not None:
            commits = [c for c in store.commits(stage.table) if c.stage == stage.name]
            if len(plan.teachers) > 1 and stage.loads == "teacher":
                commits = _of_teacher(store, commits, plan.teacher_of(line.name).id)
            entry |= _costs(commits) | column_costs(store, commits)
            if stage.table == "soft_targets" and (costs := feature_costs(store)):
                entry["features"] = costs
            if held := held_of(recipe, plan, line):
                entry["held"] = held
        elif stage.record and line.state == "done":
            folder = plan.train_dirs[stage.arm or "student"]
            with as_a_run_writes(folder / stage.record):
                record = read_record(folder / stage.record)
                worked_on = record.get("measured_on", record)
                tokens = integer(worked_on["tokens"])
                entry |= {"seconds": float(record["seconds"]), "tokens": tokens}
        seconds = entry.get("seconds") or 0.0
        work = entry.pop("table_tokens", entry["tokens"])
        entry["tokens_per_second"] = round(work / seconds, 1) if seconds and work else None
        found[line.name] = entry
    return found


def _of_teacher(store: Store, commits: list[Commit], teacher_id: str) -> list[Commit]:
    """The commits of one teacher's targets, of a store that has those of several."""
    shards = ((c, store.shard(c.table, c.shard.sha256)) for c in commits)
    return [commit for commit, shard in shards if shard.about.get("teacher_id") == teacher_id]


def _costs(commits: list[Commit]) -> dict[str, Any]:
    tokens, size = sum(c.tokens for c in commits), sum(c.shard.bytes for c in commits)
    return {
        "table_tokens": tokens,
        "bytes": size,
        "bytes_per_token": round(size / tokens, 2) if tokens else None,
        "seconds": round(sum(c.seconds for c in commits), 2),
        "commits": {"number": len(commits), "first": commits[0].seq, "last": commits[-1].seq}
        if commits
        else None,
    }


def column_costs(store: Store, commits: list[Commit]) -> dict[str, Any]:
    """Compressed bytes per token of each column and of what is no column.

    Of targets it also says what they keep.

    Nothing where there are no tokens.
    """
    chosen = commits[:: -(-len(commits) // FOOTERS)] if commits else []
    tokens = sum(commit.tokens for commit in chosen)
    if not tokens:
        return {}
    sizes: Counter[str] = Counter()
    shards = [store.shard(commit.table, commit.shard.sha256) for commit in chosen]
    for commit, shard in zip(chosen, shards, strict=True):
        columns = shard.column_bytes()
        sizes.update(columns | {_REST: commit.shard.bytes - sum(columns.values())})
    by_column = {name: round(size / tokens, 3) for name, size in sizes.most_common()}
    found = {
        "bytes_per_token_by_column": by_column,
        "shards": len(commits),
        "footers_read": len(chosen),
    }
    kept = _kept(shards)
    return found | ({"kept": kept} if kept else {})


def feature_costs(store: Store) -> dict[str, Any]:
    """What features take in the whole store.

    Of each kind, layer and dtype it also says how far rounding and projection miss.
    """
    commits = store.commits("features")
    vectors = sum(commit.tokens for commit in commits)
    if not vectors:
        return {}
    size = sum(commit.shard.bytes for commit in commits)
    errors: dict[str, dict[str, _Error]] = {of: {} for of in ERRORS}
    for commit in commits[:: -(-len(commits) // FOOTERS)]:
        about = store.shard("features", commit.shard.sha256).about
        with understood(commit.shard.name, "statistics of features"):
            for name, part in about.get("statistics", {}).items():
                for of in part.keys() & {*ERRORS}:
                    of_kind = errors[of].setdefault(name, _Error())
                    of_kind.add(part[of], vectors=integer(part["vectors"]))
    return {
        "rows": sum(commit.shard.rows for commit in commits),
        "vectors": vectors,
        "bytes": size,
        "bytes_per_vector": round(size / vectors, 2),
        **{
            of: {name: error.shown() for name, error in sorted(found.items())}
            for of, found in errors.items()
            if found
        },
    }


@dataclass
class _Error:
    """How far off features of one kind, layer and dtype are, over shards."""

    vectors: int = 0
    missed: float = 0.0
    most: float = 0.0

    def add(self, of_shard: Mapping[str, Any], *, vectors: int) -> None:
        """What a shard says of some vectors."""
        self.vectors += vectors
        self.missed += float(of_shard["mean"]) * vectors
        self.most = max(self.most, float(of_shard["most"]))

    def shown(self) -> dict[str, float]:
        """Mean over vectors and most of a row."""
        return {"mean": round(self.missed / self.vectors, 6), "most": round(self.most, 6)}


def _kept(shards: Iterable[ShardFile]) -> dict[str, dict[str, Any]]:
    """Per kind of target: tokens, their entries, and the mean of the mass that these keep.

    The mass of sampled targets is None.

    Raises:
        IntegrityError: a shard's statistics are none.
    """
    sums: dict[str, Counter[str]] = {}
    for shard in shards:
        with understood(shard.name, "description of targets"):
            for kind, part in shard.about.get("statistics", {}).items():
                if kind not in STRUCTURES:
                    raise ValueError(f"{kind!r} is no kind of targets")
                tokens, of_each = integer(part["tokens"], least=1), part["entries_per_token"]
                mass = float(part["kept_mass"]["mean"]) * tokens if "kept_mass" in part else 0.0
                found = {"tokens": tokens, "entries": float(of_each) * tokens, "mass": mass}
                sums.setdefault(kind, Counter()).update(found)
    return {
        kind: {
            "tokens": total["tokens"],
            "entries_per_token": round(total["entries"] / total["tokens"], 3),
            "kept_mass": (
                None if STRUCTURES[kind].drawn else round(total["mass"] / total["tokens"], 4)
            ),
        }
        for kind, total in sorted(sums.items())
    }


def facts(
    recipe: Recipe, plan: Plan, done: dict[str, dict[str, Any]], pace: Pace
) -> dict[str, Any]:
    """What the report says about the run besides its results."""
    stages = stage_facts(recipe, plan)
    for name, entry in stages.items():
        entry["clock"] = pace.clock(name)
    for name, entry in done.items():
        if entry["state"] == "done":
            stages[name]["seconds_this_run"] = entry["seconds"]
    return {
        "store": as_written(recipe.storage.dir),
        "sources": all_shown(plan.sources),
        "notes": all_shown(plan.notes),
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
        tokens = human(s.tokens_to_do) if s.tokens_to_do else "-"
        sizes = [tokens, size(s.bytes_to_do) if s.bytes_to_do else "-"]
        table.add_row(s.name, s.state, *counts, *sizes, one_line(s.why))
    return table


def status_tables(stages: dict[str, dict[str, Any]]) -> Group:
    """The status for people: a line per stage, then what each column costs."""
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
    equal = [f"{name}: {equal_texts(s['equal'])}" for name, s in stages.items() if s.get("equal")]
    stored = [(name, s) for name, s in stages.items() if "bytes_per_token_by_column" in s]
    kept = [_kept_line(name, s["kept"]) for name, s in stored if "kept" in s]
    captured = [(name, s["features"]) for name, s in stages.items() if s.get("features")]
    features = [part for name, costs in captured for part in _feature_table(name, costs)]
    columns = (_column_line(name, s) for name, s in stored)
    return Group(table, *equal, *columns, *kept, *features)


def _column_line(name: str, stage: dict[str, Any]) -> str:
    sizes = stage["bytes_per_token_by_column"]
    shown = {column: size for column, size in sizes.items() if size >= sum(sizes.values()) / 100}
    shown["others"] = sum(sizes.values()) - sum(shown.values())
    sampled = stage["footers_read"] < stage["shards"]
    of = f" ({stage['footers_read']} of {counted(stage['shards'], 'shard')})" if sampled else ""
    return f"{name}, bytes/token by column{of}: " + ", ".join(
        f"{c} {size:.2f}" for c, size in shown.items()
    )


def _kept_line(name: str, kept: dict[str, dict[str, Any]]) -> str:
    """What targets keep, of the same shards."""
    mass = {
        kind: "" if s["kept_mass"] is None else f" holding {s['kept_mass']:.4f}"
        for kind, s in kept.items()
    }
    parts = (
        f"{kind} {s['entries_per_token']:.2f}{mass[kind]} ({human(s['tokens'])})"
        for kind, s in kept.items()
    )
    return f"{name}, entries/token of each kind, the mass they hold (tokens): " + ", ".join(parts)


def _feature_table(name: str, features: dict[str, Any]) -> tuple[str, Table]:
    """What features take, and a line for each layout.

    A line says how far rounding misses, and by what a projection moves cosines.
    """
    said = (
        f"{name}, features: {human(features['vectors'])} vectors, "
        f"{features['bytes_per_vector']:.1f} bytes each"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("feature", no_wrap=True)
    errors = [features[of] for of in ERRORS if of in features]
    for column in ("rounding misses", "at most", "cosines moved", "at most")[: 2 * len(errors)]:
        table.add_column(column, justify="right", no_wrap=True)
    for layout in features[ERRORS[0]]:
        off = [error.get(layout) for error in errors]
        cells = [f"{e[of]:.2%}" if e else "-" for e in off for of in ("mean", "most")]
        table.add_row(one_line(layout), *cells)
    return said, table


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    teachers = teachers_json(plan.teachers)
    return {
        "teacher_id": plan.bound.binding.teacher_id,
        **({"teachers": teachers} if teachers else {}),
        "sources": plan.sources,
        "notes": [*plan.notes],
        "stages": {
            s.name: {
                "state": s.state,
                "planned": s.planned,
                "committed": s.committed,
                "rejected": s.rejected,
                "pending": s.pending,
                "equal": s.equal,
                "tokens": s.tokens,
                "tokens_to_do": s.tokens_to_do,
                "bytes_to_do": s.bytes_to_do,
                **({} if s.usd_to_do is None else {"usd_to_do": s.usd_to_do}),
                "why": s.why,
                "sources": s.sources,
            }
            | ({"lengths": s.lengths} if s.lengths else {})
            for s in plan.stages
        },
    }
