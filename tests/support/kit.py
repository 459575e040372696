"""What the tests of the whole pipeline share.

That is small prompts, a small recipe, and the command line here and in a process.
"""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from tiny_store import SilentProgress
from typer.testing import CliRunner

from stillroom.pipeline.cli.main import app, main
from stillroom.pipeline.run import worker
from stillroom.pipeline.run.process import StageDied
from stillroom.stages.workers.clock import Clock
from stillroom.stages.workers.job import StopFlag
from stillroom.storage.errors import EngineDied, StillroomError
from stillroom.storage.store.stopping import stop_signals

OPENINGS = (
    "the cat sat",
    "a dog ran",
    "the big red tree",
    "then it was happy and",
    "a small blue mat",
    "the dog saw",
)


def prompts(count: int) -> list[dict[str, Any]]:
    """Different prompts in the tiny tokenizer's words."""
    words = "cat dog tree mat big small red blue happy under on and then ran sat".split()
    return [
        {
            "prompt": (
                f"{OPENINGS[i % 6]} {words[i % 15]} {words[(i // 15) % 15]} {words[(i // 7) % 15]}"
            )
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """One JSON value per line; strings are written as they are."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def recipe_tree(folder: Path, teacher: Path, source: Path, **sections: Any) -> dict[str, Any]:
    """A small white-box recipe on prompts with the `hf` engine.

    Sections given replace or (None) remove its own.
    """
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "seed": 0},
        "storage": {"dir": str(folder / "store"), "commit_rows": 8},
        "teacher": {"model": str(teacher)},
        "student": {"config": {"hidden_size": 8, "num_hidden_layers": 1}},
        "data": {"source": str(source), "format": "prompt", "holdout": 4},
        "generate": {"engine": "hf", "temperature": 0.0, "max_tokens": 12},
        "score": {"k": 4, "batch_tokens": 256},
        "loss": {},
        "train": {"epochs": 2, "tokens_per_step": 128, "learning_rate": 5.0e-3},
        "evaluate": {"tokens": 200, "samples": 1},
    }
    tree |= sections
    return {k: v for k, v in tree.items() if v is not None}


def write_recipe(folder: Path, teacher: Path, source: Path, **sections: Any) -> Path:
    """`recipe_tree` as a file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(folder, teacher, source, **sections)))
    return path


class InThisProcess:
    """In place of `StageProcess`: the same message, the same answer, and no process to start."""

    group = 0

    def __init__(self, message: dict[str, Any], environment: Mapping[str, str]) -> None:
        self._message = message
        self._said: dict[str, Any] | StillroomError = {}
        self.ended = False

    def listen(self, seconds: float) -> list[dict[str, Any]]:
        """All of its work."""
        clock = Clock(began=self._message["began"])
        try:
            job = worker.job_of(self._message, SilentProgress(), StopFlag(), clock=clock)
            self._said = worker.answer_of(worker.do(job, self._message["name"]), clock)
        except EngineDied as error:
            what = f"{self._message['name']}: the engine died: {error}."
            self._said = StageDied(what, "Finished rows are kept.")
        except StillroomError as error:
            self._said = error
        self.ended = True
        return []

    def result(self) -> dict[str, Any]:
        """Its answer; or raises what it failed of."""
        if isinstance(self._said, StillroomError):
            raise self._said
        return self._said

    def interrupt(self) -> None:
        """It hears nothing while it works."""

    def close(self) -> None:
        """It has no process."""


def stillroom(*arguments: Any, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, its stages too, in this process.

    The exit code is checked (None: any).

    A process of its own imports torch and transformers for seconds. Where processes, logs or what
    they say meanwhile are the subject, use `running.start`.
    """
    words = ["stillroom", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        patch.object(sys, "argv", words),
        patch("stillroom.pipeline.run.crew.StageProcess", InThisProcess),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        heard = {number: signal.getsignal(number) for number in stop_signals()}
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        for number, handler in heard.items():  # a command that failed leaves them unheard
            signal.signal(number, handler)
    done = subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
    return done if expect is None else _checked(done, expect)


def command(*arguments: Any) -> list[str]:
    """The real command line."""
    return [sys.executable, "-m", "stillroom", *map(str, arguments)]


# As many threads as this process has: only so do two runs add in one order and write the same bits.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": os.environ.get("STILLROOM_TEST_THREADS", "1")}


def _checked(
    done: subprocess.CompletedProcess[str], expect: int | None
) -> subprocess.CompletedProcess[str]:
    assert expect in (None, done.returncode), (
        f"exit {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}"
    )
    return done


def told(*words: Any, code: int = 0) -> dict[str, Any]:
    """Run a command that starts no stage, in this process.

    Returns:
        What it says to programs, and all of it under `above`.
    """
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout.rstrip("\n").split("\n")[-1])
    return found | {"above": result.stdout}


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The object that `--json` puts on the last line of standard output."""
    return json.loads(done.stdout.rstrip("\n").split("\n")[-1])
