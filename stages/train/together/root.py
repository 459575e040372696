"""A student whose weights are sharded over the ranks by FSDP2: each holds a part of every weight.

A block is whole while it computes. Embedding, last norm and head are one group, that of the root,
and whole while a pass is computed: the loss uses the head's weight outside of the head's own
forward, and one group for both keeps tied weights tied. `fully_shard` changes the class of what it
is given, and a student that is saved says its class. So the root is a module around the student,
and its `forward` does whatever needs the weights of the root's group.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ....storage.errors import UsageError
from ...losses.definition import Distilled
from ...targets.features.blocks import blocks_of
from ...workers.ranks import Ranks

T = TypeVar("T")


class Root(nn.Module):
    """Around the student; what it is called with sees the weights of the root's group whole."""

    def __init__(self, student: nn.Module, *, keeps: bool = True) -> None:
        """Go around a student.

        `keeps`: gradients of a step's passes are kept whole until the last one, and sent once.
        """
        super().__init__()
        self.student, self.keeps = student, keeps

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        """What `work` makes of the student.

        Tensors with a gradient must be in tuples, lists or dicts.
        """
        return work(self.student)


def sharded(
    student: nn.Module,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    *,
    keeps: bool = True,
) -> Root:
    """Shard a student, block by block: the device never has more than one block whole.

    Args:
        student: With all of its weights, in the memory of the machine; its parameters become
            shards.
        ranks: Who has a part each.
        device: Where this rank computes.
        dtype: What passes compute in.
        keeps: As `Root` has it.

    Raises:
        UsageError: it has not one list of blocks.
    """
    mesh = init_device_mesh(device.type, (ranks.count,))
    if dtype == torch.bfloat16:
        # Else it keeps a copy of each weight in bfloat16 to the end of a pass, also of blocks that
        # are computed again: the whole model on each rank.
        torch.set_autocast_cache_enabled(False)
    for block in blocks(student):
        fully_shard(block.to(device), mesh=mesh)
    root = Root(student.to(device), keeps=keeps)
    fully_shard(root, mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Each rank divides by the count of the whole step: gradients are summed, not averaged.
            # gloo knows no sum with a factor, so that the plain one is asked for by name.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def blocks(student: nn.Module) -> nn.ModuleList:
    """What is sharded one after another.

    Raises:
        UsageError: there is not one list of blocks.
    """
    try:
        return blocks_of(student)
    except (UsageError, AttributeError) as error:
        raise UsageError(
            "compute.sharding: fsdp2 shards a student block by block, and "
            f"{type(student).__name__} has not one list of them. Set it to ddp."
        ) from error


def within(root: Root | None, student: nn.Module, work: Callable[[nn.Module], T]) -> T:
    """What `work` makes of a student, without gradients, where all weights are at hand."""
    if root is None:
        return work(student)
    with torch.no_grad():
        found: T = root(work)
    reshard(root)
    return found


def loss_of(
    root: Root | None, student: nn.Module, work: Callable[[nn.Module], Distilled]
) -> Distilled:
    """The loss that `work` finds for a student, where all weights are at hand.

    Autograd goes through it.
    """
    if root is None:
        return work(student)

    def shown(student: nn.Module) -> tuple[Tensor, Distilled]:
        found = work(student)
        return found.total, found

    total, found = root(shown)
    whole: Distilled = replace(found, total=total)
    return whole


def reshard(root: Root | None) -> None:
    """Let go of the weights that a pass without gradients left whole.

    They are kept whole for a backward pass.
    """
    if root is not None:
        _module(root).reshard()


@torch.no_grad()
def gather(student: nn.Module, into: nn.Module | None, come: Callable[[], None]) -> list[str]:
    """Copy what trains of a sharded student, and its averages, into a plain one.

    The first rank has the plain one, and all ranks call it: weights come whole one after another.
    `come` is called before each: nobody hangs who gathers many.

    Returns:
        Names of weights that one of both has alone.
    """
    frozen = {
        name
        for name, weight in student.named_parameters(remove_duplicate=False)
        if not weight.requires_grad
    }
    whole = {} if into is None else into.state_dict()
    unlike = set(whole) - frozen
    for name, tensor in student.state_dict().items():
        if name in frozen or not isinstance(tensor, Tensor):
            unlike.discard(name)
            continue
        come()
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if name in unlike:
            whole[name].copy_(found)
            unlike.discard(name)
        elif into is not None:
            unlike.add(name)
    return sorted(unlike)


def synchronise(root: Root, last: bool) -> None:
    """Say whether the pass to come is the last of a step.

    Gradients of all passes may be sent then, together.
    """
    module, sends = _module(root), last or not root.keeps
    module.set_requires_gradient_sync(sends)
    module.set_is_last_backward(sends)


def _module(root: Root) -> FSDPModule:
    assert isinstance(root, FSDPModule)
    return root
