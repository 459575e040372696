"""A causal teacher with its texts and some of its features, for trainings that match them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kit import prompts, recipe_tree, write_jsonl
from live import STEADY
from tiny_jobs import done_until_score
from tiny_llama import save_tiny_llama
from tiny_store import SilentProgress

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.loader.samples import Samples
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.snapshots.snapshot import save_snapshot
from stillroom.storage.store.store import Store

EXACT = [{"what": "hidden", "layers": [0, 1], "bits": 32}]
# The teacher's states are large: so the sum is of the size of the other parts, and float32 tells 1e-5.
ASKED = [{"match": "hidden", "layers": {1: 0}, "weight": 0.01}]


class Causal:
    """A teacher of three blocks, its texts, scored with two of its layers; students of half its width."""

    def __init__(
        self,
        folder: Path,
        *,
        features: list[dict[str, Any]] = EXACT,
        asked: list[dict[str, Any]] = ASKED,
        score: dict[str, Any] | None = None,
        **teacher: Any,
    ) -> None:
        """`score`: in place of full targets; `teacher`: fields of its config."""
        self._score = score or {"targets": "full"}
        self.folder, self.features, self.asked = folder, features, asked
        settings = {"num_hidden_layers": 3, "initializer_range": 0.5} | teacher
        self.teacher = save_tiny_llama(folder / "teacher", **settings)
        self.source = write_jsonl(folder / "prompts.jsonl", prompts(30))
        self.store, _ = done_until_score(self.recipe())

    def recipe(self, **sections: Any) -> Recipe:
        base: dict[str, Any] = {
            "storage": {"dir": str(self.folder / "store"), "mantissa_bits": 23, "commit_rows": 5},
            "score": self._score | {"features": self.features},
            "student": {"config": {"num_hidden_layers": 2, "hidden_size": 8}},
            "loss": {"features": self.asked},
            "train": {
                "epochs": 4,
                "tokens_per_step": 64,
                "tokens_per_pass": 128,
                "learning_rate": STEADY,
            },
        }
        for name, fields in sections.items():
            base[name] = base.get(name, {}) | fields
        spoken = {"engine": "hf", "temperature": 1.0, "max_tokens": 16}
        tree = recipe_tree(self.folder, self.teacher, self.source, generate=spoken, **base)
        return Recipe.model_validate(tree)

    def job(self, folder: Path, **sections: Any) -> Job:
        recipe = self.recipe(**sections)
        plan = make_plan(recipe, write=True)
        for snapshot in (*plan.snapshots.values(), plan.features):
            if snapshot is not None:
                save_snapshot(Store.open(recipe.storage.dir), snapshot)
        return Job(
            recipe=recipe,
            progress=SilentProgress(),
            stop=StopFlag(),
            teacher_id=plan.bound.binding.teacher_id,
            train_dirs={"student": folder, "baseline": folder},
            snapshots={split: s.id for split, s in plan.snapshots.items()},
            features_id=plan.features.id if plan.features else "",
        )

    def samples(self, job: Job, **more: Any) -> Samples:
        plan = make_plan(job.recipe)
        return Samples(self.store, plan.snapshots["train"], soft=False, seed=0, **more)


def trained(job: Job) -> dict[str, Any]:
    train.run(job)
    return json.loads(LocalFiles(job.train_dirs[job.arm]).read("train.json"))


def losses_of(job: Job) -> list[float]:
    return [point["loss"] for point in trained(job)["history"]]


def assert_baseline_is_as_without(
    causal: Causal, folder: Path, asked: list[dict[str, Any]]
) -> None:
    """The baseline of a student that matches these reads none of them: the same start, order, tokens and losses."""
    found = []
    for name, features in (("with", asked), ("without", [])):
        more = {"loss": {"features": features}, "evaluate": {"baseline": True}}
        job = causal.job(folder / name, train={"epochs": 1}, **more)
        found.append(trained(replace(job, arm="baseline"))["history"])
        assert not (folder / name / "features").exists()
    assert found[0] == found[1]
    assert not any("features" in point for point in found[0])
