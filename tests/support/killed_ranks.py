"""Trainings whose ranks are killed with SIGKILL at a moment drawn.

They go on by another number of ranks.
"""

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tiny_llama import save_tiny_llama
from tiny_store import SilentProgress, make_job, make_recipe, make_store, random_texts, snapshot_of
from together import start

from stillroom.stages.workers.job import Job, StopFlag
from stillroom.stages.workers.ranks import Ranks

Way = tuple[int, str]
"""So many ranks, and how they hold the student."""
WAYS: tuple[Way, ...] = ((2, "ddp"), (1, "ddp"), (2, "fsdp2"), (4, "fsdp2"), (2, "ddp"))
TOKENS, EVERY = 2400, 2
MOMENTS = 40
"""A rank is killed at one of its first so many moments; a step has four or more, a checkpoint three
or more."""
_OWN = ("progress", "stop", "clock", "ranks", "journal")
"""What of a job is a process's own."""


@dataclass
class Outcome:
    """Of one training, killed again and again."""

    kills: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    """How often which rank of how many was killed."""
    steps: int = 0
    again: int = 0
    """Steps that were made again."""
    missing: int = 0
    twice: int = 0
    apart: float = 0.0
    """The largest relative difference of a step's loss from that of the undisturbed training."""


class World:
    """A store to train from, and the training that nobody disturbs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._teacher = save_tiny_llama(folder / "teacher", initializer_range=0.6)
        self._store = make_store(folder / "store", self._teacher, texts=random_texts(60))
        self._train = snapshot_of(self._store).id
        self.steps = self._run(folder / "undisturbed", (1, "ddp"), 0, None)[1]

    def killed(self, name: str, seed: int, ways: Sequence[Way] = WAYS) -> Outcome:
        """One training by these ways, one after another, each but the last killed in the middle."""
        draw, outcome, folder = random.Random(seed), Outcome(), self._folder / name
        begun, made = [0], []
        for number, way in enumerate(ways):
            victim = draw.randrange(way[0]), draw.randint(1, MOMENTS)
            last = number == len(ways) - 1
            codes, steps = self._run(folder, way, number, None if last else victim)
            made.append(steps)
            if -signal.SIGKILL not in codes:
                assert codes == [0] * way[0], f"{name}: ranks ended with {codes}"
                break
            outcome.kills += 1
            outcome.dead[f"{victim[0] + 1} of {way[0]}"] += 1
            there = (folder / "checkpoints").glob("step-*/state.json")
            begun.append(max((int(f.parent.name.removeprefix("step-")) for f in there), default=0))
        assert (folder / "train.json").exists()
        ends = [*begun[1:], len(self.steps)][: len(made)]
        lasting: dict[int, tuple[list[int], float]] = {}
        for first, end, steps in zip(begun, ends, made, strict=False):
            lasting |= {n: step for n, step in steps.items() if first < n <= end}
            outcome.again += sum(n > end for n in steps)
        outcome.steps = len(self.steps)
        for number, (samples, loss) in self.steps.items():
            found, its_loss = lasting.get(number, ([], float("inf")))
            outcome.missing += (Counter(samples) - Counter(found)).total()
            outcome.twice += (Counter(found) - Counter(samples)).total()
            outcome.apart = max(outcome.apart, abs(its_loss - loss) / abs(loss))
        return outcome

    def _run(
        self, folder: Path, way: Way, number: int, victim: tuple[int, int] | None
    ) -> tuple[list[int | None], dict[int, tuple[list[int], float]]]:
        """How the ranks ended, and of each step that they made the samples of all and the loss."""
        ranks, sharding = way
        recipe = make_recipe(
            self._store,
            self._teacher,
            train={"tokens": TOKENS, "checkpoint_every_steps": EVERY},
            compute={"sharding": sharding},
        )
        job = make_job(recipe, folder, train=self._train)
        shared = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in _OWN}
        log = folder / f"attempt-{number}"
        log.mkdir(parents=True)
        group = start(train_logged, shared, log, victim, ranks=ranks)
        group.join()
        steps: dict[int, tuple[list[int], float]] = {}
        for file in log.iterdir():
            for line in map(json.loads, file.read_text().splitlines()):
                others, _ = steps.get(line["step"], ([], 0.0))
                steps[line["step"]] = (others + line["samples"], line["loss"])
        return group.codes, steps


def train_logged(
    ranks: Ranks, shared: Mapping[str, Any], log: Path, victim: tuple[int, int] | None
) -> None:
    """Train; each step's part of the samples goes to a file, and the victim dies at its moment."""
    from stillroom.stages.train import stage
    from stillroom.stages.train import trainer as module
    from stillroom.storage.files.local import LocalFiles

    left = [victim[1] if victim and victim[0] == ranks.rank else -1]

    def moment() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    parts: dict[tuple[int, ...], list[int]] = {}
    own_part, own_step, own_pass = module.part_of, module.Trainer.step, module.Trainer._pass

    def part_of(samples: Any, *args: Any, **more: Any) -> Any:
        part = own_part(samples, *args, **more)
        parts[tuple(one.number for one in samples)] = [one.number for one in part]
        return part

    def step(self: Any, step: Any, **more: Any) -> Any:
        moment()
        result = own_step(self, step, **more)
        samples = parts[tuple(one.number for one in step.samples)]
        line = {"step": step.after.step, "samples": samples, "loss": result.losses.loss}
        file.write(json.dumps(line) + "\n")
        moment()
        return result

    def passed(*args: Any) -> Any:
        moment()
        return own_pass(*args)

    def counted(primitive: Any) -> Any:
        def done(*args: Any) -> Any:
            found = primitive(*args)
            moment()
            return found

        return done

    module.part_of = part_of
    module.Trainer.step = step  # type: ignore[method-assign]
    module.Trainer._pass = passed  # type: ignore[method-assign]
    for name in ("_write", "_link", "_unlink"):
        setattr(LocalFiles, name, counted(getattr(LocalFiles, name)))
    with (log / str(ranks.rank)).open("w", buffering=1) as file:
        stage.run(Job(progress=SilentProgress(), stop=StopFlag(), ranks=ranks, **shared))
