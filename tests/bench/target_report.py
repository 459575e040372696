"""From finished arms to a table, verdicts on the expected order, and plots.

    share of the gap    (ce - arm) / (ce - full), held-out cross-entropy, seed by seed; percent
    interval            95 %, of the mean over seeds (`pipeline/report/seeds.py`)

Expected, as of Anshumann et al. 2025 (arXiv 2503.16870): full = sampled-50 >= sampled-13 >
cross-entropy, "=" within 10 % of the gap or the interval; bucket better than drop wherever less
than 0.97 of the mass is kept; drop at small K worse than cross-entropy and over-confident, while
cross-entropy, sampled and full are not.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from target_arms import ARMS, ROUNDS
from target_plots import plot_angles, plot_arms

from stillroom.pipeline.report.seeds import interval

MEASURES = ("cross_entropy", "kl_teacher", "ece", "acceptance")
LOSS = "cross_entropy"
KEPT_ALL = 0.97
"""Kept mass from which the tail hardly matters."""
EQUAL = 10.0
"""Percent of the gap that count as equal."""
Found = dict[str, dict[int, dict[str, Any]]]


def report(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Markdown lines and what a machine reads.

    Writes report.md, arms.svg and angles.svg into `folder`.
    """
    found = _read(folder / "results")
    arms = _arms(found, folder)
    outcome: dict[str, Any] = {
        "arms": arms,
        "runs": {name: list(of.values()) for name, of in found.items()},
    }
    lines = [*_teacher(found), *_table(arms)]
    for name in ("corpus", "estimators", "angles"):
        if (file := folder / f"{name}.json").is_file():
            outcome[name] = json.loads(file.read_text())
    if "estimators" in outcome:
        lines += _estimators(outcome["estimators"])
    if "angles" in outcome:
        lines += _angles(outcome["angles"])
        (folder / "angles.svg").write_text(plot_angles(outcome["angles"]))
    outcome["verdicts"] = verdicts(found, arms, outcome.get("angles", {}))
    lines += ["", "| expected | found | holds |", "| --- | --- | --- |"]
    said = {True: "yes", False: "NO", None: "not told apart"}
    lines += [
        f"| {v['expected']} | {v['found']} | {said[v['holds']]} |" for v in outcome["verdicts"]
    ]
    if arms:
        (folder / "arms.svg").write_text(plot_arms(arms))
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    return lines, outcome


def _read(folder: Path) -> Found:
    found: Found = defaultdict(dict)
    for name in ARMS:
        for file in sorted(folder.glob(f"{name}-[0-9]*.json")):
            result = json.loads(file.read_text())
            if result["arm"] == name:
                found[name][result["seed"]] = result
    return dict(found)


def _arms(found: Found, folder: Path) -> dict[str, dict[str, Any]]:
    """Every measure of each arm, and the share of the gap, as (mean, half-width or None).

    What its targets keep stands beside them.
    """
    ce, full = found.get("ce", {}), found.get("full", {})
    gaps = {seed: ce[seed][LOSS] - full[seed][LOSS] for seed in ce if seed in full}
    arms = {}
    for name, of in found.items():
        made: dict[str, Any] = {
            "seeds": list(of),
            "train_seconds": fmean(r["train_seconds"] for r in of.values()),
        }
        made |= {measure: interval([r[measure] for r in of.values()]) for measure in MEASURES}
        shares = [
            100 * (ce[seed][LOSS] - run[LOSS]) / gaps[seed]
            for seed, run in of.items()
            if seed in gaps
        ]
        made["share"] = interval(shares) if shares else None
        kept = folder / "results" / f"kept-{name}.json"
        made |= (
            json.loads(kept.read_text()) if kept.is_file() else {"kept_mass": None, "entries": None}
        )
        arms[name] = made
    return arms


def _differences(found: Found, one: str, other: str, measure: str = LOSS) -> list[float]:
    """One minus the other, seed by seed, where both are there."""
    a, b = found.get(one, {}), found.get(other, {})
    return [a[seed][measure] - b[seed][measure] for seed in a if seed in b]


def _teacher(found: Found) -> list[str]:
    some = next((run for of in found.values() for run in of.values()), None)
    if some is None:
        return []
    about = some["teacher"]
    return [
        f"Teacher: cross-entropy {about['cross_entropy']:.4f} nats on {about['tokens']} held-out "
        f"tokens, entropy {about['entropy']:.4f}, ECE {100 * about['ece']:.2f} %. Student: "
        f"{some['parameters']} weights, {some['tokens']} tokens in {some['steps']} steps.",
        "",
    ]


def _table(arms: dict[str, dict[str, Any]]) -> list[str]:
    head = (
        "| arm | seeds | cross-entropy, nats | share of the gap, % | KL to teacher, nats "
        "| ECE, % | acceptance, % |"
    )
    lines = [
        f"{head} kept mass | ids/token |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, arm in arms.items():
        kept = "" if arm["kept_mass"] is None else f"{arm['kept_mass']:.3f}"
        entries = "" if arm["entries"] is None else f"{arm['entries']:.1f}"
        lines.append(
            f"| {name} | {len(arm['seeds'])} | {_shown(arm['cross_entropy'], 4)} | "
            f"{_shown(arm['share'], 1)} | {_shown(arm['kl_teacher'], 4)} | "
            f"{_shown(arm['ece'], 2, 100)} | {_shown(arm['acceptance'], 2, 100)} | {kept} | "
            f"{entries} |"
        )
    return lines


def _shown(value: tuple[float, float | None] | None, digits: int, factor: float = 1.0) -> str:
    if value is None:
        return ""
    mean, half = value
    return f"{factor * mean:.{digits}f}" + (
        "" if half is None else f" ± {factor * half:.{digits}f}"
    )


def _estimators(found: dict[str, Any]) -> list[str]:
    zipf = found["zipf"]
    lines = [
        "",
        "Zipf(1), 100,000 ids, K = 20: "
        + ", ".join(f"{k} {v:.4f}" for k, v in zipf.items() if k != "distinct_ids"),
    ]
    lines += ["", "| distinct ids per token | " + " | ".join(f"N = {n}" for n in ROUNDS) + " |"]
    lines += ["| --- |" + " ---: |" * len(ROUNDS)]
    rows = {"Zipf(1), multinomial": zipf["distinct_ids"]}
    rows |= {f"this teacher, {draw}": ids for draw, ids in found["distinct_ids"].items()}
    for draw in found["distinct_ids"]:
        of = {str(n): found["measured"][f"{draw} {n}"]["distinct_ids"] for n in ROUNDS}
        rows[f"this teacher, {draw}, as drawn"] = of
    lines += [
        f"| {name} | " + " | ".join(f"{ids[str(n)]:.2f}" for n in ROUNDS) + " |"
        for name, ids in rows.items()
    ]
    drawn = [
        [found["measured"][f"{draw} {n}"]["variance"] for n in ROUNDS]
        for draw in found["distinct_ids"]
    ]
    ratios = ", ".join(f"{b / a:.2f} at N = {n}" for a, b, n in zip(*drawn, ROUNDS, strict=True))
    lines += ["", f"Variance as drawn, systematic over multinomial at equal draws: {ratios}."]
    lines += [
        "",
        (
            "Variance of the target at equal distinct ids: multinomial's, and the others as a "
            "share of it:"
        ),
        "",
    ]
    names = ("multinomial", "systematic", "head + multinomial", "head + systematic")
    lines += ["| on | distinct ids | " + " | ".join(names) + " | draws: multinomial, systematic |"]
    lines += ["| --- | ---: |" + " ---: |" * 5]
    for part, rows_of in found["at_equal_ids"].items():
        for row in rows_of:
            shares = " | ".join(f"{row[name] / row['multinomial']:.2f}" for name in names[1:])
            draws = f"{row['multinomial draws']:.1f}, {row['systematic draws']:.1f}"
            lines.append(
                f"| {part} | {row['distinct_ids']:g} | {row['multinomial']:.5f} | {shares} | "
                f"{draws} |"
            )
    return lines


def _angles(found: dict[str, Any]) -> list[str]:
    lines = []
    for point, of in found.items():
        lines += [
            "",
            (
                f"Angle to the live teacher's gradient, degrees, at the {point} (KL to the teacher "
                f"{of['kl']:.3f} nats):"
            ),
        ]
        lines += ["", "| tokens | " + " | ".join(map(str, of["tokens"])) + " | norm ratio |"]
        lines += ["| --- |" + " ---: |" * (len(of["tokens"]) + 1)]
        for name, values in of["angle"].items():
            shown = " | ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {name} | {shown} | {of['ratio'][name][-1]:.3f} |")
    return lines


def verdicts(
    found: Found, arms: dict[str, dict[str, Any]], angles: dict[str, Any]
) -> list[dict[str, Any]]:
    """What was expected and what came of it; nothing of arms that are not there."""
    made: list[dict[str, Any]] = []

    def say(expected: str, what: str, holds: bool | None) -> None:
        made.append({"expected": expected, "found": what, "holds": holds})

    def less(
        better: str, worse: str, measure: str = LOSS, factor: float = 1.0, unit: str = "nats"
    ) -> None:
        if values := _differences(found, worse, better, measure):
            mean, half = interval([factor * value for value in values])
            holds = mean > 0 if abs(mean) > (half or 0.0) else None
            say(
                f"{better} has less {measure} than {worse}",
                f"{_shown((mean, half), 4)} {unit} less",
                holds,
            )

    shares = {name: arm["share"] for name, arm in arms.items() if arm["share"] is not None}
    for name in (f"sampled50-{draw}" for draw in ("multinomial", "systematic")):
        if name in shares:
            mean, half = shares[name]
            say(
                f"{name} equals full",
                f"{_shown(shares[name], 1)} %",
                abs(mean - 100) <= max(EQUAL, half or 0.0),
            )
    for draw in ("multinomial", "systematic"):
        less(f"sampled50-{draw}", f"sampled13-{draw}")
        less(f"sampled13-{draw}", f"sampled4-{draw}")
        less(f"sampled13-{draw}", "ce")
    for rounds in ROUNDS:
        less(f"sampled{rounds}-systematic", f"sampled{rounds}-multinomial")
    drops = [name for name in arms if name.endswith("-drop")]
    for name in drops:
        if (arms[name]["kept_mass"] or 1.0) < KEPT_ALL:
            less(name.replace("drop", "bucket"), name)
            less(name.replace("drop", "bucket"), name, "ece", 100, "%")
    for name in drops[:1]:
        less("ce", name)
    for name in drops[:3]:
        less("full", name, "ece", 100, "%")
    for point, of in angles.items():
        made += _verdicts_on_angles(point, of)
    return made


def _verdicts_on_angles(point: str, of: dict[str, Any]) -> list[dict[str, Any]]:
    """The angles are judged on the two largest batches.

    In small ones the full gradient is itself mostly noise, and falls too.
    """
    made = []
    for name, values in of["angle"].items():
        power, overall = _power(of["tokens"][-2:], values[-2:]), _power(of["tokens"], values)
        if name.startswith("sampled"):
            expected, holds = "falls as tokens^-0.5 (-0.4 to -0.6)", -0.6 <= power <= -0.4
        elif name.endswith("drop"):
            expected, holds = "does not fall (-0.1 or more)", power >= -0.1
        else:
            continue
        what = f"tokens^{power:.2f} in the last doubling, {overall:.2f} over all"
        made.append(
            {"expected": f"{point}: angle of {name} {expected}", "found": what, "holds": holds}
        )
    last = {name: values[-1] for name, values in of["angle"].items()}
    if point == "end" and {"top12-drop", "sampled50-multinomial"} <= last.keys():
        for draw in ("multinomial", "systematic"):
            ratio = last["top12-drop"] / last[f"sampled50-{draw}"]
            expected = (
                f"end: top12-drop at least 3 times sampled50-{draw} at {of['tokens'][-1]} tokens"
            )
            made.append({"expected": expected, "found": f"{ratio:.1f} times", "holds": ratio >= 3})
    return made


def _power(tokens: list[int], values: list[float]) -> float:
    """Slope of log angle against log tokens, least squares."""
    x, y = [math.log(t) for t in tokens], [math.log(max(v, 1e-9)) for v in values]
    if len(x) < 2:
        return 0.0
    mx, my = fmean(x), fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )
