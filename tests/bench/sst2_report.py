"""From trained students to tables.

They show the pipeline's three arms, the study's losses, and every learning rate.

`±` is half a 95 % interval over seeds.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import safe_open
from sst2_arms import ARMS, MISTAKES, STARTS
from sst2_verdicts import Student, accuracy, verdicts

from stillroom.pipeline.report.seeds import interval


def read_students(folder: Path) -> list[Student]:
    """Every student of a study, in the order of their files' names."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [student for student in found if "arm" in student]


def best_rate(folder: Path, arm: str, start: str) -> float:
    """The learning rate whose students are best on validation rows after two epochs.

    It is by the mean accuracy of the seeds that a rate has.

    A rate that was best at one seed and fails at others is not: so the rate is asked for again when
    they are there.
    """
    mine = _of(read_students(folder), arm=arm, start=start)
    worth = {
        rate: [_worth(s) for s in mine if s["rate"] == rate]
        for rate in sorted({s["rate"] for s in mine})
    }
    return max(worth, key=lambda rate: fmean(worth[rate]))


def _worth(student: Student) -> float:
    return float(student["after"][-1]["validation"]["accuracy"]) if student["after"] else 0.5


def _of(students: Iterable[Student], **wanted: Any) -> list[Student]:
    return [
        student
        for student in students
        if all(student[name] == value for name, value in wanted.items())
    ]


def report(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Markdown lines and what a machine reads; writes report.md and report.json."""
    lines: list[str] = []
    outcome: dict[str, Any] = {}
    for name in ("teacher", "pipeline", "study"):
        if (file := folder / f"{name}.json").is_file():
            outcome[name] = json.loads(file.read_text())
    if "pipeline" in outcome:
        students = sorted((folder / "runs").glob("*/train-*/student"))
        outcome["parameters"] = {
            "teacher": _parameters(folder / "teacher"),
            "student": _parameters(students[0]),
        }
        lines += _sizes(outcome["parameters"]) + _pipeline(outcome["pipeline"], outcome["teacher"])
    if "study" in outcome and (students := read_students(folder / "study")):
        lines += _study(folder, outcome, students)
        outcome["students"] = [_short(student) for student in students]
    if not lines:
        return lines, outcome
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    (folder / "report.json").write_text(json.dumps(outcome) + "\n")
    return lines, outcome


def _short(student: Student) -> Student:
    """One student with accuracies only, after each epoch."""
    named = {
        split: [epoch[split]["accuracy"] for epoch in student["after"]]
        for split in ("validation", "test")
    }
    return {name: student[name] for name in ("arm", "start", "rate", "seed", "failed")} | named


def _parameters(model: Path) -> tuple[int, int]:
    """How many parameters a saved model has: all, and those that are no embeddings."""
    with safe_open(model / "model.safetensors", "pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}
    return sum(sizes.values()), sum(
        size for name, size in sizes.items() if "embeddings" not in name
    )


def _sizes(found: dict[str, tuple[int, int]]) -> list[str]:
    of = {
        name: f"{whole:,} weights ({rest:,} without the embeddings)"
        for name, (whole, rest) in found.items()
    }
    shares = [100 * found["student"][index] / found["teacher"][index] for index in (0, 1)]
    return [
        f"Teacher: {of['teacher']}. Student: {of['student']}: {shares[0]:.0f} % and "
        f"{shares[1]:.0f} % of it.",
        "",
    ]


def _pipeline(found: dict[str, Any], about: dict[str, float]) -> list[str]:
    lines = [
        f"Naive Bayes on the same rows: {100 * about['naive_bayes']:.1f} %.",
        "",
        "| arm | learning rate | accuracy % | ECE | cross-entropy (nats) | KL to teacher (nats) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    named = {
        "teacher": "teacher",
        "baseline": "student, labels alone",
        "student": "student, distilled",
    }
    for arm, name in named.items():
        results = found[arm]["results"]
        cells = [
            _cell([result["accuracy"] for result in results], scale=100, digits=1),
            *(
                _cell([result[key] for result in results], digits=4)
                for key in ("ece", "cross_entropy", "kl_teacher")
            ),
        ]
        lines.append(f"| {name} | {found[arm].get('rate', '')} | {' | '.join(cells)} |")
    gains = [
        [
            s[key] - b[key]
            for s, b in zip(found["student"]["results"], found["baseline"]["results"], strict=True)
        ]
        for key in ("accuracy", "ece", "cross_entropy", "kl_teacher")
    ]
    cells = [_cell(gains[0], scale=100, digits=1), *(_cell(gain, digits=4) for gain in gains[1:])]
    return [*lines, f"| distilled minus labels, by seed | | {' | '.join(cells)} |", ""]


def _cell(values: Sequence[float], *, scale: float = 1.0, digits: int) -> str:
    mean, half = interval([scale * value for value in values])
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def _study(folder: Path, outcome: dict[str, Any], students: list[Student]) -> list[str]:
    about = outcome["study"]
    best = {
        (arm, start): best_rate(folder / "study", arm, start)
        for arm in (*ARMS, *MISTAKES)
        for start in STARTS
        if _of(students, arm=arm, start=start, seed=about["first_seed"])
    }
    about["common_rate"] = common = best.get(("forward_kl", "fresh"))
    tuned = [
        json.loads(file.read_text())
        for file in sorted((folder / "study").glob("fine-tuned-?.json"))
    ]
    about["fine_tuned"] = [found["test"] for found in tuned]
    lines = [
        f"Teacher {100 * about['teacher']['test']['accuracy']:.1f} % on {about['rows']['test']} "
        "test rows; fine-tuned students "
        f"{_cell([found['accuracy'] for found in about['fine_tuned']], scale=100, digits=1)} %.",
    ]
    table = about["arms"] = []
    for start in STARTS:
        lines += [
            "",
            f"Start: {start}. Accuracy on test rows, %; the common learning rate is {common}.",
            "",
        ]
        lines += [
            "| loss | own rate | one epoch | two epochs | ECE | common rate, one epoch | two "
            "epochs |"
        ]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for arm in [arm for arm in (*ARMS, *MISTAKES) if (arm, start) in best]:
            own = _of(students, arm=arm, start=start, rate=best[arm, start])
            same = _of(students, arm=arm, start=start, rate=common)
            row = {"arm": arm, "start": start, "rate": best[arm, start]}
            row |= {
                f"own_{epoch}": [accuracy(student, epoch) for student in own] for epoch in (1, 2)
            }
            row |= {
                f"common_{epoch}": [accuracy(student, epoch) for student in same]
                for epoch in (1, 2)
            }
            row["ece"] = [
                student["after"][-1]["test"]["ece"] for student in own if student["after"]
            ]
            table.append(row)
            cells = [
                _cell(row[name], scale=100, digits=1) if row[name] else ""
                for name in ("own_1", "own_2")
            ]
            cells.append(_cell(row["ece"], digits=3) if row["ece"] else "")
            cells += [
                _cell(row[name], scale=100, digits=1) if row[name] else ""
                for name in ("common_1", "common_2")
            ]
            lines.append(f"| {arm} | {best[arm, start]:g} | {' | '.join(cells)} |")
    outcome["verdicts"] = verdicts(
        students, best=best, common=common or 0.0, first_seed=about["first_seed"]
    )
    return [*lines, *_verdicts(outcome["verdicts"]), *_grid(students, about["first_seed"])]


def _verdicts(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "| finding | write-up | here, own rates | common rate | along the rates, first seed | "
        "verdict |",
    ]
    lines += ["| --- | --- | ---: | ---: | --- | --- |"]
    for one in found:
        own, same = (
            _cell(one[name], scale=100, digits=1) if one[name] else "" for name in ("own", "common")
        )
        grid = ", ".join(
            f"{rate:g}: {100 * difference:+.1f}" for rate, difference in one["grid"].items()
        )
        lines.append(
            f"| {one['says']} | {one['claimed']} | {own} | {same} | {grid} | {one['verdict']} |"
        )
    return lines


def _grid(students: list[Student], seed: int) -> list[str]:
    """Every learning rate at the first seed."""
    lines = []
    for start in STARTS:
        mine = _of(students, start=start, seed=seed)
        rates = sorted({student["rate"] for student in mine})
        found: dict[str, dict[float, Student]] = defaultdict(dict)
        for student in mine:
            found[student["arm"]][student["rate"]] = student
        lines += [
            "",
            f"Start: {start}, seed {seed}: accuracy after two epochs, %, validation / test.",
            "",
        ]
        lines += [
            f"| loss | {' | '.join(f'{rate:g}' for rate in rates)} |",
            f"| --- |{' ---: |' * len(rates)}",
        ]
        for arm in [arm for arm in (*ARMS, *MISTAKES) if arm in found]:
            cells = [_both(found[arm][rate]) if rate in found[arm] else "" for rate in rates]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _both(student: Student) -> str:
    if not student["after"]:
        return "broke off"
    last = student["after"][-1]
    return f"{100 * last['validation']['accuracy']:.1f} / {100 * last['test']['accuracy']:.1f}"
