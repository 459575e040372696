"""Ranks of which one works while the others wait for it, well or with a fault."""

import os
import signal
import time
from contextlib import suppress
from typing import Any

from together import Left

from stillroom.stages.workers.ranks import Ranks
from stillroom.storage.errors import NotTogether


def waited_for(ranks: Ranks, seconds: float, how: str, victim: int, fault: str) -> Any:
    """What a rank is told while `victim` does something, which `how` makes the others wait for.

    Whoever is told that it hangs ends it.
    """
    pids = ranks.all(os.getpid())
    began: list[int] = []

    def work() -> int:
        began.append(ranks.rank)
        if ranks.rank == victim:
            _do(fault, seconds)
        return ranks.rank

    try:
        found = {"found": getattr(ranks, how)(work)}
    except Exception as error:
        found = {"error": type(error).__name__, "said": str(error), "lost": ranks.lost(error)}
        if ranks.rank != victim and found["lost"]:
            with suppress(ProcessLookupError):
                os.kill(pids[victim], signal.SIGKILL)
    return Left(found | {"began": began}) if "error" in found else found | {"began": began}


def _do(fault: str, seconds: float) -> None:
    match fault:
        case "busy":  # for longer than a collective waits
            until = time.monotonic() + 1.5 * seconds
            while time.monotonic() < until:
                sum(range(1000))
        case "idle":
            while True:
                signal.pause()
        case "kill" | "stop":
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        case "alone":
            raise NotTogether("compute.processes: has a norm. Set it to 1.")
        case "memory":
            raise MemoryError("no room")
