"""Training from the store is training with the live teacher.

The losses are the same step by step, and so is the student.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from live import STEADY, LiveRun, assert_trained_alike, live_training
from planting import FAULTS, Fault, planted
from tiny_jobs import scored_store
from tiny_store import SilentProgress, snapshot_of

from stillroom.stages.loader.samples import Samples
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.snapshots.snapshot import Snapshot
from stillroom.storage.store.store import Store

pytestmark = pytest.mark.numeric

SECTIONS = {
    "score": {"targets": "full"},
    "student": {"config": {"num_hidden_layers": 1}},
    "train": {"epochs": 8, "tokens_per_step": 64, "tokens_per_pass": 128, "learning_rate": STEADY},
}


@dataclass(frozen=True)
class World:
    """A store with the whole distribution, exact, and what trains from it."""

    recipe: Recipe
    store: Store
    teacher_id: str

    def job(self, store: Store, folder: Path, **changes: dict[str, Any]) -> tuple[Job, Snapshot]:
        """To train from all of a store; `changes` are of fields of the recipe's sections."""
        tree = self.recipe.model_dump(mode="json", exclude_none=True)
        for section, fields in {"storage": {"dir": str(store.root)}, **changes}.items():
            tree[section] |= fields
        recipe, snapshot = Recipe.model_validate(tree), snapshot_of(store)
        ids = {
            "teacher_id": self.teacher_id,
            "train_dirs": {"student": folder},
            "snapshots": {"train": snapshot.id},
        }
        return Job(recipe=recipe, progress=SilentProgress(), stop=StopFlag(), **ids), snapshot


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from tiny_llama import save_tiny_llama

    folder = tmp_path_factory.mktemp("full")
    teacher = save_tiny_llama(folder / "teacher", initializer_range=0.5)
    storage = {"dir": str(folder / "store"), "mantissa_bits": 23}
    recipe, store, identity = scored_store(folder, teacher, storage=storage, **SECTIONS)
    return World(recipe, store, identity.id)


def stored_losses(job: Job) -> list[float]:
    """The losses of every step of a training from the store."""
    train.run(job)
    summary = json.loads(LocalFiles(job.train_dirs["student"]).read("train.json"))
    assert len(summary["history"]) == summary["steps"], "every step has its place in the history"
    return [point["loss"] for point in summary["history"]]


def live(job: Job, snapshot: Snapshot, store: Store) -> LiveRun:
    """The same with the live teacher, on the tokens of the same samples in the same order."""
    samples = Samples(store, snapshot, soft=False, seed=job.recipe.run.seed)
    epochs = int(job.recipe.train.epochs or 0)
    texts = (
        (s.token_ids.tolist(), int(s.spans[0, 0])) for s in samples.read(0, epochs * len(samples))
    )
    return live_training(job.recipe, texts, total_tokens=epochs * samples.lengths().tokens)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_training_from_the_store_is_training_with_the_live_teacher(
    world: World, tmp_path: Path, temperature: float
) -> None:
    job, snapshot = world.job(world.store, tmp_path / "run", loss={"temperature": temperature})
    stored, truth = stored_losses(job), live(job, snapshot, world.store)
    assert len(stored) >= 60
    assert_trained_alike(stored, tmp_path / "run" / "student", truth)


@pytest.mark.parametrize("fault", FAULTS)
def test_targets_of_other_tokens_train_otherwise(
    world: World, tmp_path: Path, fault: Fault
) -> None:
    """What the comparison above would show, were it not for the audit."""
    store = planted(world.store, tmp_path / "store", fault)
    job, snapshot = world.job(store, tmp_path / "run", train={"epochs": 1, "audit": "warn"})
    stored, truth = stored_losses(job), live(job, snapshot, store)
    assert sum(abs(a - b) for a, b in zip(stored, truth.losses, strict=True)) / len(stored) > 1e-2
