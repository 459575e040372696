"""Students of one sentiment teacher: which losses, from which start, at which learning rates.

Each trained and judged.

Targets come from the product's store; its trainer, its losses and its measures do the work, without
a run folder for each of some hundred students. One file per student; what is there is not done
again.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import run_arm
from judge import judge, judge_teacher, read_snapshot
from torch import nn

from stillroom.stages.loader.classification import ClassBatch, ClassPasses
from stillroom.stages.loader.samples import Cursor, Sample, steps
from stillroom.stages.losses.definition import Distilled, LossParts
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.classification import Inputs, class_logits
from stillroom.stages.models.students.saving import save_student
from stillroom.stages.models.students.student import initial_student
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.recipe.sections import Loss, Recipe, Train
from stillroom.stages.train.trainer import Trainer
from stillroom.storage.errors import StillroomError
from stillroom.storage.snapshots.snapshot import load_snapshot
from stillroom.storage.store.store import Store

DIVERGENCES = ("forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl")
TEMPERATURE = 2.0


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A loss."""

    loss: dict[str, Any]
    without_log: bool = False
    """A mistake that the function invites which wants logarithms: it is handed probabilities."""


def _soft(divergence: str, soft: float, hard: float, **more: Any) -> Arm:
    weights = {"soft_weight": soft, "hard_weight": hard}
    return Arm(loss={"divergence": divergence, "temperature": TEMPERATURE, **weights, **more})


ARMS = {
    "labels": Arm(loss={"soft_weight": 0.0, "hard_weight": 1.0}),
    **{name: _soft(name, 1.0, 0.0) for name in DIVERGENCES},
    **{f"{name}+labels": _soft(name, 0.5, 0.5) for name in DIVERGENCES},
}
MISTAKES = {
    "forward_kl, no T^2": _soft("forward_kl", 1 / TEMPERATURE**2, 0.0),
    "skew_forward_kl, no T^2": _soft("skew_forward_kl", 1 / TEMPERATURE**2, 0.0),
    "skew_forward_kl, shares swapped": _soft("skew_forward_kl", 1.0, 0.0, skew=0.9),
    "skew_forward_kl, no logarithm": replace(_soft("skew_forward_kl", 1.0, 0.0), without_log=True),
}
STARTS = ("fresh", "fine-tuned")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One student."""

    arm: str
    start: str
    rate: float
    seed: int

    @property
    def file(self) -> str:
        """Name of its file."""
        name = self.arm.replace(", ", "-").replace(" ", "-").replace("^", "")
        return f"{name}-{self.start}-{self.rate:g}-{self.seed}.json"


class WithoutLog(ClassPasses):
    """Skew forward KL where the mixture's probabilities stand in for their logarithms.

    It is t (log t - m), summed.
    """

    def losses(
        self, model: nn.Module, batch: ClassBatch, *, aim: Aim, dtype: torch.dtype
    ) -> Distilled:
        """The losses of `ClassPasses`, with the mistake."""
        objective = aim.objective
        assert objective is not None
        assert batch.targets.logprobs is not None
        logits = class_logits(model, batch.inputs)
        teacher, student = batch.targets.logprobs, (logits / objective.temperature).softmax(-1)
        mixture = (
            objective.parameters["skew"] * teacher.exp()
            + (1 - objective.parameters["skew"]) * student
        )
        soft = (teacher.exp() * (teacher - mixture)).sum(-1) * objective.temperature**2
        return LossParts(hard=torch.zeros_like(soft), soft=soft).summed(aim)


@dataclass(frozen=True)
class InMemory:
    """Samples in the order that a seed decides, as `Samples` gives them."""

    held: Sequence[Sample]
    seed: int

    def __len__(self) -> int:
        return len(self.held)

    def read(self, start: int, stop: int | None = None) -> Iterator[Sample]:
        """Samples `start` to `stop`, through all epochs."""
        for number in range(start, stop or len(self) * 1000):
            yield self.held[_order(self.seed, number // len(self), len(self))[number % len(self)]]


@cache
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class Study:
    """The folder of the comparison: what every student reads, and a file per student."""

    def __init__(
        self, folder: Path, recipe_file: Path, overrides: Sequence[str], *, rows: int
    ) -> None:
        """`rows`: students are trained on so many of the training rows."""
        self.folder, self.overrides = folder / "study", list(overrides)
        self.folder.mkdir(parents=True, exist_ok=True)
        found = run_arm(recipe_file, self.overrides, until="score")["snapshots"]
        self.recipe = load_recipe(recipe_file, self.overrides)
        store = Store.open(self.recipe.storage.dir)
        self._parts, self.prompts = {}, dict[str, set[bytes]]()
        for split, snapshot in found.items():
            chosen = load_snapshot(store, snapshot)
            shards = {shard.sha256: shard.rows for shard in chosen.shards}
            self.prompts[split] = {
                row["prompt_key"] for row in store.rows(chosen.table, shards, ("prompt_key",))
            }
            learnt = rows if split == "train" else None
            self._parts[split] = read_snapshot(store, snapshot, learnt)
        snapshot = load_snapshot(store, found["train"])
        self.teacher_dir = store.teacher_dir(snapshot.about["teacher_id"])

    @property
    def rows(self) -> dict[str, int]:
        """How many rows of each split."""
        return {split: len(part) for split, part in self._parts.items()}

    def teacher(self) -> dict[str, dict[str, float]]:
        """What the stored probabilities are worth on each split, as for a student."""
        return {split: judge_teacher(part) for split, part in self._parts.items()}

    def run(self, choice: Choice) -> dict[str, Any]:
        """Train one student for two epochs and judge it after each, or read what it was."""
        file = self.folder / choice.file
        if not file.is_file():
            arm = (ARMS | MISTAKES)[choice.arm]
            model = self._start(choice)
            train = self.recipe.train.model_copy(
                update={"epochs": 2.0, "learning_rate": choice.rate}
            )
            before = self._judge(model) if choice.start == "fine-tuned" else None
            try:
                after, failed = list(self._epochs(model, arm, train, seed=choice.seed)), None
            except StillroomError as error:
                after, failed = [], str(error)
            about = {
                "arm": choice.arm,
                "start": choice.start,
                "rate": choice.rate,
                "seed": choice.seed,
            }
            _write(file, about | {"before": before, "after": after, "failed": failed})
        return json.loads(file.read_text())

    def fine_tune(self, seed: int, *, rate: float, epochs: int) -> dict[str, Any]:
        """Train a student on labels alone, and return its numbers.

        It is kept as it was after the epoch that is best on validation.
        """
        folder = self.folder / f"fine-tuned-{seed}"
        if not (folder.with_suffix(".json")).is_file():
            model = self._fresh(seed)
            train = self.recipe.train.model_copy(
                update={"epochs": float(epochs), "learning_rate": rate}
            )
            best: dict[str, Any] = {}
            for epoch, found in enumerate(self._epochs(model, ARMS["labels"], train, seed=seed), 1):
                if not best or found["validation"]["accuracy"] > best["validation"]["accuracy"]:
                    best = found | {"epoch": epoch, "rate": rate}
                    save_student(model, self.recipe, teacher_dir=self.teacher_dir, folder=folder)
            _write(folder.with_suffix(".json"), best)
        return json.loads(folder.with_suffix(".json").read_text())

    def _start(self, choice: Choice) -> Any:
        if choice.start == "fresh":
            return self._fresh(choice.seed)
        folder = self.folder / f"fine-tuned-{choice.seed}"
        student = self.recipe.student.model_copy(update={"config": None, "model": str(folder)})
        return initial_student(
            self.recipe.model_copy(update={"student": student}), self.teacher_dir
        )

    def _fresh(self, seed: int) -> Any:
        return initial_student(self._seeded(seed), self.teacher_dir)

    def _seeded(self, seed: int) -> Recipe:
        return self.recipe.model_copy(
            update={"run": self.recipe.run.model_copy(update={"seed": seed})}
        )

    def _epochs(self, model: Any, arm: Arm, train: Train, *, seed: int) -> Iterator[dict[str, Any]]:
        """Train; the student's numbers after each epoch."""
        torch.manual_seed(seed)  # of dropout
        passes = (WithoutLog if arm.without_log else ClassPasses)(
            tokens_per_pass=train.tokens_per_pass,
            inputs=Inputs.of(model, self.teacher_dir),
            vocab_size=model.get_input_embeddings().num_embeddings,
        )
        trainer = Trainer(model, packing=passes, loss=Loss(**arm.loss), train=train)
        held = InMemory(self._parts["train"], seed)
        total = round(train.epochs or 1) * sum(map(len, held.held))
        last = Cursor()
        stop = round(train.epochs or 1) * len(held)
        for step in steps(held, Cursor(), tokens_per_step=train.tokens_per_step, stop_samples=stop):
            trainer.step(step, done=step.after.tokens / total)
            # The cursor ends an epoch at its last sample, and a step may reach into the next one.
            if _epochs_done(step.after, len(held)) > _epochs_done(last, len(held)):
                yield self._judge(model)
            last = step.after

    def _judge(self, model: Any) -> dict[str, Any]:
        return {
            split: judge(model, self.teacher_dir, self._parts[split])
            for split in ("validation", "test")
        }


def _epochs_done(cursor: Cursor, count: int) -> int:
    return (cursor.epoch * count + cursor.sample) // count


def _write(file: Path, content: dict[str, Any]) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps(content))
    part.replace(file)
