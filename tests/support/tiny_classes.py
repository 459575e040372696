"""A small classification in this process.

It has labelled records, a tiny BERT that knows three classes, and a store of both.
"""

from pathlib import Path
from typing import Any

import numpy as np
from kit import recipe_tree, write_jsonl
from tiny_llama import WORDS
from tiny_models import CLASSES
from tiny_store import SilentProgress

from stillroom.pipeline.plan.lines import Plan
from stillroom.pipeline.plan.plan import make_plan
from stillroom.pipeline.plan.resolve import bind
from stillroom.stages.data import stage as data
from stillroom.stages.models.identity import Identity
from stillroom.stages.recipe.checks.together import check_together
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.score import stage as score
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.snapshots.snapshot import Snapshot, save_snapshot
from stillroom.storage.store.store import Store


def records(count: int) -> list[dict[str, Any]]:
    """Labelled texts, every third one a pair.

    Labels are by index and by name, every eleventh is missing.
    """
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        label = int(rng.integers(3))
        record = {"text": words(rng, 3, 12), "label": CLASSES[label] if number % 2 else label}
        if number % 3 == 0:
            record["text_pair"] = words(rng, 2, 6)
        if number % 11 == 10:
            record["label"] = None
        found.append(record)
    return found


def words(rng: np.random.Generator, shortest: int, longest: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(shortest, longest))))


class World:
    """A teacher, labelled records, and the stages done in this process."""

    def __init__(
        self, folder: Path, teacher: Path, rows: list[dict[str, Any]], **sections: Any
    ) -> None:
        self.folder, self.teacher = folder, teacher
        self.source = write_jsonl(folder / "rows.jsonl", rows)
        self.recipe = self.changed(**sections)
        self.store = Store.open(folder / "store", create=True)

    def changed(self, **sections: Any) -> Recipe:
        """The recipe with other sections."""
        tree = recipe_tree(self.folder, self.teacher, self.source, generate=None)
        tree |= {
            "run": {"dir": str(self.folder / "run"), "task": "classification"},
            "storage": {"dir": str(self.folder / "store"), "mantissa_bits": 23},
            "data": {"source": str(self.source), "format": "labelled", "holdout": 12},
            "score": {"targets": "full"},
            "loss": {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.5},
            "train": {
                "epochs": 2,
                "tokens_per_step": 80,
                "tokens_per_pass": 40,
                "learning_rate": 1e-2,
            },
        }
        recipe = Recipe.model_validate(tree | sections)
        assert not check_together(recipe)
        return recipe

    def scored(self) -> "World":
        """Run data and score, as the runner does."""
        job, teacher = self.stage_one()
        data.run(job)
        score.run(job, teacher)
        return self

    def stage_one(self) -> tuple[Job, Identity]:
        """To read the data and to score them, and the teacher."""
        bound = bind(self.recipe, write=True)
        assert bound.teacher is not None
        self.store.put_teacher(bound.teacher.id, bound.teacher.files_to_keep())
        ids = {
            name: getattr(bound.binding, name)
            for name in ("data_id", "teacher_id", "author_id", "context_tokens")
        }
        job = Job(recipe=self.recipe, progress=SilentProgress(), stop=StopFlag(), **ids)
        return job, bound.teacher

    def plan(self, recipe: Recipe | None = None) -> Plan:
        """The plan, its snapshots saved."""
        plan = make_plan(recipe or self.recipe, write=True)
        for snapshot in plan.snapshots.values():
            save_snapshot(self.store, snapshot)
        return plan

    def job(self, folder: Path, recipe: Recipe | None = None, **more: Any) -> Job:
        """To train or evaluate in a folder."""
        plan = self.plan(recipe)
        arms = {"student": folder / "student", "baseline": folder / "baseline"}
        return Job(
            recipe=recipe or self.recipe,
            progress=SilentProgress(),
            teacher_id=plan.bound.binding.teacher_id,
            train_dirs=arms,  # type: ignore[arg-type]
            snapshots={split: s.id for split, s in plan.snapshots.items()},
            **{"stop": StopFlag()} | more,
        )

    def rows(self, table: str = "soft_targets") -> list[dict[str, Any]]:
        index = self.store.index(table, ["key"])
        places: dict[str, list[int]] = {}
        for shard, row in zip(index["shard"].to_pylist(), index["row"].to_pylist(), strict=True):
            places.setdefault(shard, []).append(row)
        return list(self.store.rows(table, places))


def rows_of(store: Store, snapshot: Snapshot) -> list[dict[str, Any]]:
    return [row for s in snapshot.shards for row in store.rows("soft_targets", {s.sha256: s.rows})]
