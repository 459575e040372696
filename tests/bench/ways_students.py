"""The students of a task: each trained by its recipe and judged on validation rows, and if it is chosen on test rows.

A file per student and split in `DIR/students`; what is there is not done again.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from arms import run_arm
from judge import judge, judge_teacher, read_snapshot
from ways_arms import Task
from ways_stored import stored_bytes

from stillroom.stages.models.students.student import load_student
from stillroom.stages.recipe.load import load_recipe
from stillroom.storage.errors import StillroomError
from stillroom.storage.snapshots.snapshot import load_snapshot
from stillroom.storage.store.store import Store

VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One student, and whether its test rows are read."""

    arm: str
    rate: float
    seed: int
    test: bool = False

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm.replace(' ', '-')}-{self.rate:g}-{self.seed}"


class Students:
    """The folder of one task."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.folder, self.task = folder, task
        self.results = folder / "students" / task.name
        self.results.mkdir(parents=True, exist_ok=True)
        self._recipe = folder / f"{task.name}.yaml"
        if not self._recipe.is_file():
            _write(self._recipe, _with_places(task.recipe, folder))

    @property
    def done(self) -> bool:
        """Whether a student was judged on test rows."""
        return any(self.results.glob(f"*-{TEST}.json"))

    @property
    def facts(self) -> dict[str, Any]:
        """What is stored, and what the teacher is worth; of the last `store`."""
        return json.loads((self.folder / f"{self.task.name}.json").read_text())

    def store(self, arms: Sequence[str]) -> None:
        """Make what these arms learn from: one pass of the teacher over the rows of each split."""
        asked = {json.dumps(one): one for arm in arms for one in self.task.arms[arm].stored}
        features = _setting("score.features", list(asked.values()))
        found = {split: self._run(split, [features], until="score") for split in (VALIDATION, TEST)}
        snapshots = {split: one["snapshots"]["test"] for split, one in found.items()}
        snapshots["train"] = found[TEST]["snapshots"]["train"]
        if snapshots["train"] != found[VALIDATION]["snapshots"]["train"]:
            raise SystemExit(f"{self.task.name}: a validation text is one of the test's")
        facts = {"snapshots": snapshots, **stored_bytes(self._store, snapshots["train"])}
        if self._labelled:
            facts["teacher"] = {
                split: judge_teacher(self._rows(id_)) for split, id_ in snapshots.items()
            }
        _write(self.folder / f"{self.task.name}.json", facts)

    def run(self, choice: Choice) -> dict[str, Any]:
        """Train and judge a student, or read what it was."""
        about = {"arm": choice.arm, "rate": choice.rate, "seed": choice.seed}
        settings = [
            _setting(name, value) for name, value in self.task.arms[choice.arm].settings.items()
        ]
        settings += [
            _setting("score.features", list(self.task.arms[choice.arm].stored)),
            _setting("train.learning_rate", choice.rate),
            _setting("run.seed", choice.seed),
            _setting("run.dir", str(self.folder / "runs" / self.task.name / choice.name)),
        ]
        for split in (VALIDATION, TEST)[: 1 + choice.test]:
            file = self.results / f"{choice.name}-{split}.json"
            if not file.is_file():
                _write(file, about | self._judged(split, settings))
        return json.loads(file.read_text())

    def read(self, split: str) -> list[dict[str, Any]]:
        """All students that were judged on a split."""
        return [json.loads(f.read_text()) for f in sorted(self.results.glob(f"*-{split}.json"))]

    def _judged(self, split: str, settings: Sequence[str]) -> dict[str, Any]:
        began = time.process_time()
        try:
            found = self._run(split, settings, until="train" if self._labelled else None)
        except StillroomError as error:
            return {"failed": str(error)}
        seconds = time.process_time() - began
        numbers = self._classified(found, split) if self._labelled else found["results"]["student"]
        last = found["history"][-1]
        return {
            "numbers": {name: numbers[name] for name in self.task.measures},
            "parts": {name: last.get(name) for name in ("soft", "hard", "features")},
            "cpu_seconds": seconds,
            **{name: found[name] for name in ("parameters", "steps", "tokens", "samples")},
        }

    def _run(self, split: str, settings: Sequence[str], *, until: str | None) -> dict[str, Any]:
        judged_on = _setting("evaluate", self.task.held_out[split])
        return run_arm(self._recipe, [judged_on, *settings], until=until)

    def _classified(self, found: Mapping[str, Any], split: str) -> dict[str, float]:
        recipe = load_recipe(self._recipe, [])
        student = Path(found["train_dir"]) / "student"
        model = load_student(recipe, self._teacher_dir, student)
        return judge(model, self._teacher_dir, self._rows(self.facts["snapshots"][split]))

    @property
    def _labelled(self) -> bool:
        return self.task.recipe["run"]["task"] == "classification"

    @cached_property
    def _store(self) -> Store:
        return Store.open(self.folder / "store")

    @cached_property
    def _teacher_dir(self) -> Path:
        snapshot = load_snapshot(self._store, self.facts["snapshots"]["train"])
        return self._store.teacher_dir(snapshot.about["teacher_id"])

    def _rows(self, snapshot: str) -> list[Any]:
        return read_snapshot(self._store, snapshot)


def _with_places(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    run = recipe["run"] | {"dir": str(folder / "runs" / "score")}
    return {**recipe, "run": run, "storage": {"dir": str(folder / "store")}}


def _setting(name: str, value: Any) -> str:
    return f"{name}={json.dumps(value)}"


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """At once, so that a reader sees all of it."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps(content))
    part.replace(file)
