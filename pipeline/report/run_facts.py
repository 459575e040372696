"""The last sections of a report, from what the runner knows.

They are time and bytes by stage, and provenance.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..printing.numbers import count, decimals, duration, size
from ..printing.text import inline
from . import figures
from .blocks import Block, Bullets, Code, Figures, Section, Table, Text

CLOCK = ("start", "model", "tokenizer", "disk", "other")
"""Where a stage's time goes."""


def stages(facts: Mapping[str, Any]) -> Section | None:
    """Time and bytes of each stage."""
    reasons = facts.get("rejects") or {}
    if not facts.get("stages"):
        return None
    rows = [
        [
            name,
            count(stage.get("rows")),
            count(stage.get("tokens")),
            count(stage.get("rejected")) + (f" ({reasons[name]})" if reasons.get(name) else ""),
            size(stage.get("bytes")),
            decimals(stage.get("bytes_per_token"), 1),
            duration(stage.get("seconds"), places=1),
            count(stage.get("tokens_per_second")),
        ]
        for name, stage in facts["stages"].items()
    ]
    headers = ["stage", "rows", "tokens", "rejected", "bytes", "bytes/token", "time", "tokens/s"]
    note = (
        "Rows and tokens are this run's; bytes and time are those of the whole store, which runs "
        "share."
    )
    return Section(
        "Time and bytes",
        [Table(headers, rows), Text(note), *_columns(facts["stages"]), *_clocks(facts["stages"])],
    )


def _columns(found: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """What a token costs in each column; columns of less than a hundredth are taken together."""
    lines = []
    for name, stage in found.items():
        if sizes := stage.get("bytes_per_token_by_column"):
            whole = sum(sizes.values())
            shown = {column: value for column, value in sizes.items() if value >= whole / 100}
            shown["others"] = whole - sum(shown.values())
            listed = ", ".join(
                f"{inline(column)} {decimals(value, 2)}" for column, value in shown.items()
            )
            lines.append(f"{name}, bytes/token by column: {listed}")
    return [Bullets(lines)] if lines else []


def _clocks(found: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Where the time of each stage's process went, where that was noted."""
    clocks = {name: clock for name, stage in found.items() if (clock := stage.get("clock"))}
    if not clocks:
        return []
    parts = [part for part in CLOCK if any(clock.get(part) for clock in clocks.values())]
    rows = [
        [name, *(duration(seconds, places=1) for seconds in _spent(clock, parts))]
        for name, clock in clocks.items()
    ]
    table = Table(["stage", *parts, "in all"], rows)
    note = (
        "Where the time of a stage's process went. start: imports, loading, warming up; model: "
        "the model computes; tokenizer: text to tokens and back; disk: the store is read and "
        "written."
    )
    return [
        Figures([figures.clocks(clocks, parts)], [Section("Where the time went", [table])]),
        Text(note),
    ]


def _spent(clock: Mapping[str, float], parts: Sequence[str]) -> list[float]:
    """Seconds of each part, and of all."""
    return [*(clock.get(part, 0.0) for part in parts), sum(clock.values())]


def provenance(report: Mapping[str, Any]) -> Section:
    """Where every number can be traced to."""
    facts, measured = report["facts"], report["evaluation"]["measured_on"]
    machine, versions = facts.get("machine"), facts.get("versions") or {}
    lines = {
        "teacher id": report["settings"].get("teacher_id"),
        "training snapshot": report["train"]["student"].get("snapshot"),
        "held-out snapshot": measured["snapshot"],
        "store": facts.get("store"),
        **{f"commits of {name}": listed for name, listed in _commits(facts).items()},
        "training run": report["train_dir"],
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "machine": ", ".join(f"{k}: {v}" for k, v in machine.items())
        if isinstance(machine, Mapping)
        else machine,
    }
    blocks: list[Block] = [
        Bullets([f"{name}: {inline(value)}" for name, value in lines.items() if value])
    ]
    if recipe := report["settings"].get("recipe"):
        as_yaml = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
        blocks.append(Code(as_yaml, "yaml", folded="The recipe, with every default"))
    return Section("Provenance", blocks)


def _commits(facts: Mapping[str, Any]) -> dict[str, str]:
    """Stage -> its commits in the store: how many, first and last."""
    found = {}
    for name, stage in (facts.get("stages") or {}).items():
        if commits := stage.get("commits"):
            found[name] = f"{commits['number']} ({commits['first']:08d} to {commits['last']:08d})"
    return found
