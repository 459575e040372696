"""The process of one stage reads its job from the runner, does it, and answers.

It dies if the runner dies. Its standard output and error go to the stage's log. What it does and
says it tells the runner, who shows it.
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
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from typing_extensions import override

from ...stages.models.identity import Identity
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import Stage, stage_named
from ...stages.workers.clock import Clock
from ...stages.workers.job import Job, Progress, StageResult, StopFlag
from ...stages.workers.locks import one_group
from ...stages.workers.ranks import Ranks
from ...stages.workers.watch import Suspicion
from ...storage.credentials import cleaned, hide, shown
from ...storage.errors import EngineDied, NotTogether, ProcessDied, StillroomError, Stopped
from ...storage.files.base import DISK_FULL
from ...storage.store.hashes import FileHashes
from ..plan.resolve import author_identity, teacher_identity
from ..printing.text import printable
from .progress import ToldProgress

JOB_FD = "STILLROOM_JOB_FD"
UNSENT_BYTES = 1 << 16


def main() -> None:
    """Do one job; the exit status is the answer's, the answer says more."""
    line = Line(socket.socket(fileno=int(os.environ.pop(JOB_FD))))
    asked = line.job()
    if not asked:  # the runner was stopped before it said what to do
        sys.exit(Stopped.exit_code)
    message = json.loads(asked)
    clock = Clock(began=message.get("began"))
    threading.Thread(target=line.die_with_runner, daemon=True).start()
    ranks = Ranks.here()
    stop = StopFlag(agreed=ranks.count > 1)
    stop.listen()
    hide(**message["hidden"])
    to_log(Path(message["log"]))
    progress = ToldProgress(message["name"], line.tell)
    try:
        with clock.span("start"):
            meet(ranks, progress, line.tell)
        job = job_of(message, progress, stop, clock=clock, ranks=ranks)
        answer = answer_of(do(job, message["name"]), clock)
        ranks.close()
    except Exception as error:
        answer = failed(error, message["name"], ranks)
    progress.finish()
    sys.stderr.flush()
    line.answer(answer)
    # Engines leave threads and children whose clean-up takes seconds; all that matters is committed
    # by now.
    os._exit(answer.get("exit_code", 0))


def meet(ranks: Ranks, progress: Progress, tell: Callable[[dict[str, Any]], None]) -> None:
    """Meet the other ranks.

    Of one that hangs it is said so, when the others have waited for it.
    """

    def suspect(found: Suspicion) -> None:
        tell({"event": "hangs", "ranks": found.ranks, "text": found.text})
        progress.say(found.text)

    ranks.open(suspect=suspect)


def failed(error: Exception, name: str, ranks: Ranks) -> dict[str, Any]:
    """What is answered where a stage has failed."""
    if lost := ranks.lost(error):
        traceback.print_exc()
        return {"error": f"{name}: {lost}.", "exit_code": 1, "died": True, "lost": True}
    if isinstance(error, ProcessDied):
        traceback.print_exc()
        engine = isinstance(error, EngineDied)
        said = f"{name}: the engine died: {error}." if engine else str(error)
        return {"error": said, "exit_code": 1, "died": True}
    if isinstance(error, StillroomError):
        alone = isinstance(error, NotTogether)
        return {"error": str(error), "exit_code": error.exit_code, "alone": alone}
    if isinstance(error, MemoryError):
        said = f"{name}: out of memory. Lower the stage's batch tokens."
        return {"error": said, "exit_code": 1}
    traceback.print_exc()
    return {"error": shown(f"{name}: {_cause(error)}"), "exit_code": 1, "unexpected": True}


def _cause(error: Exception) -> str:
    """What a library said; where the disk is full, what to do about it."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (
        f"{error}; {DISK_FULL}."
        if full or "No space left" in str(error)
        else f"{type(error).__name__}: {error}"
    )


class Line:
    """The way to the runner: events while the stage works, and one answer at its end.

    Each of them is a line of JSON.
    """

    def __init__(self, line: socket.socket) -> None:
        line.set_inheritable(
            False
        )  # what the stage starts must not keep the line open after its death
        self._line = line
        self._lock = threading.Lock()
        self._unsent = b""

    def job(self) -> str:
        """What the runner says first, and never again; empty if it was stopped before."""
        return self._line.makefile("r").readline()

    def tell(self, event: dict[str, Any]) -> None:
        """Tell an event.

        The stage never waits for a runner that does not read (somebody suspended it): then the
        event is lost.
        """
        with self._lock:
            if len(self._unsent) < UNSENT_BYTES:
                self._unsent += json.dumps(event).encode() + b"\n"
            try:
                sent = self._line.send(self._unsent, socket.MSG_DONTWAIT)
            except OSError:  # full, or the runner is gone
                return
            self._unsent = self._unsent[sent:]

    def answer(self, answer: dict[str, Any]) -> None:
        """The last that is said."""
        with self._lock:
            self._line.sendall(self._unsent + json.dumps(answer).encode() + b"\n")

    def die_with_runner(self) -> None:
        """What ends this wait is the runner's death. Take the whole process group along."""
        self._line.recv(1)
        os.killpg(os.getpgrp(), signal.SIGKILL)


class _Log(io.FileIO):
    """The log of a stage.

    On a full disk its lines are lost, so that the stage lives to say that the disk is full.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class _LogText(io.TextIOWrapper):
    """A log is read in a terminal, so nothing in it steers one.

    What a bar draws over itself stands in lines.
    """

    @override
    def write(self, text: str, /) -> int:
        return super().write(printable(text.replace("\r", "\n")))


def to_log(path: Path) -> None:
    """Send everything that is printed to the log."""
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    log_file = _LogText(io.BufferedWriter(_Log(2, "w", closefd=False)), line_buffering=True)
    sys.stdout = sys.stderr = cleaned(log_file, shown)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )


def job_of(
    message: dict[str, Any],
    progress: Progress,
    stop: StopFlag,
    *,
    clock: Clock,
    ranks: Ranks | None = None,
) -> Job:
    """What a stage is handed, from what its process was told."""
    with clock.span("start"):
        return Job(
            recipe=Recipe.model_validate(message["recipe"]),
            progress=progress,
            stop=stop,
            clock=clock,
            ranks=ranks or Ranks(),
            train_dirs={arm: Path(path) for arm, path in message["train_dirs"].items()},
            journal=Path(message["journal"]),
            **message["job"],
        )


def do(job: Job, name: str) -> StageResult:
    """The stage itself."""
    stage = stage_named(name)
    with job.clock.span("start"):
        entry = import_module(f"...stages.{stage.room}.stage", __package__)
        if stage.loads:
            # Needed anyway: so configs are read by the transformers that stays.
            import_module("torch")
        models = [_model(job, stage)] if stage.loads else []

    def waiting(who: str) -> None:
        job.progress.say(f"{who} trains this student: waiting for it")

    # One process, or one group of ranks, trains a student. Any other waits: then it finds the
    # student done, or goes on where the first one died.
    alone = (
        one_group(
            job.train_dirs[job.arm] / ".training",
            job.ranks,
            waiting=waiting,
            look=job.agreed_stop,
        )
        if stage.arm
        else nullcontext()
    )
    with alone:
        result: StageResult = entry.run(job, *models)
    return result


def _model(job: Job, stage: Stage) -> Identity:
    """What a stage loads, by the hashes of its files."""
    hashes = FileHashes(job.recipe.storage.dir, remember=True)
    teacher = teacher_identity(job.recipe, hashes, download=True)
    taught = job.recipe.generate is not None and job.recipe.generate.teaches  # by the author
    if not taught:
        _check_planned(teacher, job.teacher_id, "teacher")
    if stage.loads == "teacher":
        return teacher
    author = author_identity(job.recipe, teacher, hashes, download=True)
    _check_planned(author, job.author_id, "generate.model")
    return author


def _check_planned(model: Identity, planned: str, field: str) -> None:
    """Rows are kept under the planned identity, so nothing else may be loaded."""
    if model.id != planned:
        raise StillroomError(
            f"{field}: the files in {model.folder} changed since the plan was made (planned "
            f"{planned[:8]}, found {model.id[:8]}). Run the same command again."
        )


def answer_of(result: StageResult, clock: Clock) -> dict[str, Any]:
    """What the runner is told of it."""
    return {
        "rows": result.rows,
        "tokens": result.tokens,
        "rejected": result.rejected,
        "left": result.left,
        "details": result.details | {"clock": clock.seconds()},
    }


if __name__ == "__main__":
    main()
