"""From trained students to tables.

Each arm is at its own best rate, paired by seed with the arm it is compared with.

`±` is half a 95 % interval over seeds (Student's t).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ways_arms import Arm, Task

from stillroom.pipeline.report.seeds import interval

if TYPE_CHECKING:
    from ways_students import Students

Found = dict[str, Any]


def best_rate(found: Sequence[Found], task: Task, arm: str) -> float | None:
    """The rate of an arm that is best on validation rows, of students of one seed.

    None where all broke off.
    """
    first = next(iter(task.measures))
    worth = {
        one["rate"]: task.better * one["numbers"][first]
        for one in found
        if one["arm"] == arm and "numbers" in one
    }
    return max(worth, key=lambda rate: worth[rate], default=None)


def report(folder: Path, students: Mapping[str, "Students"]) -> tuple[list[str], dict[str, Any]]:
    """Markdown lines and what a machine reads; writes report.md and report.json."""
    lines: list[str] = []
    outcome: dict[str, Any] = {}
    if (file := folder / "teacher.json").is_file():
        outcome["teacher"] = json.loads(file.read_text())
    for name, mine in students.items():
        if mine.done and (rows := _arms(mine)):
            outcome[name] = {"stored": mine.facts, "arms": rows}
            outcome[name]["validation"] = [
                _short(one, mine.task) for one in mine.read("validation")
            ]
            lines += _about(outcome, name) + _table(mine.task, rows) + _rates(mine)
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    (folder / "report.json").write_text(json.dumps(outcome) + "\n")
    return lines, outcome


def _arms(students: "Students") -> list[Found]:
    """One row for each arm.

    It has its measures by seed, and what is gained over the arms that it is compared with.
    """
    task, tried, read = students.task, students.read("validation"), students.read("test")
    found: dict[str, dict[int, Found]] = {}
    rates = {}
    for arm in task.arms:
        first = min((one["seed"] for one in tried if one["arm"] == arm), default=0)
        rates[arm] = best_rate([one for one in tried if one["seed"] == first], task, arm)
        mine = [one for one in read if one["arm"] == arm and one["rate"] == rates[arm]]
        found[arm] = {one["seed"]: one for one in mine if "numbers" in one}
    return [_row(arm, rates[arm], found, students) for arm in task.arms if found[arm]]


def _row(arm: str, rate: float | None, found: dict[str, dict[int, Found]], of: "Students") -> Found:
    task, mine = of.task, found[arm]
    validated = {
        o["seed"]: o for o in of.read("validation") if (o["arm"], o["rate"]) == (arm, rate)
    }
    row: Found = {
        "arm": arm,
        "rate": rate,
        "seeds": sorted(mine),
        "cpu_seconds": [validated[seed]["cpu_seconds"] for seed in sorted(mine)],
        "parameters": next(iter(mine.values()))["parameters"],
        "bytes": _bytes(task.arms[arm], of.facts),
    }
    for measure in task.measures:
        row[measure] = [mine[seed]["numbers"][measure] for seed in sorted(mine)]
    decisive = next(iter(task.measures))
    for other in dict.fromkeys((task.base, task.arms[arm].against)):
        both = sorted(mine.keys() & found.get(other, {}).keys())
        if other != arm and both:
            row[f"minus {other}"] = [
                mine[seed]["numbers"][decisive] - found[other][seed]["numbers"][decisive]
                for seed in both
            ]
    row["verdict"] = _verdict(row.get(f"minus {task.arms[arm].against}"), row["bytes"], task)
    return row


def _bytes(arm: Arm, facts: Found) -> dict[str, float]:
    """What an arm's features take on disk: token, text or teacher -> bytes of each."""
    found: dict[str, float] = {}
    for one in arm.stored:
        if one["what"] == "embeddings":
            found["teacher"] = facts["embedding_bytes"]
        kind = one["what"] if "pooling" not in one else f"{one['what']}_{one['pooling']}"
        for layer in one.get("layers", ()):
            stored = facts["features"][f"{kind} {layer}"]
            of = "text" if "pooling" in one else "token"
            size = (
                stored["bytes_a_vector"]
                + stored["besides_a_row"] * stored["rows"] / stored["vectors"]
            )
            found[of] = found.get(of, 0) + size
    return found


def _verdict(gains: Sequence[float] | None, taken: Mapping[str, float], task: Task) -> str:
    if not gains:
        return ""
    mean, half = interval([task.better * gain for gain in gains])
    if half is None:
        return "one seed"
    if mean - half > 0:
        return "earns its bytes" if taken else "gains"
    return "loses" if mean + half < 0 else "no gain to be told"


def _short(one: Found, task: Task) -> Found:
    """A student of validation rows: what it was worth, or why it broke off."""
    first = next(iter(task.measures))
    numbers = one.get("numbers")
    worth = {first: numbers[first]} if numbers else {"failed": one["failed"]}
    return {name: one[name] for name in ("arm", "rate", "seed")} | worth


def _about(outcome: Found, name: str) -> list[str]:
    """Rows, teacher and targets of a task."""
    stored = outcome[name]["stored"]
    lines = [
        f"## {name}",
        "",
        f"{stored['samples']:,} rows to train on, {stored['tokens']:,} tokens; targets take "
        f"{stored['target_bytes_a_row']:.0f} bytes a row.",
    ]
    if teacher := stored.get("teacher"):
        worth = ", ".join(f"{split} {100 * teacher[split]['accuracy']:.1f} %" for split in teacher)
        bayes = outcome["teacher"]["naive_bayes"]
        lines.append(f"Teacher: {worth}. Naive Bayes: test {100 * bayes:.1f} %.")
    return [*lines, ""]


def _table(task: Task, rows: Sequence[Found]) -> list[str]:
    headings = [
        "arm", "learns from", "bytes", "rate", *task.measures.values(), f"minus {task.base}",
        "minus its like", "CPU s", "verdict",
    ]  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", f"| --- | --- | {'---: | ' * (len(headings) - 3)}--- |"]
    for row in rows:
        lines.append(f"| {' | '.join(_cells(task, row))} |")
    return [*lines, ""]


def _cells(task: Task, row: Found) -> list[str]:
    like = task.arms[row["arm"]].against
    taken = ", ".join(f"{size:,.0f} a {of}" for of, size in row["bytes"].items())
    scales = {measure: 100.0 if measure == "accuracy" else 1.0 for measure in task.measures}
    scale = scales[next(iter(task.measures))]
    return [
        row["arm"],
        task.arms[row["arm"]].says,
        taken or "0",
        f"{row['rate']:g}",
        *(_spread(row[measure], scales[measure]) for measure in task.measures),
        _spread(row.get(f"minus {task.base}"), scale),
        "" if like == task.base else f"{like}: {_spread(row.get(f'minus {like}'), scale)}",
        f"{sum(row['cpu_seconds']) / len(row['cpu_seconds']):.0f}",
        row["verdict"],
    ]


def _spread(values: Sequence[float] | None, scale: float) -> str:
    if not values:
        return ""
    mean, half = interval([scale * value for value in values])
    digits = 1 if scale == 100 else 4
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def _rates(students: "Students") -> list[str]:
    """What every rate was worth on validation rows, at the first seed."""
    task, tried = students.task, students.read("validation")
    first, measure = min(one["seed"] for one in tried), next(iter(task.measures))
    rates = sorted({one["rate"] for one in tried})
    lines = [
        f"{task.measures[measure]} on validation rows, seed {first}:",
        "",
        f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"| --- |{' ---: |' * len(rates)}",
    ]
    scale = 100.0 if measure == "accuracy" else 1.0
    for arm in task.arms:
        mine = {o["rate"]: o for o in tried if (o["arm"], o["seed"]) == (arm, first)}
        cells = [
            _spread([mine[rate]["numbers"][measure]], scale)
            if "numbers" in mine.get(rate, {})
            else "broke off"
            if rate in mine
            else ""
            for rate in rates
        ]
        if mine:
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return [*lines, ""]
