"""A `train` whose ranks only meet, step by step, with faults at a step of a rank: for what is done about ranks.

The student is trained by the first rank alone, at the end. `FAULT` in the environment is
`<what>:<rank>:<step>`; it comes once, or each time where `<what>` ends with `!`.
"""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from running import two_gpus

from stillroom.stages.recipe.run_folder import CHECKPOINTS, TOKENS_PER_PASS
from stillroom.stages.train import stage
from stillroom.stages.workers.job import Job, StageResult
from stillroom.stages.workers.ranks import Ranks
from stillroom.storage.errors import EngineDied, Stopped, UsageError

STEPS = 12
CHECKPOINT = 4
_plain = stage.run


def meet_in_train() -> None:
    """Let the stage `train` of this process, and of those forked from it, be this one."""
    stage.run = meet


def meet_on_two_gpus() -> None:
    """The same, on two GPUs that are not there."""
    meet_in_train()
    two_gpus()


def meet(job: Job) -> StageResult:
    """Meet so often, with a checkpoint now and then, and before a stop."""
    folder = job.train_dirs[job.arm]
    with (folder / f"rank-{job.ranks.rank}").open("a") as file:
        seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
        seen |= {
            name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
        }
        file.write(f"{os.getpid()} {seen}\n")
    first = max((int(p.name) for p in (folder / CHECKPOINTS).glob("*")), default=0)
    job.progress.start(total=STEPS, unit="steps", done=first)
    for step in range(first, STEPS):
        try:
            job.agreed_stop()
        except Stopped:
            _save(job, folder, step)
            raise
        _fault(job, folder, step)
        met = job.ranks.sum(torch.ones(1))
        assert met.item() == job.ranks.count
        job.progress.advance()
        if step % CHECKPOINT == CHECKPOINT - 1:
            _save(job, folder, step + 1)
    result = _plain(replace(job, ranks=Ranks())) if job.ranks.first else StageResult()
    job.ranks.told(None)
    return result


def _save(job: Job, folder: Path, step: int) -> None:
    if job.ranks.first:
        (folder / CHECKPOINTS / f"{step}").mkdir(parents=True, exist_ok=True)
    job.ranks.told(None)


def _fault(job: Job, folder: Path, step: int) -> None:
    what, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
    if (job.ranks.rank, step) != (int(rank), int(at)):
        return
    if not what.endswith("!"):
        if (folder / "fault").exists():
            return
        (folder / "fault").touch()
    match what.rstrip("!"):
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "error":
            raise UsageError("checkpoint: holds something else. Delete it.")
        case "memory":
            smaller = folder / TOKENS_PER_PASS
            tokens = int(smaller.read_text()) // 2 if smaller.exists() else 256
            if tokens >= 64:
                smaller.write_text(f"{tokens}")
                raise EngineDied(f"out of memory: passes now hold {tokens} tokens")
        case "wait":
            (folder / "waits").touch()
            time.sleep(600) if "STOP_ALONE" in os.environ else signal.pause()
