"""How a student is held by its ranks, and how much memory a rank needs for it.

Bytes of a rank, N ranks, P numbers of all weights and T of those that train:

    replicated   4 P + 4 T + 8 T, for weights, gradients, the two averages of AdamW
    sharded      the same / N, and what is whole for a time
    whole        the root's weights; two blocks (one computes, one is gathered for it); where they
                 train, the gradients of the root and of a block, and the copy of them that is sent
    activations  a position and block: 16 D + 4 F numbers (D width, F width inside of the block),
                 of which gradient checkpointing keeps D in all blocks but one
    logits       those of a pass, or of a chunk of it
    copies       in bfloat16, 2 P: autocast's copies of the weights, which the backward pass needs;
                 none of a sharded student with gradient checkpointing
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...losses.fused_linear import CHUNK_BYTES, DEVICE_CHUNK_BYTES
from ...recipe.sections import Train
from ...workers.ranks import Ranks
from .root import blocks

Held = Literal["ddp", "fsdp2"]
MOST = 0.9
"""Of a device's free memory; the rest is for what is not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that a rank needs, by what for."""

    state: int
    """Weights, gradients, optimizer."""
    whole: int
    """Of a sharded student, what is whole for a time."""
    activations: int
    logits: int
    copies: int

    @property
    def total(self) -> int:
        """All of it, at once."""
        return self.state + self.whole + self.activations + self.logits + self.copies


def memory(
    student: nn.Module,
    held: Held,
    *,
    ranks: int,
    positions: int,
    half: bool = False,
    checkpointing: bool = False,
    on_cpu: bool = False,
) -> Memory:
    """What training a student takes on one rank.

    Args:
        student: As it is before it is sharded, on any device.
        held: By what the ranks share it.
        ranks: N.
        positions: Of a pass.
        half: Whether passes compute in bfloat16.
        checkpointing: Whether the backward pass computes activations again.
        on_cpu: Whether that is where it computes.
    """
    shares = ranks if held == "fsdp2" else 1
    state = _numbers(student, trained=4 + 4 + 8, frozen=4) // shares
    whole = 0
    if held == "fsdp2":
        each = list(blocks(student))
        within = {id(p) for block in each for p in block.parameters()}
        root = [p for p in student.parameters() if id(p) not in within]
        whole = sum(p.numel() * (3 * 4 if p.requires_grad else 4) for p in root)
        whole += max(_numbers(block, trained=4 * 4, frozen=2 * 4) for block in each)
    number = positions * (2 if half else 4)
    copied = half and not (held == "fsdp2" and checkpointing)
    return Memory(
        state=state,
        whole=whole,
        activations=number * _activations(student, checkpointing=checkpointing),
        copies=_numbers(student, trained=2, frozen=2) if copied else 0,
        logits=min(number * _outputs(student), CHUNK_BYTES if on_cpu else DEVICE_CHUNK_BYTES),
    )


def _numbers(module: nn.Module, *, trained: int, frozen: int) -> int:
    """Bytes of all parameters, at so many bytes a number."""
    return sum(p.numel() * (trained if p.requires_grad else frozen) for p in module.parameters())


def _outputs(student: Any) -> int:
    """V, or of classes how many there are."""
    layer = getattr(student, "get_output_embeddings", lambda: None)()  # code of the user's has none
    found: int = getattr(layer, "out_features", 1)
    return found


def _activations(student: Any, *, checkpointing: bool) -> int:
    """Numbers that a position leaves for the backward pass, by the rule above.

    There are 0 where the config says no widths.
    """
    config = student.config.get_text_config()
    width = getattr(config, "hidden_size", 0)
    inside = getattr(config, "intermediate_size", None) or 4 * width
    count: int = getattr(config, "num_hidden_layers", 1)
    block = 16 * width + 4 * inside
    found: int = count * width + block if checkpointing else count * block
    return found


def least_free(ranks: Ranks, device: torch.device) -> int | None:
    """Free bytes of the device that has the fewest of all ranks' own; None: they are CPUs."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    least: int = min(ranks.all(free))
    return least


def asked_for(sharding: str, ranks: Ranks, free: int | None) -> Held | None:
    """By what the ranks share a student, where that can be said without it; else None.

    On CPUs auto shards nothing.
    """
    if ranks.count == 1:
        return "ddp"
    if sharding == "auto":
        return "ddp" if free is None else None
    return "fsdp2" if sharding == "fsdp2" else "ddp"


def chosen(student: nn.Module, train: Train, ranks: Ranks, free: int | None, *, half: bool) -> Held:
    """By what auto shares a student: it shards one that does not fit on each device."""
    return "ddp" if _fits(student, "ddp", train, ranks, free, half=half) else "fsdp2"


def keeps_gradients(
    student: nn.Module, train: Train, ranks: Ranks, free: int | None, *, half: bool
) -> bool:
    """Whether a sharded student's gradients fit whole on each device during all of a step.

    They would stay from a step's first pass to its last.
    """
    whole = _numbers(student, trained=4, frozen=0)
    return _fits(student, "fsdp2", train, ranks, free, half=half, beside=whole)


def _fits(
    student: nn.Module,
    held: Held,
    train: Train,
    ranks: Ranks,
    free: int | None,
    *,
    half: bool,
    beside: int = 0,
) -> bool:
    """On each rank's device, as all ranks find alike; of a CPU it is not asked."""
    if free is None:
        return True
    needed = memory(
        student,
        held,
        ranks=ranks.count,
        positions=train.tokens_per_pass,
        half=half,
        checkpointing=train.gradient_checkpointing,
    )
    return needed.total + beside <= MOST * free
