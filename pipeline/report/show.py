"""What `stillroom report` does: one run's report, or several side by side; Markdown to read, a page to keep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...storage.errors import UsageError
from ...storage.files.local import LocalFiles
from . import compare as report_compare
from . import html as report_html
from . import markdown as report_markdown
from .report import load_report, page
from .seeds import grouped

COMPARISON = Path("comparison.html")
"""Where a comparison goes that nobody gave a name."""


def show(run_dirs: Sequence[Path], out: Path | None) -> tuple[str, Path, dict[str, Any]]:
    """Markdown, the file that the page is in, and the same for programs.

    A run's page lies in its folder already and is written there only if it is missing; a comparison is written to
    `comparison.html` in the current folder, or to `out`.

    Raises:
        UsageError: a run has no report yet, or the page cannot be written.
    """
    reports = {str(folder): load_report(folder) for folder in run_dirs}
    alone = len(reports) == 1
    content = page(reports[str(run_dirs[0])]) if alone else report_compare.page(reports)
    target = out or (run_dirs[0] / "report.html" if alone else COMPARISON)
    if out is not None or not alone or not target.exists():
        _write(target, report_html.page(content))
    found = {
        "page": str(target),
        "runs": list(reports.values()),
        "over_seeds": [group.summary() for group in grouped(reports)],
    }
    return report_markdown.page(content), target, found


def _write(target: Path, text: str) -> None:
    if target.is_dir():
        raise UsageError(f"{target}: is a folder. Name a file with --out.")
    LocalFiles(target.parent).replace(target.name, text.encode())
