"""The process of one stage: reads its job from the runner, does it, answers, and dies if the runner dies.

Its standard output and error go to the stage's log; only the progress line reaches the terminal.
"""

import errno
import io
import json
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from ..stages.engine import EngineDied
from ..stages.identity import FileHashes, Identity
from ..stages.job import Job, StageResult, StopFlag
from ..stages.locks import only_one
from ..stages.sections import Recipe
from ..storage.errors import StillroomError, Stopped
from ..storage.files import DISK_FULL
from .binding import author_identity, teacher_identity
from .progress import StageProgress

JOB_FD = "STILLROOM_JOB_FD"


def main() -> None:
    """Do one job; the exit status is the answer's, the answer says more."""
    line = socket.socket(fileno=int(os.environ.pop(JOB_FD)))
    line.set_inheritable(False)  # what the stage starts must not keep the line open after its death
    job = line.makefile("r").readline()
    if not job:  # the runner was stopped before it said what to do
        sys.exit(Stopped.exit_code)
    message = json.loads(job)
    threading.Thread(target=_die_with_runner, args=(line,), daemon=True).start()
    stop = StopFlag()
    stop.listen()
    stream = _to_log(Path(message["log"]))
    progress = StageProgress(message["name"], stream, quiet=message["quiet"])
    try:
        answer = _answer(_run(message, progress, stop))
    except EngineDied as error:
        traceback.print_exc()
        answer = {"error": f"{message['name']}: the engine died: {error}.", "exit_code": 1, "died": True}
    except StillroomError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    except MemoryError:
        answer = {"error": f"{message['name']}: out of memory. Lower the stage's batch tokens.", "exit_code": 1}
    except Exception as error:
        traceback.print_exc()
        answer = {"error": f"{message['name']}: {_cause(error)}", "exit_code": 1, "unexpected": True}
    progress.finish()
    sys.stderr.flush()
    line.sendall(json.dumps(answer).encode() + b"\n")
    # Engines leave threads and children whose clean-up takes seconds; all that matters is committed by now.
    os._exit(answer.get("exit_code", 0))


def _cause(error: Exception) -> str:
    """What a library said; where the disk is full, what to do about it."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{error}; {DISK_FULL}." if full or "No space left" in str(error) else f"{type(error).__name__}: {error}"


def _die_with_runner(line: socket.socket) -> None:
    """The runner never writes again: what ends this wait is its death. Take the whole process group along."""
    line.recv(1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


class _Log(io.FileIO):
    """The log of a stage. On a full disk its lines are lost, so that the stage lives to say that the disk is full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _to_log(path: Path) -> TextIO:
    """Send everything that is printed to the log; returns the terminal (or pipe) for the progress line."""
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Log(2, "w", closefd=False)), line_buffering=True)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    return terminal


def _run(message: dict[str, Any], progress: StageProgress, stop: StopFlag) -> StageResult:
    recipe = Recipe.model_validate(message["recipe"])
    job = Job(
        recipe=recipe,
        progress=progress,
        stop=stop,
        train_dirs={arm: Path(path) for arm, path in message.pop("train_dirs").items()},
        journal=Path(message["journal"]),
        **message["job"],
    )
    stage = message["stage"]
    if stage == "data":
        from ..stages import data

        return data.run(job)
    if stage in ("generate", "score"):
        return _run_teacher(stage, job)
    if stage == "train":
        return _train(job)
    from ..stages import evaluate

    return evaluate.run(job)


def _train(job: Job) -> StageResult:
    """One process trains a student; any other waits and then finds it done, or goes on where the first one died."""
    from ..stages import train

    def waiting(who: str) -> None:
        job.progress.say(f"{who} trains this student: waiting for it")

    with only_one(job.train_dirs[job.arm] / ".training", waiting=waiting, look=job.stop.check):
        return train.run(job)


def _run_teacher(stage: str, job: Job) -> StageResult:
    hashes = FileHashes(job.recipe.storage.dir, remember=True)
    teacher = teacher_identity(job.recipe, hashes, download=True)
    _check_planned(teacher, job.teacher_id, "teacher")
    if stage == "score":
        from ..stages import score

        return score.run(job, teacher)
    from ..stages import generate

    author = author_identity(job.recipe, teacher, hashes, download=True)
    _check_planned(author, job.author_id, "generate.model")
    return generate.run(job, author)


def _check_planned(model: Identity, planned: str, field: str) -> None:
    """Rows are kept under the planned identity, so nothing else may be loaded."""
    if model.id != planned:
        raise StillroomError(
            f"{field}: the files in {model.folder} changed since the plan was made (planned {planned[:8]}, "
            f"found {model.id[:8]}). Run the same command again."
        )


def _answer(result: StageResult) -> dict[str, Any]:
    return {
        "rows": result.rows,
        "tokens": result.tokens,
        "rejected": result.rejected,
        "details": result.details,
    }


if __name__ == "__main__":
    main()
