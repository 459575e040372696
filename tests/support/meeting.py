"""Faults at a step of one rank of a training: for what is done about ranks.

`FAULT` in the environment is `<what>:<rank>:<step>`; it comes once, or each time where `<what>`
ends with `!`. Step 0 is where the student is loaded. Each rank notes into the folder of the
training what it is told.
"""

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

from running import two_gpus

from stillroom.stages.recipe.run_folder import CHECKPOINTS, COMPLETE, TOKENS_PER_PASS
from stillroom.stages.train import stage
from stillroom.stages.train.together.smaller import OutOfMemory
from stillroom.stages.workers.job import Job, StageResult
from stillroom.storage.errors import UsageError

TOLD = "CUDA_VISIBLE_DEVICES OMP_NUM_THREADS RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR".split()
_train, _agreed_stop = stage.run, Job.agreed_stop
_steps = 0


def with_faults() -> None:
    """Let the stage `train` of this process, and of those forked from it, be one with faults."""
    stage.run = _noted
    Job.agreed_stop = _after_a_step  # type: ignore[method-assign]


def on_two_gpus() -> None:
    """The same, where a runner thinks that it sees two GPUs, which are not there."""
    with_faults()
    two_gpus()


def _noted(job: Job) -> StageResult:
    global _steps
    folder = job.train_dirs[job.arm]
    with (folder / f"rank-{job.ranks.rank}").open("a") as file:
        file.write(f"{os.getpid()} { {name: os.environ.get(name) for name in TOLD} }\n")
    done = (folder / CHECKPOINTS).glob(f"*/{COMPLETE}")
    _steps = max((int(path.parent.name.removeprefix("step-")) for path in done), default=0)
    from stillroom.stages.train.together import student

    own = student.initial_student

    def loaded(*args: Any) -> Any:
        _perhaps(job, 0)
        return own(*args)

    with patch.object(student, "initial_student", loaded):
        return _train(job)


def _after_a_step(job: Job) -> None:
    global _steps
    _steps += 1
    _perhaps(job, _steps)
    _agreed_stop(job)


def _perhaps(job: Job, now: int) -> None:
    what, rank, step = os.environ.get("FAULT", "none:0:0").split(":")
    fault = job.train_dirs[job.arm] / "fault"
    if (job.ranks.rank, now) == (int(rank), int(step)):
        if what.endswith("!") or not fault.exists():
            fault.touch()
            _do(what.rstrip("!"), job)


def _do(what: str, job: Job) -> None:
    match what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "error":
            raise UsageError("checkpoint: holds something else. Delete it.")
        case "memory":
            smaller = job.train_dirs[job.arm] / TOKENS_PER_PASS
            tokens = int(smaller.read_text()) // 2 if smaller.exists() else 256
            if tokens >= 64:
                raise OutOfMemory(tokens, "HIP out of memory", job.ranks)
        case "wait":
            (Path(job.recipe.run.dir) / "waits").touch()
            signal.pause()
