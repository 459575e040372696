"""The names in a run's folder, `run.dir`: who writes a file there and who reads it ask here.

    logs/                   what each stage's process printed
    latest                  leads to the student's training run
    report.json .md .html   what was gained, for programs and for people
    train-1a2b3c4d/         one training run, named by the hash of its settings
        settings.json       what decides it, written as it begins
        student/            the model
        adapter/            its LoRA alone, where the recipe keeps it
        train.json          written last: its existence means trained
        evaluation.json     written last: its existence means judged; of the arm `student` alone

Files that one module alone writes and reads are named there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...storage.bounds import NOT_AS_WRITTEN, mapping, parsed
from ...storage.errors import IntegrityError, in_short

LOGS = "logs"
LATEST = "latest"
REPORT = "report.json"
REPORT_TEXT = "report.md"
REPORT_PAGE = "report.html"

SETTINGS = "settings.json"
STUDENT = "student"
ADAPTER = "adapter"
TRAINED = "train.json"
EVALUATED = "evaluation.json"


def training_run(run_dir: Path, settings_hash: str) -> Path:
    """The folder of one training run."""
    return run_dir / f"train-{settings_hash[:8]}"


def begun_runs(run_dir: Path) -> list[Path]:
    """The settings of every training run that was begun."""
    return sorted(run_dir.glob(f"train-*/{SETTINGS}"))


def read_record(path: Path) -> dict[str, Any]:
    """What a JSON file of a run's folder holds.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is not as a run writes it.
    """
    with as_a_run_writes(path):
        return mapping(parsed(path.read_bytes()))


@contextmanager
def as_a_run_writes(what: Path | str) -> Iterator[None]:
    """Take something from records of a run's folder: they come from other people, or may be damaged.

    Raises:
        IntegrityError: they hold something else than a run writes; `what` names them.
    """
    try:
        yield
    except NOT_AS_WRITTEN as error:
        raise IntegrityError(
            f"{what}: not as a run writes it ({in_short(error)}). Delete the file, and run the "
            "recipe again, which makes it anew."
        ) from error
