"""The report of a run: what was gained, in one sentence, one table and the facts behind it; as Markdown and as JSON.

It is made from `evaluation.json`, `train.json` and `settings.json` of a training run and from what the runner knows;
nothing here loads a model or opens a store. Several reports can be compared.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.errors import UsageError
from ..storage.files import LocalFiles
from . import report_results as tables
from . import report_sections as sections
from .markdown import inline, nats, percent, table
from .seeds import Group, Interval, grouped

if TYPE_CHECKING:
    from rich.table import Table

TRAINED = ("student", "baseline")


def write_report(run_dir: Path, train_dir: Path, facts: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `report.md` and `report.json` into the run's folder.

    Args:
        run_dir: Folder of the run.
        train_dir: Folder of the student's training run; holds evaluation.json, train.json and settings.json.
        facts: What the runner knows, each shown where it is there: `stages` (name -> rows, rejected, tokens, bytes,
            bytes_per_token, seconds, tokens_per_second), `rejects` (stage -> reasons), `store`, `versions`, `machine`.

    Returns:
        The paths of report.md and report.json.

    Raises:
        UsageError: a file of the training run is missing or unreadable.
    """
    evaluation = _read(train_dir / "evaluation.json")
    settings = _read(train_dir / "settings.json")
    trained = {arm: train_dir.with_name(evaluation["arms"][arm]) for arm in TRAINED if arm in evaluation["arms"]}
    report = {
        "title": sections.title(settings),
        "outcome": outcome(evaluation),
        "run_dir": str(run_dir),
        "train_dir": str(train_dir),
        "evaluation": evaluation,
        "train": {arm: _read(folder / "train.json") for arm, folder in trained.items()},
        "settings": settings,
        "facts": dict(facts),
    }
    contents = {"report.md": render(report), "report.json": json.dumps(report, indent=1, ensure_ascii=False)}
    files = LocalFiles(run_dir)
    for name, content in contents.items():
        files.replace(name, content.encode())
    return run_dir / "report.md", run_dir / "report.json"


def load_report(run_dir: Path) -> dict[str, Any]:
    """The content of a run's `report.json`.

    Raises:
        UsageError: there is none yet.
    """
    return _read(Path(run_dir) / "report.json")


def render(report: Mapping[str, Any]) -> str:
    """A report as Markdown."""
    parts = [
        f"# {report['title']}",
        f"**{report['outcome']}**",
        tables.results(report["evaluation"], report["settings"].get("recipe", {})),
        sections.what_was_run(report),
        *(sections.curve(arm, train) for arm, train in report["train"].items()),
        sections.stages(report["facts"]),
        sections.samples(report["evaluation"]),
        sections.provenance(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def outcome(evaluation: Mapping[str, Any]) -> str:
    """What came of it in one sentence, whichever way it went."""
    results, differences = evaluation["results"], evaluation["differences"]
    other = "baseline" if "baseline" in differences else "student_before"
    than = {"baseline": "cross-entropy alone", "student_before": "before training"}[other]
    measure = "cross_entropy" if results["student"]["kl_teacher"] is None else "kl_teacher"
    bound = evaluation["measured_on"]["kl_is_lower_bound"]
    name = "cross-entropy" if measure == "cross_entropy" else "KL, a lower bound," if bound else "KL"
    values = f"{name} {nats(results['student'][measure])} against {nats(results[other][measure])}"
    if "accuracy" in results["student"]:
        accuracies = [percent(results[arm]["accuracy"]) for arm in ("student", other)]
        values += f"; accuracy {accuracies[0]} against {accuracies[1]}"
    gap, error = differences[other][measure], differences[other][f"{measure}_se"]
    if error is not None and abs(gap) <= 2 * error:
        return (
            f"The distilled student does not clearly differ from {than}: {nats(gap)} ± {nats(error)} nats ({values})."
        )
    if measure == "kl_teacher":
        how = f"{nats(abs(gap))} nats {'closer to' if gap <= 0 else 'farther from'} the teacher"
    else:
        how = f"{nats(abs(gap))} nats {'better' if gap <= 0 else 'worse'} at predicting the held-out text"
    return f"The distilled student is {how} than {than} ({values})."


def results_table(results: tables.Results) -> "Table":
    """The results for a terminal, 80 columns wide at most; cross-entropy and KL in nats per token."""
    from rich.table import Table

    columns = tables.measures(results.values())
    drawn = Table("arm", box=None, pad_edge=False)
    for measure in columns:
        drawn.add_column(measure.short, justify="right", vertical="bottom")
    for arm in tables.known_arms(results):
        drawn.add_row(arm, *tables.result_cells(results[arm], columns, errors=False))
    return drawn


def compare(run_dirs: Sequence[Path]) -> str:
    """Several runs side by side as Markdown: first what was different, then what came of it.

    Runs that differ in `run.seed` (and `run.dir`) only are one: means and 95 % intervals over seeds.

    Raises:
        UsageError: a run has no report yet.
    """
    groups = grouped({str(folder): load_report(folder) for folder in run_dirs})
    seeded, single = [g for g in groups if len(g.seeds) > 1], [g for g in groups if len(g.seeds) == 1]
    differing = _differing([group.recipe() for group in groups])
    snapshots = {r["evaluation"]["measured_on"]["snapshot"] for g in groups for r in g.reports.values()}
    warning = "**These runs were judged on different held-out rows: their numbers are not comparable one to one.**"
    named = {_group_name(group): group for group in groups}
    parts = [
        "# Comparison",
        "\n".join(f"- {name}: {_group_outcome(group)}" for name, group in named.items()),
        "## What differs",
        table(["recipe field", *named], differing, text_columns=1 + len(groups))
        if differing
        else f"Nothing{' but the seed' if seeded else ': the recipes are the same'}.",
        warning if len(snapshots) > 1 else "",
        _over_seeds(seeded) if seeded else "",
        _side_by_side(single) if single else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _group_name(group: Group) -> str:
    seeds = f" ({len(group.seeds)} seeds)" if len(group.seeds) > 1 else ""
    return inline(next(iter(group.reports))) + seeds


def _group_outcome(group: Group) -> str:
    if len(group.seeds) == 1:
        return str(group.first["outcome"])
    runs = ", ".join(f"seed {seed} in {inline(run)}" for run, seed in zip(group.reports, group.seeds, strict=True))
    measure = "kl_teacher" if "kl_teacher" in group.difference() else "cross_entropy"
    mean, half = group.difference().get(measure, (0.0, None))
    if half is None:
        return f"{runs}. No baseline to compare with."
    name = {"kl_teacher": "KL to the teacher", "cross_entropy": "cross-entropy"}[measure]
    clear = "" if abs(mean) > half else ", so it does not clearly differ"
    return f"{name} {nats(mean)} ± {nats(half)} nats against cross-entropy alone{clear} ({runs})."


def _side_by_side(groups: Sequence[Group]) -> str:
    """Runs of one seed each."""
    return _table(groups, [group.first["evaluation"]["results"] for group in groups], "± is one standard error.")


def _over_seeds(groups: Sequence[Group]) -> str:
    """Runs of several seeds: means and intervals, and how the student differs from the baseline of its seed."""
    found = []
    for group in groups:
        arms = group.results() | {"difference": group.difference()}
        found.append({arm: _with_errors(intervals) for arm, intervals in arms.items()})
    note = (
        "± is half of the 95 % interval over seeds (Student's t): what another seed would give, on the same data. The "
        "difference is taken seed by seed."
    )
    return _table(groups, found, note)


def _table(groups: Sequence[Group], results: Sequence[tables.Results], note: str) -> str:
    """One block of lines per group."""
    columns = tables.measures([arm for arms in results for arm in arms.values()])
    bound = any(r["evaluation"]["measured_on"]["kl_is_lower_bound"] for g in groups for r in g.reports.values())
    rows = [
        [_group_name(group), *row]
        for group, arms in zip(groups, results, strict=True)
        for row in tables.result_rows(arms, columns)
    ]
    seeds = "" if len(groups[0].seeds) == 1 else " over seeds"
    headers = tables.result_headers(columns, bound=bound)
    return f"## Results{seeds}\n\n{table(['run', *headers], rows, text_columns=2)}\n\n{note}"


def _with_errors(intervals: Mapping[str, Interval]) -> dict[str, float | None]:
    """Means and half-widths under the names of means and errors."""
    means = {name: mean for name, (mean, _) in intervals.items()}
    return means | {f"{name}_se": half for name, (_, half) in intervals.items()}


def _differing(recipes: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Fields that are not the same in all recipes, the run's own folder aside: the field, then its value in each."""
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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: no such file, so this run is not finished. Run `stillroom run RECIPE` first."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error}). Run `stillroom run RECIPE` again.") from error
    assert isinstance(content, dict)
    return content
