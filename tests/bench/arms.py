"""Many arms of one recipe in this process, by the runner's own plan and stages.

No stage has a process of its own. A stage's process takes seconds to start, an arm of a small
experiment as long to train. Arms whose targets are of other kinds come from other snapshots, and
the order of samples is a function of the snapshot: `one_order` gives all arms of a seed the same
one. Nothing else is changed.
"""

import json
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from stillroom.pipeline.plan.plan import make_plan
from stillroom.pipeline.run import crew, runner, worker
from stillroom.pipeline.run.progress import StageProgress
from stillroom.stages.loader.samples import Sample, Samples
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.workers.clock import Clock
from stillroom.stages.workers.job import StopFlag
from stillroom.storage.snapshots.snapshot import save_snapshot
from stillroom.storage.store.store import Store


def run_arm(
    recipe_file: Path,
    overrides: Sequence[str] = (),
    *,
    until: str | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Run a recipe's stages here; what is done already is not done again.

    Arms that run at the same time need a `run.dir` each.

    Args:
        recipe_file: The recipe.
        overrides: `section.key=value`, as of `--set`.
        until: Last stage to run; None: all.
        report: Draw the report of a run that was judged; it takes longer than a small student.

    Returns:
        `evaluation.json` and `train.json` in one, where they are there; `train_dir`, and
        `train_dirs`
        by arm; ids of the `snapshots` by split.

    Raises:
        StillroomError: as of `stillroom run`.
    """
    recipe = load_recipe(recipe_file, list(overrides))
    undrawn = nullcontext() if report else mock.patch.object(runner, "write_report")
    with mock.patch.object(crew, "StageProcess", _Here), undrawn:
        runner.run(recipe, until=until, quiet=True)
    plan = make_plan(recipe)
    for snapshot in plan.snapshots.values():
        save_snapshot(Store.open(recipe.storage.dir), snapshot)
    found: dict[str, Any] = {
        "snapshots": {split: snapshot.id for split, snapshot in plan.snapshots.items()}
    }
    found["train_dirs"] = {arm: str(folder) for arm, folder in plan.train_dirs.items()}
    if folder := plan.train_dirs.get("student"):
        found["train_dir"] = str(folder)
        for name in ("train.json", "evaluation.json"):
            if (folder / name).is_file():
                found |= json.loads((folder / name).read_text())
    return found


@contextmanager
def one_order() -> Iterator[None]:
    """Samples are read in an order that only their tokens and the seed decide.

    A snapshot is held in memory.
    """
    with mock.patch.object(Samples, "read", _read):
        yield


def _read(samples: Samples, start: int, stop: int | None = None) -> Generator[Sample, None, None]:
    (found,) = samples.batches([range(len(samples))])
    found.sort(key=lambda sample: sample.token_ids.tobytes())
    number = start
    while stop is None or number < stop:
        epoch, first = divmod(number, len(found))
        for index in np.random.default_rng([samples.seed, epoch]).permutation(len(found))[first:]:
            if number == stop:
                return
            yield found[index]
            number += 1


class _Here:
    """A stage in this process, where the runner expects one in a process of its own."""

    group = 0

    def __init__(self, message: dict[str, Any], environment: Mapping[str, str]) -> None:
        self._message = message
        self._answer: dict[str, Any] = {}
        self.ended = False

    def listen(self, seconds: float) -> list[dict[str, Any]]:
        """Do it and answer as a stage's process does."""
        progress = StageProgress(self._message["name"], sys.stderr, quiet=True)
        clock = Clock()
        job = worker.job_of(self._message, progress, StopFlag(), clock=clock)
        self._answer = worker.answer_of(worker.do(job, self._message["name"]), clock)
        self.ended = True
        return []

    def result(self) -> dict[str, Any]:
        """The answer."""
        return self._answer

    def close(self) -> None:
        """There is no process."""
