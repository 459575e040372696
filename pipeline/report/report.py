"""The report of a run, as a page, Markdown and JSON.

It says what was gained, and shows the facts behind it.

It is made from `evaluation.json`, `train.json` and `settings.json` of a training run and from what
the runner knows; nothing here loads a model or opens a store. `compare.py` lays several over one
another.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...stages.recipe.run_folder import (
    EVALUATED,
    REPORT,
    REPORT_PAGE,
    REPORT_TEXT,
    SETTINGS,
    TRAINED,
    as_a_run_writes,
    read_record,
)
from ...storage.credentials import shown
from ...storage.errors import UsageError
from ...storage.files.local import LocalFiles
from ...storage.store.store import MARKER
from ..advice.advise import of_report, of_reports
from ..printing.numbers import nats, percent
from . import classes, compare, html, markdown, run_facts, sections
from .blocks import Bullets, Page, Section, Text
from .results import Results, by_teacher, known_arms, measures, result_cells, unit_of
from .results import results as results_section
from .seeds import grouped

if TYPE_CHECKING:
    from rich.table import Table

COMPARISON = Path("comparison.html")
"""Where a comparison is written, if nobody names a file."""


def write_report(run_dir: Path, train_dir: Path, facts: Mapping[str, Any]) -> Path:
    """Write `report.html`, `report.md` and `report.json` into the run's folder.

    Args:
        run_dir: Folder of the run.
        train_dir: Folder of the student's training run; holds evaluation.json, train.json and
            settings.json.
        facts: What the runner knows, each shown where it is there: `stages` (name -> rows,
            rejected, tokens, bytes, bytes_per_token, seconds, tokens_per_second), `rejects` (stage
            -> reasons), `store`, `versions`, `machine`.

    Returns:
        The path of report.html.

    Raises:
        UsageError: a file of the training run is missing.
        IntegrityError: one is not as a run writes it.
    """
    with as_a_run_writes(f"{train_dir}: {EVALUATED}, {TRAINED} or {SETTINGS}"):
        contents = _contents(run_dir, train_dir, facts)
    files = LocalFiles(run_dir)
    for name, text in contents.items():
        files.replace(name, text.encode())
    return run_dir / REPORT_PAGE


def _contents(run_dir: Path, train_dir: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    evaluation = _read(train_dir / EVALUATED)
    settings = _read(train_dir / SETTINGS)
    trained = {
        arm: train_dir.with_name(evaluation["arms"][arm])
        for arm in ("student", "baseline")
        if arm in evaluation["arms"]
    }
    report: dict[str, Any] = {
        "title": sections.title(settings),
        "outcome": outcome(evaluation),
        "run_dir": shown(str(run_dir)),
        "train_dir": shown(str(train_dir)),
        "evaluation": evaluation,
        "train": {arm: _read(folder / TRAINED) for arm, folder in trained.items()},
        "settings": settings,
        "facts": dict(facts),
    }
    report["advice"] = [one.json() for one in of_report(report)]
    content = page(report)
    return {
        REPORT: json.dumps(report, indent=1, ensure_ascii=False),
        REPORT_TEXT: markdown.page(content),
        REPORT_PAGE: html.page(content),
    }


def load_report(run_dir: Path) -> dict[str, Any]:
    """The content of a run's `report.json`.

    Raises:
        UsageError: there is none yet.
    """
    return _read(Path(run_dir) / REPORT)


def page(report: Mapping[str, Any]) -> Page:
    """What a report says, to be drawn as Markdown or HTML."""
    evaluation = report["evaluation"]
    found = [
        advised(report),
        results_section(evaluation, report["settings"].get("recipe", {})),
        by_teacher(report),
        classes.by_class(evaluation),
        sections.what_was_run(report),
        sections.training(report["train"], of=unit_of(evaluation["measured_on"])),
        sections.distance(evaluation),
        sections.tokens(evaluation),
        sections.samples(evaluation),
        sections.held_out(evaluation),
        run_facts.stages(report["facts"]),
        run_facts.provenance(report),
    ]
    return Page(
        report["title"],
        [Text(f"**{report['outcome']}**")],
        [section for section in found if section],
    )


def advised(report: Mapping[str, Any]) -> Section | None:
    """What the numbers below ask for; None: nothing."""
    found = [f"**{one.about}: {one.found}.** {one.reason}. {one.do}." for one in of_report(report)]
    return Section("Advice", [Bullets(found)]) if found else None


def outcome(evaluation: Mapping[str, Any]) -> str:
    """What came of it in one sentence, whichever way it went."""
    results, differences = evaluation["results"], evaluation["differences"]
    other = "baseline" if "baseline" in differences else "student_before"
    than = {"baseline": "cross-entropy alone", "student_before": "before training"}[other]
    measure = "cross_entropy" if results["student"]["kl_teacher"] is None else "kl_teacher"
    bound = evaluation["measured_on"]["kl_is_lower_bound"]
    name = (
        "cross-entropy" if measure == "cross_entropy" else "KL, a lower bound," if bound else "KL"
    )
    values = f"{name} {nats(results['student'][measure])} against {nats(results[other][measure])}"
    if results["student"].get("accuracy") is not None:
        accuracies = [percent(results[arm]["accuracy"]) for arm in ("student", other)]
        values += f"; accuracy {accuracies[0]} against {accuracies[1]}"
    gap, error = differences[other][measure], differences[other][f"{measure}_se"]
    if error is not None and abs(gap) <= 2 * error:
        gained = f"{nats(gap)} ± {nats(error)} nats"
        return f"The distilled student does not clearly differ from {than}: {gained} ({values})."
    if measure == "kl_teacher":
        how = f"{nats(abs(gap))} nats {'closer to' if gap <= 0 else 'farther from'} the teacher"
    else:
        how = (
            f"{nats(abs(gap))} nats {'better' if gap <= 0 else 'worse'} at predicting the held-out "
            "text"
        )
    return f"The distilled student is {how} than {than} ({values})."


def results_table(results: Results) -> "Table":
    """The results for a terminal, 80 columns wide at most.

    Cross-entropy and KL are in nats per token.
    """
    from rich.table import Table

    columns = measures(results.values())
    drawn = Table("arm", box=None, pad_edge=False)
    for measure in columns:
        drawn.add_column(measure.short, justify="right", vertical="bottom")
    for arm in known_arms(results):
        drawn.add_row(arm, *result_cells(results[arm], columns, errors=False))
    return drawn


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except FileNotFoundError as error:
        if (path.parent / MARKER).is_file():
            raise UsageError(
                f"{path.parent}: is a store, expected the folder of a run. Name the recipe's "
                "run.dir."
            ) from error
        raise UsageError(
            f"{path}: no such file, so this run is not finished. Run `stillroom run RECIPE` first; "
            "a recipe without a student has no report."
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error}). Name the folder of a run.") from error


def show(run_dirs: Sequence[Path], out: Path | None) -> tuple[str, Path, dict[str, Any]]:
    """Markdown, the file that the page is in, and the same for programs.

    A run's page lies in its folder already and is written there only if it is missing; a comparison
    is written to
    `comparison.html` in the current folder, or to `out`.

    Raises:
        UsageError: a run has no report yet, or the page cannot be written.
        IntegrityError: a report is not as a run writes it.
    """
    reports = {str(folder): load_report(folder) for folder in run_dirs}
    with as_a_run_writes(", ".join(f"{folder}/{REPORT}" for folder in run_dirs)):
        return _shown(reports, run_dirs, out)


def _shown(
    reports: Mapping[str, dict[str, Any]], run_dirs: Sequence[Path], out: Path | None
) -> tuple[str, Path, dict[str, Any]]:
    alone = len(reports) == 1
    content = page(reports[str(run_dirs[0])]) if alone else compare.page(reports)
    target = out or (run_dirs[0] / REPORT_PAGE if alone else COMPARISON)
    if out is not None or not alone or not target.exists():
        write_page(target, html.page(content))
    found = {
        "page": str(target),
        "runs": list(reports.values()),
        "over_seeds": [group.summary() for group in grouped(reports)],
        "advice": [one.json() for one in of_reports(g.reports for g in grouped(reports))],
    }
    return markdown.page(content), target, found


def write_page(target: Path, text: str) -> None:
    """Put a page into a file of its own.

    Raises:
        UsageError: there is a folder of that name.
    """
    if target.is_dir():
        raise UsageError(f"{target}: is a folder. Name a file with --out.")
    LocalFiles(target.parent).replace(target.name, text.encode())
