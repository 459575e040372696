"""Several runs side by side.

First comes what was different, then what came of it, then their curves over one another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..advice.advise import Shared, of_reports
from ..printing.numbers import nats
from ..printing.text import inline
from . import figures, sections
from .blocks import Block, Bullets, Figures, Page, Section, Table, Text
from .plots import Panel
from .results import Results, measures, result_headers, result_rows, unit_of
from .seeds import Group, Interval, grouped

COLOURS = 6
"""Curves that can be told apart; further groups are in the tables only."""


def page(reports: Mapping[str, Mapping[str, Any]]) -> Page:
    """A comparison of reports, by run folder.

    Runs that differ in `run.seed` (and `run.dir`) only are one: means and 95 % intervals over
    seeds.
    """
    groups = grouped(reports)
    seeded, single = (
        [g for g in groups if len(g.seeds) > 1],
        [g for g in groups if len(g.seeds) == 1],
    )
    differing = _differing([group.recipe() for group in groups])
    named = {_group_name(group): group for group in groups}
    same = Text(f"Nothing{' but the seed' if seeded else ': the recipes are the same'}.")
    fields = Table(["recipe field", *named], differing, text_columns=1 + len(groups))
    found = [
        Section("What differs", [fields if differing else same, *map(Text, _judged_apart(groups))]),
        _advice(groups),
        _over_seeds(seeded) if seeded else None,
        _side_by_side(single) if single else None,
        _curves(named),
    ]
    lead = [Bullets([f"{name}: {_group_outcome(group)}" for name, group in named.items()])]
    return Page("Comparison", lead, [section for section in found if section])


def _advice(groups: Sequence[Group]) -> Section | None:
    """What the runs' numbers ask for, each once with the runs that have it; None: nothing."""
    found = of_reports(group.reports for group in groups)
    return Section("Advice", [Bullets([_shared(one, groups) for one in found])]) if found else None


def _shared(one: Shared, groups: Sequence[Group]) -> str:
    named, left = [], set(one.runs)
    for group in groups:
        if left.issuperset(group.reports):
            named.append(_group_name(group))
            left -= group.reports.keys()
    named += [inline(run) for run in one.runs if run in left]
    numbers = "" if one.alike else f" The numbers are those of {inline(one.runs[0])}."
    said = one.advice
    return f"{', '.join(named)}: **{said.about}: {said.found}.** {said.reason}. {said.do}.{numbers}"


def _judged_apart(groups: Sequence[Group]) -> list[str]:
    """A warning where the runs' numbers are of different rows, or may be."""
    judged = [
        report["evaluation"]["measured_on"] for group in groups for report in group.reports.values()
    ]
    tables = [one.get("table") for one in judged]
    if any(
        len({one["snapshot"] for one in judged if one.get("table") == table}) > 1
        for table in tables
    ):
        return [
            "**These runs were judged on different held-out rows: their numbers are not comparable "
            "one to one.**"
        ]
    if len(set(tables)) > 1:
        return [
            "Some were judged on text alone, others on scored text: the same text if data and "
            "holdout agree."
        ]
    return []


def _group_name(group: Group) -> str:
    seeds = f" ({len(group.seeds)} seeds)" if len(group.seeds) > 1 else ""
    return inline(next(iter(group.reports))) + seeds


def _group_outcome(group: Group) -> str:
    if len(group.seeds) == 1:
        return str(group.first["outcome"])
    runs = ", ".join(
        f"seed {seed} in {inline(run)}"
        for run, seed in zip(group.reports, group.seeds, strict=True)
    )
    measure = "kl_teacher" if "kl_teacher" in group.difference() else "cross_entropy"
    mean, half = group.difference().get(measure, (0.0, None))
    if half is None:
        return f"{runs}. No baseline to compare with."
    name = {"kl_teacher": "KL to the teacher", "cross_entropy": "cross-entropy"}[measure]
    clear = "" if abs(mean) > half else ", so it does not clearly differ"
    return f"{name} {nats(mean)} ± {nats(half)} nats against cross-entropy alone{clear} ({runs})."


def _side_by_side(groups: Sequence[Group]) -> Section:
    """Runs of one seed each."""
    return _table(
        groups,
        [group.first["evaluation"]["results"] for group in groups],
        "± is one standard error.",
    )


def _over_seeds(groups: Sequence[Group]) -> Section:
    """Runs of several seeds: means and intervals.

    It also shows how the student differs from the baseline of its seed.
    """
    found = []
    for group in groups:
        arms = group.results() | {"difference": group.difference()}
        found.append({arm: _with_errors(intervals) for arm, intervals in arms.items()})
    note = (
        "± is half of the 95 % interval over seeds (Student's t): what another seed would give, "
        "on the same data. The difference is taken seed by seed."
    )
    return _table(groups, found, note)


def _table(groups: Sequence[Group], results: Sequence[Results], note: str) -> Section:
    """One block of lines per group."""
    columns = measures([arm for arms in results for arm in arms.values()])
    bound = any(
        r["evaluation"]["measured_on"]["kl_is_lower_bound"]
        for g in groups
        for r in g.reports.values()
    )
    rows = [
        [_group_name(group), *row]
        for group, arms in zip(groups, results, strict=True)
        for row in result_rows(arms, columns)
    ]
    seeds = "" if len(groups[0].seeds) == 1 else " over seeds"
    unit = _unit([report for group in groups for report in group.reports.values()])
    headers = result_headers(columns, bound=bound, unit=unit)
    return Section(f"Results{seeds}", [Table(["run", *headers], rows, text_columns=2), Text(note)])


def _unit(reports: Sequence[Mapping[str, Any]]) -> str:
    """What numbers of these are means over."""
    return " or ".join(sorted({unit_of(report["evaluation"]["measured_on"]) for report in reports}))


def _curves(named: Mapping[str, Group]) -> Section | None:
    """Losses and KL by position of the students, a colour per group; of several seeds the first."""
    chosen = [
        (name, f"run-{n}", group.first)
        for n, (name, group) in enumerate(named.items())
        if n < COLOURS
    ]
    plain = {name: name.replace("`", "") for name, _, _ in chosen}
    trained = [(plain[name], colour, report["train"]["student"]) for name, colour, report in chosen]
    unit = _unit([report for _, _, report in chosen])
    panels: list[Panel] = figures.losses(trained, of=unit)
    views = [
        (name, colour, (report["evaluation"].get("views") or {}).get("by_position"))
        for name, colour, report in chosen
    ]
    lines = [(plain[name], colour, "student", about) for name, colour, about in views if about]
    if apart := [line for line in lines if line[3]["measure"] == "kl_teacher"]:
        lines = apart  # what is left out has no teacher to be near to
    if panel := figures.by_position(lines):
        panels.append(panel)
    numbers: list[Block] = []
    for name, _, report in chosen:
        if curve := sections.curve("student", report["train"]["student"]):
            numbers.append(Section(name, curve.blocks))
    return Section("Curves of the students", [Figures(panels, numbers)]) if panels else None


def _with_errors(intervals: Mapping[str, Interval]) -> dict[str, float | None]:
    """Means and half-widths under the names of means and errors."""
    means = {name: mean for name, (mean, _) in intervals.items()}
    return means | {f"{name}_se": half for name, (_, half) in intervals.items()}


def _differing(recipes: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Fields that are not the same in all recipes: the field, then its value in each.

    The run's own folder is left out.
    """
    flat = [_flat(recipe) for recipe in recipes]
    fields = dict.fromkeys(field for recipe in flat for field in recipe if field != "run.dir")
    values = {field: [recipe.get(field, "-") for recipe in flat] for field in fields}
    return [[inline(field), *found] for field, found in values.items() if len(set(found)) > 1]


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted path -> value as text; nothing for null."""
    found: dict[str, str] = {}
    for name, value in section.items():
        if isinstance(value, Mapping) and "shape" in value:
            found[f"{prefix}{name}"] = sections.scheduled(value)
        elif isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = str(value)
    return found
