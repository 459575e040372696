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

from pathlib import Path

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
