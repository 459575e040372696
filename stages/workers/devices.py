"""The GPUs of this machine, shared out among the workers of a stage: what each of them is to see.

A worker sees no other GPU than its own, by CUDA_VISIBLE_DEVICES of its process. Where that is set
already, what it names is shared out and nothing else.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from ...storage.errors import UsageError
from ...storage.words import counted

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_COUNT = "import torch; print(torch.cuda.device_count())"


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that a process started here would see.

    They are in torch's order.
    """
    named = os.environ.get(VISIBLE)
    count = _counted(named)
    if named is None:
        return list(map(str, range(count)))
    return [name.strip() for name in named.split(",")][:count]


@cache
def _counted(named: str | None) -> int:
    """How many torch sees; asked in a process of its own, for it takes seconds to import."""
    if named == "" or not any(Path(driver).exists() for driver in _DRIVERS):
        return 0
    asked = subprocess.run(
        [sys.executable, "-c", _COUNT], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return int(asked.stdout.split()[-1]) if asked.returncode == 0 else 0


def shared_out(
    workers: int | Literal["auto"], gpus: Sequence[str], *, each: int | None, most: int | None
) -> list[dict[str, str]]:
    """The environment of each worker of a stage.

    Args:
        workers: As `compute.workers` says.
        gpus: That are visible.
        each: GPUs that one worker needs; None: all that there are.
        most: Workers that would find work; `auto` starts no others. None: nobody knows.

    Raises:
        UsageError: there are fewer GPUs than that many workers need.
    """
    if not gpus:
        count = 1 if workers == "auto" else workers
        return [_threads(count)] * count
    size = min(each or len(gpus), len(gpus))  # what an engine needs beyond that it says itself
    groups = [gpus[first : first + size] for first in range(0, len(gpus) - size + 1, size)]
    count = max(1, min(len(groups), most or len(groups))) if workers == "auto" else workers
    if count > len(groups):
        raise UsageError(
            f"compute.workers: {count} workers with {counted(size, 'GPU')} each were asked for, "
            f"and {counted(len(gpus), 'is', 'are')} visible: that is enough for {len(groups)}. "
            "Lower it, or leave it out."
        )
    if len(gpus) == size:
        return [{}]
    return [{VISIBLE: ",".join(group)} for group in groups[:count]]


def one_each(processes: int | Literal["auto"], gpus: Sequence[str]) -> list[dict[str, str]]:
    """The environment of each process that trains a student together with others, or judges it.

    Args:
        processes: As `compute.processes` says.
        gpus: That are visible.

    Raises:
        UsageError: there are fewer GPUs than processes.
    """
    count = max(1, len(gpus)) if processes == "auto" else processes
    if not gpus:
        return [_threads(count)] * count
    if count > len(gpus):
        named = counted(len(gpus), "GPU is", "GPUs are")
        raise UsageError(
            f"compute.processes: {count} processes were asked for, each with a GPU of its own, and "
            f"{named} visible ({', '.join(gpus)}). Lower it, or leave it out: one for each."
        )
    return [{}] if count == 1 else [{VISIBLE: gpu} for gpu in gpus[:count]]


def _threads(workers: int) -> dict[str, str]:
    """Give workers that share the cores of a machine a part of them each.

    It gives nothing where somebody has decided.
    """
    if workers == 1 or THREADS in os.environ:
        return {}
    return {THREADS: str(max(1, cores() // workers))}


def cores() -> int:
    """Of this machine, that this process may use."""
    return len(os.sched_getaffinity(0))


def threads_of(environments: Sequence[Mapping[str, str]]) -> int:
    """How many threads processes compute with that are told these; 0: nobody knows.

    OpenMP takes the first of a list, and each process all cores where it is told nothing.
    """
    found = [own.get(THREADS, os.environ.get(THREADS, str(cores()))) for own in environments]
    first = [said.partition(",")[0].strip() for said in found]
    return sum(map(int, first)) if all(map(str.isdecimal, first)) else 0
