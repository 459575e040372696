"""Runs that differ in their seed only, taken together: means and 95 % intervals over seeds.

A seed is one draw of the student's initial weights and of the order of samples; data, teacher and
held-out rows stay. So the intervals say what another seed would give, and nothing about other data:
for that see the standard errors over prompts of each run.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...storage.keys import canonical_json

CONFIDENCE = 0.95
Interval = tuple[float, float | None]
"""Mean over seeds, and half the width of its 95 % interval; None where there is one seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Reports of one recipe with different seeds, by run folder.

    A report on its own is a group too.
    """

    reports: Mapping[str, Mapping[str, Any]]

    @property
    def first(self) -> Mapping[str, Any]:
        """The report that stands for what all have in common."""
        return next(iter(self.reports.values()))

    @property
    def seeds(self) -> list[int]:
        """Their seeds, in the order of the reports."""
        return [_seed(report) for report in self.reports.values()]

    def recipe(self) -> dict[str, Any]:
        """The recipe that all have in common, with all of their seeds."""
        recipe = dict(self.first["settings"].get("recipe", {}))
        return recipe | {"run": recipe.get("run", {}) | {"seed": ", ".join(map(str, self.seeds))}}

    def results(self) -> dict[str, dict[str, Interval]]:
        """By arm and measure: the interval over seeds."""
        found = [report["evaluation"]["results"] for report in self.reports.values()]
        arms = [arm for arm in found[0] if all(arm in results for results in found)]
        return {arm: _intervals([results[arm] for results in found]) for arm in arms}

    def difference(self) -> dict[str, Interval]:
        """Student minus baseline by measure, taken seed by seed.

        It is empty where there is no baseline.
        """
        pairs = [report["evaluation"]["results"] for report in self.reports.values()]
        if any("baseline" not in pair for pair in pairs):
            return {}
        return _intervals(
            [
                {
                    name: value - pair["baseline"][name]
                    for name, value in pair["student"].items()
                    if _number(value) and _number(pair["baseline"].get(name))
                }
                for pair in pairs
            ]
        )

    def summary(self) -> dict[str, Any]:
        """For machines: runs, seeds, and of each measure the mean and the `half_width`."""
        return {
            "runs": list(self.reports),
            "seeds": self.seeds,
            "results": {arm: _named(measures) for arm, measures in self.results().items()},
            "student_minus_baseline": _named(self.difference()),
        }


def grouped(reports: Mapping[str, Mapping[str, Any]]) -> list[Group]:
    """Reports by recipe, `run.seed` and `run.dir` aside.

    A report whose seed is there already stands on its own.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for folder, report in reports.items():
        name, seed = _name(report), _seed(report)
        if any(_seed(other) == seed for other in groups.get(name, {}).values()):
            name += folder
        groups.setdefault(name, {})[folder] = report
    return [Group(reports=group) for group in groups.values()]


def interval(values: Sequence[float]) -> Interval:
    """Mean and half-width of Student's t interval, mean ± t s / sqrt(n).

    It assumes independent draws, roughly normal.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence, T of Student's distribution.

    The distribution has `freedom` degrees of freedom.

    It bisects over the angle arctan(t / sqrt(freedom)), in which that probability is a finite sum
    (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle))."""
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _intervals(found: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """Of each number that is there for every seed, but counts and standard errors over prompts."""
    measured = [
        name for name in found[0] if name not in ("rows", "tokens") and not name.endswith("_se")
    ]
    names = [name for name in measured if all(_number(f.get(name)) for f in found)]
    return {name: interval([f[name] for f in found]) for name in names}


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _named(measures: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {name: {"mean": mean, "half_width": half} for name, (mean, half) in measures.items()}


def _name(report: Mapping[str, Any]) -> str:
    """What all runs of a group have in common."""
    settings = report["settings"]
    recipe = dict(settings.get("recipe", {}))
    recipe["run"] = {k: v for k, v in recipe.get("run", {}).items() if k not in ("seed", "dir")}
    return canonical_json({"recipe": recipe, "teacher_id": settings.get("teacher_id")}).decode()


def _seed(report: Mapping[str, Any]) -> int:
    return int(report["settings"].get("recipe", {}).get("run", {}).get("seed", 0))
