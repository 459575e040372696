"""Ranks of a stage for tests.

They are processes forked from a server that has loaded torch once, so each starts at once.
"""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from stillroom.stages.workers.ranks import COUNT, LOCAL, RANK, Ranks

PATIENCE = 400.0
_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "transformers.models.llama.modeling_llama",
        "stillroom.stages.train.stage",
        "stillroom.stages.train.trainer",
        "stillroom.stages.train.checkpoints",
        "stillroom.stages.evaluate.stage",
        "stillroom.stages.evaluate.metrics",
        "stillroom.stages.evaluate.causal_lm",
        "stillroom.stages.models.students.saving",
        "stillroom.stages.train.together.student",
        "stillroom.stages.audit.before_training",
        "stillroom.stages.loader.passes",
        "torch.utils.tensorboard",
        "pyarrow.parquet",
        "duckdb",
        "pandas",
    ]
)


@dataclass
class Left:
    """What a rank gives back that leaves without the others: they may wait for it elsewhere."""

    found: Any


@dataclass
class Group:
    """Ranks under way."""

    processes: list[BaseProcess]
    _answers: list[Connection]

    def join(self) -> list[Any]:
        """Wait for all; what they gave back, None where one died or raised."""
        found: dict[int, Any] = {}
        numbers = {answer: number for number, answer in enumerate(self._answers)}
        while numbers:
            there = wait(list(numbers), timeout=PATIENCE)
            if not there:
                self.kill()
            for answer in there:
                assert isinstance(answer, Connection)
                number = numbers.pop(answer)
                with suppress(EOFError):  # it died
                    found[number] = answer.recv()
        for process in self.processes:
            process.join()
        return [found.get(number) for number in range(len(self.processes))]

    def kill(self) -> None:
        """All of them, with SIGKILL."""
        for process in self.processes:
            process.kill()

    @property
    def codes(self) -> list[int | None]:
        """How they ended."""
        return [process.exitcode for process in self.processes]


def start(work: Callable[..., Any], *args: Any, ranks: int, seconds: float = PATIENCE) -> Group:
    """Start `work(ranks, *args)`, a function of a module, in so many processes.

    The processes know of one another, and wait so many seconds for one another.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, answers = [], []
    for rank in range(ranks):
        answer, theirs = _SERVER.Pipe(duplex=False)
        process = _SERVER.Process(
            target=_rank, args=(rank, ranks, port, work, args, theirs, seconds), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        answers.append(answer)
    return Group(processes, answers)


def together(work: Callable[..., Any], *args: Any, ranks: int) -> list[Any]:
    """What each of so many ranks gives back; all must."""
    group = start(work, *args, ranks=ranks)
    found = group.join()
    assert group.codes == [0] * ranks, f"ranks ended with {group.codes}"
    return found


def _rank(
    rank: int,
    count: int,
    port: int,
    work: Callable[..., Any],
    args: Sequence[Any],
    answer: Connection,
    seconds: float,
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        RANK: str(rank),
        COUNT: str(count),
        LOCAL: str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = Ranks.here()
    ranks.open(seconds=seconds)
    found = work(ranks, *args)
    if isinstance(found, Left):
        answer.send(found.found)
        return
    answer.send(found)
    ranks.close()
