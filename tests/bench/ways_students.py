"""The students of a task.

Each is trained by its recipe and judged on validation rows, and if it is chosen on test rows.

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

VALIDATION, TEST = SPLITS = ("validation", "test")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One student, and whether its test rows are read."""

    arm: str
    rate: float
    seed: int
    test: bool = False

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.arm.replace(' ', '-')}-{self.rate:g}-{self.seed}"


class Students:
    """The folder of one task."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.folder, self.task = folder, task
        self.results = folder / "students" / task.name
        self.results.mkdir(parents=True, exist_ok=True)
        self._recipe = folder / f"{task.name}.yaml"
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
        # The rows to train on first: so no shard of theirs has held-out rows too.
        alone = ["evaluate={}", "data.holdout=0", features]
        run_arm(self._recipe, alone, until="score")
        found = {split: self._run(split, [features], until="score") for split in SPLITS}
        snapshots = {split: one["snapshots"]["test"] for split, one in found.items()}
        snapshots["train"] = found[TEST]["snapshots"]["train"]
        if snapshots["train"] != found[VALIDATION]["snapshots"]["train"]:
            raise SystemExit(f"{self.task.name}: validation and test leave other rows to train on")
        facts = {"snapshots": snapshots, **stored_bytes(self._store, snapshots["train"])}
        if self._labelled:
            facts["teacher"] = {
                split: judge_teacher(read_snapshot(self._store, snapshot))
                for split, snapshot in snapshots.items()
            }
        _write(self.folder / f"{self.task.name}.json", facts)

    def run(self, choice: Choice) -> dict[str, Any]:
        """Train and judge a student, or read what it was; on its last split."""
        arm = self.task.arms[choice.arm]
        changes = arm.settings | {
            "score.features": list(arm.stored),
            "train.learning_rate": choice.rate,
            "run.seed": choice.seed,
            "run.dir": str(self.folder / "runs" / self.task.name / choice.name),
        }
        settings = [_setting(name, value) for name, value in changes.items()]
        wanted = {split: self._file(choice, split) for split in SPLITS[: 1 + choice.test]}
        found: dict[str, Any] = {}
        for split in [split for split, file in wanted.items() if not file.is_file()]:
            found = self._judged(split, settings, trained=found)
            about = {"arm": choice.arm, "rate": choice.rate, "seed": choice.seed}
            _write(wanted[split], about | _short(found, self.task))
        return json.loads(wanted[SPLITS[choice.test]].read_text())

    def _file(self, choice: Choice, split: str) -> Path:
        return self.results / f"{choice.name}-{split}.json"

    def read(self, split: str) -> list[dict[str, Any]]:
        """All students that were judged on a split."""
        return [json.loads(f.read_text()) for f in sorted(self.results.glob(f"*-{split}.json"))]

    def _judged(
        self, split: str, settings: Sequence[str], *, trained: dict[str, Any]
    ) -> dict[str, Any]:
        """The records of a student and its `numbers`.

        Why it `failed`, where its training broke off.

        Args:
            split: What judges.
            settings: Of the student.
            trained: Its records, where it was trained just now.
        """
        began = time.process_time()
        found = trained
        try:
            if not found or not self._labelled:
                until = "train" if self._labelled else "evaluate"
                found = self._run(split, settings, until=until)
        except StillroomError as error:
            return {"failed": str(error)}
        seconds = trained.get("cpu_seconds", time.process_time() - began)
        numbers = self._classified(found, split) if self._labelled else found["results"]["student"]
        return found | {"numbers": numbers, "cpu_seconds": seconds}

    def _run(self, split: str, settings: Sequence[str], *, until: str) -> dict[str, Any]:
        judged_on = _setting("evaluate", self.task.held_out[split])
        return run_arm(self._recipe, [judged_on, *settings], until=until, report=False)

    def _classified(self, found: Mapping[str, Any], split: str) -> dict[str, float]:
        student = Path(found["train_dir"]) / "student"
        model = load_student(load_recipe(self._recipe, []), self._teacher_dir, student)
        texts = read_snapshot(self._store, self.facts["snapshots"][split])
        return judge(model, self._teacher_dir, texts)

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


def _short(found: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What is kept of a student."""
    if "failed" in found:
        return dict(found)
    last = found["history"][-1]
    kept = ("parameters", "steps", "tokens", "samples", "cpu_seconds")
    return {
        "numbers": {name: found["numbers"][name] for name in task.measures},
        "parts": {name: last.get(name) for name in ("soft", "hard", "features")},
        **{name: found[name] for name in kept},
    }


def _with_places(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    run = recipe["run"] | {"dir": str(folder / "runs" / "score")}
    return {**recipe, "run": run, "storage": {"dir": str(folder / "store")}}


def _setting(name: str, value: Any) -> str:
    return f"{name}={json.dumps(value)}"


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file at once, so that a reader sees all of it."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps(content))
    part.replace(file)
