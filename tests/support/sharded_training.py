"""A training whose gradients are made up, sharded in any way.

What its checkpoints hold is known bit for bit.
"""

import json
import os
import signal
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stillroom.stages.loader.packing import Packing
from stillroom.stages.recipe.sections import Loss, Train
from stillroom.stages.train.checkpoints import Checkpoints
from stillroom.stages.train.together.root import Root
from stillroom.stages.train.trainer import Trainer
from stillroom.stages.workers.ranks import Ranks
from stillroom.storage.files.local import LocalFiles

PRIMITIVES = ("_write", "_link", "_unlink")
V, D = 23, 6  # V is odd, and some of what is D or less long has nothing for the last of four ranks


class Student(nn.Module):
    """A tied embedding, blocks with a frozen weight and an average, a norm and a lone number."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


class Block(nn.Module):
    """With what trains, what does not, and what is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.down.weight.requires_grad_(False)
        self.average = nn.BatchNorm1d(D)


def trainer_of(ranks: Ranks, how: str) -> Trainer:
    """Make a trainer as `how` says: alone, replicated or `fsdp2`.

    Replicated is `ddp`: what a checkpoint sees of it is the same on all ranks.
    """
    model, root = Student(), None
    if how == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        root = Root(model)
        fully_shard(root)
    packing = Packing(tokens_per_pass=8, vocab_size=V)
    train = Train(tokens=1000, learning_rate=1e-2)
    return Trainer(model, packing=packing, loss=Loss(), train=train, ranks=ranks, root=root)


def step(trainer: Trainer, number: int) -> None:
    """One optimizer step with a gradient that follows from its number and the weight's name."""
    for name, weight in trainer.model.named_parameters():
        if not weight.requires_grad or name == "norm.bias":  # without a gradient: no state of it
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{number} {name}".encode()))
        gradient = torch.randn(weight.shape, generator=generator)
        weight.grad = like(gradient, weight)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    for name, average in trainer.averages().items():
        average.add_(zlib.crc32(name.encode()) % 5)


def like(whole: Tensor, other: Tensor) -> Tensor:
    """Sharded as another one is."""
    if isinstance(other, DTensor):
        return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)
    return whole


def whole(state: dict[str, Tensor]) -> dict[str, Any]:
    """As numbers, gathered from all ranks."""
    gathered = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state.items()
    }
    return {name: tensor.tolist() for name, tensor in gathered.items()}


def go_on(ranks: Ranks, how: str, folder: Path, last: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Steps from the last checkpoint to `last`, of which a checkpoint is kept.

    The state before and after them.
    """
    trainer, checkpoints = trainer_of(ranks, how), Checkpoints(LocalFiles(folder), ranks)
    done = checkpoints.steps()
    if done:
        trainer.load_state(checkpoints.tensors(done[-1]))
    begun = whole(trainer.state())
    for number in range(done[-1] if done else 0, last):
        step(trainer, number)
    checkpoints.save(last, trainer.state(), {"last": last, "of": ranks.rank})
    checkpoints.keep(last)
    return begun, whole(trainer.state())


def write_earlier(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A checkpoint as a single process of before wrote it, after two steps; the state then."""
    trainer, files = trainer_of(ranks, "alone"), LocalFiles(folder)
    for number in range(2):
        step(trainer, number)
    groups = {"weights": trainer.weights(), "averages": trainer.averages()}
    tensors = groups | {"optimizer": trainer.optimizer.state_dict()}
    name = "checkpoints/step-00000002"

    def to(path: Path) -> None:
        with path.open("wb") as file:
            torch.save(tensors, file)

    content = files.put_content(name, to, suffix=".pt")
    record = {"tensors": content.name, "sha256": content.sha256, "state": {}}
    files.put_if_absent(f"{name}/state.json", json.dumps(record).encode())
    return whole(trainer.state())


def read_weights(ranks: Ranks, how: str, folder: Path, number: int) -> dict[str, Any]:
    """The weights and averages of a checkpoint, in a student that began otherwise."""
    trainer, checkpoints = trainer_of(ranks, how), Checkpoints(LocalFiles(folder), ranks)
    step(trainer, 99)
    trainer.load_weights(checkpoints.tensors(number))
    return whole({f"weights/{n}": w for n, w in trainer.weights().items()})


def killed_while_saving(ranks: Ranks, folder: Path, victim: int, after: int) -> None:
    """A second checkpoint, in which a rank dies after so many of what it does on disk."""
    files = LocalFiles(folder)
    left = [after]
    for name in PRIMITIVES:
        setattr(files, name, _counting(getattr(files, name), left, ranks.rank == victim))
    trainer, checkpoints = trainer_of(ranks, "fsdp2"), Checkpoints(files, ranks)
    trainer.load_state(checkpoints.tensors(1))
    step(trainer, 1)
    checkpoints.save(2, trainer.state(), {"last": 2})


def _counting(primitive: Any, left: list[int], dies: bool) -> Any:
    def counted(*args: Any) -> Any:
        found = primitive(*args)
        left[0] -= 1
        if dies and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return counted


def failing(ranks: Ranks, folder: Path, victim: int) -> Sequence[str]:
    """A checkpoint on a disk that is full for one rank alone: what each says."""
    files = LocalFiles(folder)
    if ranks.rank == victim:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        files._sync_file = full  # type: ignore[method-assign]
    try:
        Checkpoints(files, ranks).save(1, trainer_of(ranks, "fsdp2").state(), {})
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def damaged(ranks: Ranks, folder: Path) -> Sequence[str]:
    """What each rank says of a checkpoint whose last file is damaged."""
    try:
        Checkpoints(LocalFiles(folder), ranks).tensors(1)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []
