"""The names in a run's folder, `run.dir`: who writes a file there and who reads it ask here.

    logs/                   what each stage's process printed
    answers/                what an endpoint has answered, as it came: it was paid for
    latest                  leads to the student's training run
    report.json .md .html   what was gained, for programs and for people
    train-1a2b3c4d/         one training run, named by the hash of its settings
        settings.json       what decides it, written as it begins
        student/            the model
        adapter/            its LoRA alone, where the recipe keeps it
        checkpoints/        how far it has come; deleted but for the last and the best
        tokens_per_pass     what fits into memory, where less does than the recipe asks for
        alone               why one process trains it, where several were begun and cannot
        train.json          written last: its existence means trained
        evaluation.json     written last: its existence means judged; of the arm `student` alone

Files that one module alone writes and reads are named there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...storage.bounds import NOT_AS_WRITTEN, mapping, parsed
from ...storage.errors import IntegrityError, UsageError, in_short

LOGS = "logs"
ANSWERS = "answers"
LATEST = "latest"
REPORT = "report.json"
REPORT_TEXT = "report.md"
REPORT_PAGE = "report.html"

SETTINGS = "settings.json"
STUDENT = "student"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
COMPLETE = "state.json"
"""Written last into the folder of a checkpoint."""
TOKENS_PER_PASS = "tokens_per_pass"
ALONE = "alone"
TRAINED = "train.json"
EVALUATED = "evaluation.json"

RUN = "run:"
"""Begins a model's name that is a run's folder: the student that was trained there last."""


def training_run(run_dir: Path, settings_hash: str) -> Path:
    """The folder of one training run."""
    return run_dir / f"train-{settings_hash[:8]}"


def standing(folder: Path) -> tuple[list[str], str]:
    """How far a training run has come, to be compared with others.

    It goes by its checkpoints, and by what fits into memory.
    """
    found = sorted(path.parent.name for path in (folder / CHECKPOINTS).glob(f"*/{COMPLETE}"))
    smaller = folder / TOKENS_PER_PASS
    return found, smaller.read_text() if smaller.is_file() else ""


def named_run(model: str | None) -> Path | None:
    """The run's folder that a model's name stands for; None: it names a model."""
    if model is None or not model.startswith(RUN):
        return None
    return Path(model.removeprefix(RUN)).expanduser()


def trained_student(model: str, *, field: str) -> Path:
    """The folder of the student that a run has trained last, where `latest` leads to.

    LoRA is merged in it, so it is a model like any other.

    Args:
        model: `run:RUN_DIR`.
        field: The recipe's field, for messages.

    Raises:
        UsageError: the run is not here, or none, or has no finished student.
    """
    run_dir = named_run(model)
    where = f"{field}: {model}"
    if run_dir is None or model == RUN or "://" in model:
        raise UsageError(
            f"{where} names no folder of this machine, expected run:RUN_DIR, the run.dir of "
            "another recipe. Copy the student's folder here, and name that."
        )
    if not run_dir.is_dir():
        raise UsageError(
            f"{where}: no folder {run_dir} (looked in {Path.cwd()}). Name the run.dir of the "
            "recipe that trained the student."
        )
    training = (run_dir / LATEST).resolve()
    student = training / STUDENT
    if (training / TRAINED).is_file() and (student / "config.json").is_file():
        return student
    raise UsageError(f"{where} {_no_student(run_dir)}")


def _no_student(run_dir: Path) -> str:
    """Why a folder has no student to name, and what to do."""
    if (run_dir / "config.json").is_file():
        return f"is a model's folder, not a run's. Name it without {RUN}"
    if (run_dir / SETTINGS).is_file():
        return (
            f"is one training of a run. Name the run, {RUN}{run_dir.parent}, or "
            f"{run_dir / STUDENT}."
        )
    if begun_runs(run_dir):
        return (
            f"has no finished student ({LATEST} leads to none). Run its recipe to the end of "
            "`train` first."
        )
    return (
        "is no folder in which a student was trained (no train-* in it). Name the run.dir of a "
        "recipe with `student` and `train` that has run."
    )


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
    """Take something from records of a run's folder.

    They come from other people, or may be damaged.

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
