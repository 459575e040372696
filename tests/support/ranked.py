"""Trainings by several ranks beside the same by one.

They show what each step did, and what is wrong on purpose.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from causal_features import Causal
from tiny_classes import World, records
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert
from tiny_store import SilentProgress, make_job, make_recipe, make_store, random_texts, snapshot_of
from together import Left

from stillroom.stages.workers.job import Job, StopFlag
from stillroom.stages.workers.ranks import Ranks

_OWN = ("progress", "stop", "clock", "ranks", "journal")
"""What of a job is a process's own."""
STEADY = 3e-4
"""A learning rate at which trainings that round otherwise stay together, as in `live.py`."""
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Ranks draw otherwise than one alone."""
FEATURES: list[dict[str, Any]] = [
    {"what": "hidden", "layers": [0, 1], "bits": 32},
    {"what": "pooled", "layers": [1], "pooling": "mean", "bits": 32},
    {"what": "embeddings"},
]
MATCHED: list[dict[str, Any]] = [
    {"match": "hidden", "layers": {1: 0}, "weight": 0.01},
    {"match": "infonce", "layers": {1: 0}, "weight": 0.1, "group": 3, "pooling": "mean"},
    {"match": "embeddings"},
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training that ranks can be handed."""

    name: str
    job: Mapping[str, Any]
    wrong: str = ""
    """What of the product is replaced by something wrong: a name in `WRONG`."""


@dataclass(kw_only=True)
class Seen:
    """What one rank saw of a training."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    taken: list[list[int]] = field(default_factory=list)
    """Numbers of the samples that it took, step by step."""
    said: list[str] = field(default_factory=list)
    most_bytes: int = 0
    """Of parameters that were there at once, in any pass."""
    error: str = ""


def case_of(name: str, job: Job, *, wrong: str = "") -> Case:
    """Of a job of this process."""
    own = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in _OWN}
    return Case(name=name, job=own, wrong=wrong)


def trained_by(ranks: Ranks, cases: Sequence[Case]) -> list[Seen]:
    """Train all; work of `together.together`, and of a rank alone in this process."""
    return [_trained(ranks, case) for case in cases]


def trained_until_one_dies(ranks: Ranks, cases: Sequence[Case]) -> Left:
    """The same, where a rank fails."""
    return Left(trained_by(ranks, cases))


def alone(case: Case) -> Seen:
    """By one rank, into a folder beside."""
    folders = {
        arm: path.with_name(f"{path.name}-alone") for arm, path in case.job["train_dirs"].items()
    }
    return _trained(Ranks(), Case(name=case.name, job={**case.job, "train_dirs": folders}))


def _trained(ranks: Ranks, case: Case) -> Seen:
    from stillroom.stages.train import stage
    from stillroom.stages.train import trainer as module

    progress, seen = SilentProgress(), Seen()
    job = Job(progress=progress, stop=StopFlag(), ranks=ranks, **case.job)
    own_part, own_step = module.part_of, module.Trainer.step

    def part_of(*args: Any, **more: Any) -> Any:
        part = own_part(*args, **more)
        seen.taken.append([sample.number for sample in part])
        return part

    def step(self: Any, *args: Any, **more: Any) -> Any:
        with _weighing(self, seen):
            result = own_step(self, *args, **more)
        seen.losses.append(result.losses.loss)
        seen.norms.append(result.grad_norm)
        return result

    with (
        patch.object(module, "part_of", part_of),
        patch.object(module.Trainer, "step", step),
        WRONG[case.wrong](ranks) if case.wrong else ExitStack(),
    ):
        try:
            stage.run(job)
        except Exception as error:
            if not case.wrong:
                raise
            seen.error = f"{type(error).__name__}: {error}"
    seen.said = progress.said
    return seen


@contextmanager
def _weighing(trainer: Any, seen: Seen) -> Iterator[None]:
    """Bytes of all parameters, whole ones and shards, whenever a block has computed.

    That is forward and backward.
    """
    owner = trainer._root or trainer.model

    def weigh(*_: Any) -> None:
        held = {id(p): p for p in owner.parameters()}.values()
        local = [p.to_local() if hasattr(p, "to_local") else p for p in held]
        seen.most_bytes = max(seen.most_bytes, sum(t.untyped_storage().nbytes() for t in local))

    def forward(_: Any, __: Any, output: Any) -> None:
        weigh()
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(weigh)

    # Behind the hook of the root's backward pass, as its blocks have theirs.
    from stillroom.stages.targets.features.blocks import blocks_of

    hooks = [block.register_forward_hook(forward) for block in blocks_of(trainer.model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _averaged(_: Ranks) -> Iterator[None]:
    """Gradients as FSDP2 makes them unasked: the mean over the ranks."""
    from torch.distributed.fsdp import FSDPModule

    with patch.object(FSDPModule, "set_gradient_divide_factor", lambda *_: None):
        yield


@contextmanager
def _own_divisor(_: Ranks) -> Iterator[None]:
    """The loss of a part over the scored tokens of the part."""
    from dataclasses import replace

    from stillroom.stages.loader.parts import part_of
    from stillroom.stages.train.trainer import Trainer

    own = Trainer._gradients

    def gradients(self: Any, step: Any, *args: Any) -> Any:
        return own(self, replace(step, samples=part_of(step.samples, self._ranks)), *args)

    with patch.object(Trainer, "_gradients", gradients):
        yield


@contextmanager
def _body_alone(_: Ranks) -> Iterator[None]:
    """Only the body sharded: a tied head stays behind, as a weight of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from stillroom.stages.train.together import root as module
    from stillroom.stages.train.together import student

    def sharded(model: Any, ranks: Ranks, *_: Any, **__: Any) -> Any:
        mesh = init_device_mesh("cpu", (ranks.count,))
        fully_shard(model.base_model, mesh=mesh)
        return module.Root(model)

    with (
        patch.object(student, "sharded", sharded),
        patch.object(module, "synchronise", lambda *_: None),
        patch("stillroom.stages.train.trainer.synchronise", lambda *_: None),
        patch.object(module, "reshard", lambda *_: None),
        patch("stillroom.stages.train.trainer.reshard", lambda *_: None),
    ):
        yield


@contextmanager
def _out_of_memory(ranks: Ranks) -> Iterator[None]:
    """The last rank runs out of memory once, in the second pass."""
    from stillroom.stages.train.trainer import Trainer

    own, passes = Trainer._pass, [0]

    def one_pass(self: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            passes[0] += 1
            if passes[0] == 2 and ranks.rank == ranks.count - 1:
                raise torch.OutOfMemoryError("made up")
        return own(self, *args)

    with patch.object(Trainer, "_pass", one_pass):
        yield


def _sent_each_pass(_: Ranks) -> Any:
    """Not wrong: as where gradients do not fit whole."""
    return patch("stillroom.stages.train.together.student.keeps_gradients", lambda *_, **__: False)


def _one_group(_: Ranks) -> Any:
    """Blocks are not sharded by themselves: all of the model is whole in a pass."""
    return patch("stillroom.stages.train.together.root.blocks", lambda _: [])


WRONG: dict[str, Callable[[Ranks], Any]] = {
    "averaged": _averaged,
    "own divisor": _own_divisor,
    "body alone": _body_alone,
    "one group": _one_group,
    "sent each pass": _sent_each_pass,
    "out of memory": _out_of_memory,
}


class Trainings:
    """Small stores of each kind, made where one is asked for, and trainings from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._texts = random_texts(60)

    @cached_property
    def teacher(self) -> Path:
        """33 ids: two shards differ in size."""
        return save_tiny_llama(self.folder / "teacher", initializer_range=0.6, vocab_size=33)

    @cached_property
    def _tied(self) -> Path:
        fields = {"initializer_range": 0.6, "vocab_size": 33, "tie_word_embeddings": True}
        return save_tiny_llama(self.folder / "tied", **fields)

    @cached_property
    def _stores(self) -> dict[int | None, Any]:
        return {
            k: make_store(self.folder / f"store-{k}", self.teacher, texts=self._texts, k=k)
            for k in (6, None)
        }

    @cached_property
    def _causal(self) -> Causal:
        folder = self.folder / "causal"
        folder.mkdir()
        return Causal(folder, features=FEATURES, asked=MATCHED)

    @cached_property
    def _drawn(self) -> Causal:
        folder = self.folder / "drawn"
        folder.mkdir()
        return Causal(folder, features=[], asked=[], score={"targets": "sampled", "rounds": 8})

    @cached_property
    def _classes(self) -> World:
        folder = self.folder / "classes"
        folder.mkdir()
        return World(folder, save_tiny_bert(folder / "bert", **_STILL), records(40)).scored()

    def causal(
        self,
        name: str,
        sharding: str,
        *,
        student: Mapping[str, Any] | None = None,
        full: bool = False,
        validate: bool = False,
        wrong: str = "",
        **train: Any,
    ) -> Case:
        """Of top-k targets, or full ones."""
        store = self._stores[None if full else 6]
        recipe = make_recipe(
            store,
            self.teacher,
            student=student or {"config": {"num_hidden_layers": 2}},
            score={"targets": "full"} if full else {"k": 6},
            train={"tokens": 300, "tokens_per_pass": 40, "learning_rate": STEADY} | train,
            compute={"sharding": sharding},
        )
        splits = {"train": snapshot_of(store, rows=slice(12, None)).id}
        if validate:
            splits["validation"] = snapshot_of(store, rows=slice(0, 12)).id
        return case_of(name, make_job(recipe, self.folder / name, **splits), wrong=wrong)

    def lora(self, name: str, sharding: str, *, tied: bool = False, **more: Any) -> Case:
        """Adapters, one of them on the head unless that is tied."""
        modules = ["q_proj", "down_proj", *([] if tied else ["lm_head"])]
        lora = {"rank": 2, "target_modules": modules, "keep_adapter": True}
        base = self._tied if tied else self.teacher
        return self.causal(name, sharding, student={"model": str(base), "lora": lora}, **more)

    def sampled(self, name: str, sharding: str, **train: Any) -> Case:
        """Of sampled targets."""
        return self._of(self._drawn, name, sharding, train)

    def features(self, name: str, sharding: str, **train: Any) -> Case:
        """States with a map, embeddings, and a loss between samples in groups of three."""
        return self._of(self._causal, name, sharding, train)

    def _of(self, world: Causal, name: str, sharding: str, train: Mapping[str, Any]) -> Case:
        settings = {"epochs": 1, "tokens_per_pass": 24, "tokens_per_step": 100} | dict(train)
        job = world.job(self.folder / name, compute={"sharding": sharding}, train=settings)
        return case_of(name, job)

    def classes(self, name: str, sharding: str, **train: Any) -> Case:
        """A classifier."""
        settings = {
            "epochs": 1,
            "tokens_per_step": 80,
            "tokens_per_pass": 40,
            "learning_rate": STEADY,
        }
        recipe = self._classes.changed(compute={"sharding": sharding}, train=settings | train)
        return case_of(name, self._classes.job(self.folder / name, recipe))


def told(case: Case, *, by_one: bool = False) -> dict[str, Any]:
    """Its `train.json`."""
    folder = case.job["train_dirs"]["student"]
    folder = folder.with_name(f"{folder.name}-alone") if by_one else folder
    found: dict[str, Any] = json.loads((folder / "train.json").read_text())
    return found


def student_of(case: Case, *, by_one: bool = False) -> Path:
    """The folder of what was trained."""
    folder: Path = case.job["train_dirs"]["student"]
    return (folder.with_name(f"{folder.name}-alone") if by_one else folder) / "student"


def off(one: Seen, other: Seen) -> tuple[float, float]:
    """The largest difference of two trainings' losses, and, relative, of their gradients' norms."""
    assert len(one.losses) == len(other.losses)
    losses = [abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)]
    norms = [abs(a - b) / b for a, b in zip(one.norms, other.norms, strict=True)]
    return max(losses), max(norms)
