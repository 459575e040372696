"""Trainings by several ranks: one process each, started once for many jobs. `python ranked.py FOLDER`."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from tiny_store import SilentProgress

from stillroom.stages.workers.job import Job, StopFlag

_OWN = ("progress", "stop", "clock", "ranks", "journal")
"""What of a job is a process's own."""
Case = Mapping[str, Any]
"""`job`: its fields; `wrong`: what of the product is replaced by something wrong, by the names below."""


def case_of(job: Job, **more: Any) -> Case:
    """A job that ranks can be handed."""
    return {"job": {f.name: getattr(job, f.name) for f in fields(job) if f.name not in _OWN}} | more


def train_by_ranks(cases: list[Case], folder: Path, *, ranks: int = 2) -> list[list[Any]]:
    """Train all of them; of each case what each rank noted, or its error."""
    folder.mkdir(parents=True)
    (folder / "cases.pickle").write_bytes(pickle.dumps(cases))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"{rank}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, str(folder)],
                env=os.environ | meet | own,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    try:
        codes = [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(ranks)]
    assert codes == [0] * ranks, "\n\n".join(logs)
    found_by = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]
    return [list(notes) for notes in zip(*found_by, strict=True)]


def train_alone(case: Case) -> Any:
    """The same in this process."""
    from stillroom.stages.workers.ranks import Ranks

    return _trained(case, Ranks())


def _trained(case: Case, ranks: Any) -> Any:
    from stillroom.stages.train import stage
    from stillroom.stages.train import trainer as module

    taken: list[list[int]] = []
    steps: list[float] = []
    own_part = module.part_of
    job = Job(progress=SilentProgress(), stop=StopFlag(), ranks=ranks, **case["job"])

    def part_of(*args: Any, **more: Any) -> Any:
        part = own_part(*args, **more)
        taken.append([sample.number for sample in part])
        return part

    own_step = module.Trainer.step

    def step(*args: Any, **more: Any) -> Any:
        result = own_step(*args, **more)
        steps.append(result.losses.loss)
        return result

    wrong = WRONG.get(case.get("wrong", ""), _nothing)
    with _replaced(module, "part_of", part_of), _replaced(module.Trainer, "step", step), wrong():
        stage.run(job)
    return {"taken": taken, "losses": steps, "said": job.progress.said}  # type: ignore[attr-defined]


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


WRONG: dict[str, Callable[[], Any]] = {}


def main(folder: Path) -> None:
    from stillroom.stages.workers.ranks import Ranks

    ranks = Ranks.here()
    ranks.open()
    notes = []
    for case in pickle.loads((folder / "cases.pickle").read_bytes()):
        try:
            notes.append(_trained(case, ranks))
        except Exception as error:
            if not case.get("fails"):
                raise
            notes.append(error)
    (folder / f"{ranks.rank}.pickle").write_bytes(pickle.dumps(notes))
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
