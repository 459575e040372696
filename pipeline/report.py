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
from . import report_sections as sections
from .markdown import inline, nats, table

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
        sections.results(report["evaluation"], report["settings"].get("recipe", {})),
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


def results_table(results: sections.Results) -> "Table":
    """The results for a terminal, 80 columns wide at most; cross-entropy and KL in nats per token."""
    from rich.table import Table

    answers = sections.has_answers(results)
    drawn = Table("arm", box=None, pad_edge=False)
    for header in ("cross-entropy", "perplexity", "KL", "agreement", "ECE", *["answers"] * answers):
        drawn.add_column(header, justify="right")
    for arm in sections.known_arms(results):
        drawn.add_row(arm, *sections.result_cells(results[arm], answers=answers, errors=False))
    return drawn


def compare(run_dirs: Sequence[Path]) -> str:
    """Several runs side by side as Markdown: first what was different, then what came of it.

    Raises:
        UsageError: a run has no report yet.
    """
    reports = {str(folder): load_report(folder) for folder in run_dirs}
    evaluations = {folder: report["evaluation"] for folder, report in reports.items()}
    differing = _differing([report["settings"].get("recipe", {}) for report in reports.values()])
    answers = any(sections.has_answers(e["results"]) for e in evaluations.values())
    bound = any(e["measured_on"]["kl_is_lower_bound"] for e in evaluations.values())
    rows = [
        [inline(folder), *row]
        for folder, evaluation in evaluations.items()
        for row in sections.result_rows(evaluation["results"], answers=answers)
    ]
    warning = (
        "**These runs were judged on different held-out rows: their numbers are not comparable one to one.**"
        if len({e["measured_on"]["snapshot"] for e in evaluations.values()}) > 1
        else ""
    )
    parts = [
        "# Comparison",
        "\n".join(f"- {inline(folder)}: {report['outcome']}" for folder, report in reports.items()),
        "## What differs",
        table(["recipe field", *reports], differing, text_columns=1 + len(reports))
        if differing
        else "Nothing: the recipes are the same.",
        "## Results",
        warning,
        table(["run", *sections.result_headers(answers=answers, bound=bound)], rows, text_columns=2),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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
        if isinstance(value, Mapping):
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
