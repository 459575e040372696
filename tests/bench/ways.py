"""Ways to distil, each at its own best learning rate.

What does a student gain from what is stored of its teacher?

    python tests/bench/ways.py DIR [--only teacher|classify|causal] [--arms hidden,values]
                                   [--seeds 0,1,2,3,4] [--jobs 1] [--report] [--tiny]

teacher    a small BERT trained on banking77's labels, on the spot, in DIR/teacher
classify   its students: labels, logits, logits and one thing more, relations between texts, copied
           layers
causal     students of stories260k on TinyStories' own text: cross-entropy, logits, and one thing
           more

Every student goes through the product's recipe, stages, store and trainer; one store holds what all
of them learn from. An arm's learning rate is the one that is best on validation rows at the first
seed. Test rows are read once a student, at that rate. Everything that is done stays in DIR, student
by student: a second call goes on. `--report` trains nothing. The last line is JSON, which
DIR/report.json has too, as DIR/report.md has the tables.
"""

import json
import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar
from ways_report import best_rate, report
from ways_students import Choice, Students
from ways_tasks import SCALES, Scale, make_teacher, tasks

PARTS = ("teacher", "classify", "causal")
Work = Callable[[Iterable[Choice]], None]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a call is to do."""

    folder: Path
    scale: Scale
    seeds: tuple[int, ...]
    arms: tuple[str, ...] | None
    """None: all."""
    jobs: int


def study(trial: Trial, name: str) -> None:
    """Train all students of a task.

    It is each rate at the first seed, then the best one at every seed, and its test rows.
    """
    students = Students(trial.folder, tasks(trial.folder, trial.scale)[name])
    arms = [arm for arm in students.task.arms if trial.arms is None or arm in trial.arms]
    if not arms:
        return
    students.store(arms)
    rates = trial.scale.rates[name]
    with _workers(trial, name) as work:
        work(Choice(arm=arm, rate=rate, seed=trial.seeds[0]) for arm in arms for rate in rates)
        tried = [one for one in students.read("validation") if one["seed"] == trial.seeds[0]]
        best = {arm: best_rate(tried, students.task, arm) for arm in arms}
        work(
            Choice(arm=arm, rate=rate, seed=seed, test=True)
            for seed in trial.seeds
            for arm, rate in best.items()
            if rate is not None
        )


@contextmanager
def _workers(trial: Trial, name: str) -> Iterator[Work]:
    """Students train at the same time, a thread each; a single worker is this process."""
    about = trial.folder, trial.scale, name
    if trial.jobs == 1:
        yield lambda choices: [_student(*about, choice) for choice in choices] and None
        return
    with ProcessPoolExecutor(
        trial.jobs,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:

        def work(choices: Iterable[Choice]) -> None:
            for done in [pool.submit(_student, *about, choice) for choice in choices]:
                done.result()

        yield work


def _student(folder: Path, scale: Scale, name: str, choice: Choice) -> None:
    disable_progress_bar()
    students = Students(folder, tasks(folder, scale)[name])
    found = students.run(choice)
    worth = found.get("numbers") or found["failed"]
    print(f"{name}: {choice.name}, {'test' if choice.test else 'validation'}: {worth}", flush=True)


def main() -> None:
    """Parse the command line, train, show."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=PARTS, help="all three if left out")
    parser.add_argument("--arms", help="some of them, by name")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="the first one sees every rate")
    parser.add_argument("--jobs", type=int, default=1, help="students that train at once")
    parser.add_argument("--report", action="store_true", help="of what is there already")
    parser.add_argument("--tiny", action="store_true", help="seconds; shows nothing")
    arguments = parser.parse_args()
    trial = Trial(
        folder=arguments.folder.resolve(),
        scale=SCALES["tiny" if arguments.tiny else "cpu"],
        seeds=tuple(map(int, arguments.seeds.split(","))),
        arms=tuple(arguments.arms.split(",")) if arguments.arms else None,
        jobs=arguments.jobs,
    )
    trial.folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    torch.set_num_threads(1)
    wanted = () if arguments.report else (arguments.only,) if arguments.only else PARTS
    if "teacher" in wanted or "classify" in wanted:
        make_teacher(trial.folder, trial.scale)
    for name in ("classify", "causal"):
        if name in wanted:
            study(trial, name)
    known = tasks(trial.folder, trial.scale).items()
    lines, outcome = report(
        trial.folder, {name: Students(trial.folder, task) for name, task in known}
    )
    print("\n".join(lines))
    print(json.dumps({"bench": "ways", "cpus": os.cpu_count(), **outcome}))


if __name__ == "__main__":
    main()
