"""Sums over blocks of ids, from which soft targets are made.

They are the largest logit, the sum of exp, and the entropy's part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits that are reduced at once on a CPU: what its second-level cache holds.
CACHE_BYTES = 2**20

BLOCK = 128  # ids

LEAST = -200.0  # exp of this or less is 0 in float32


@dataclass(frozen=True, slots=True, eq=False)
class BlockSums:
    """Sums over blocks of ids, in order; the last block may be shorter. float32."""

    maxima: Tensor
    """[n, C] M_b."""
    sums: Tensor
    """[n, 1 + m, C] S_b at temperature 1, then at the others; 0 where M_b is -inf."""
    weighted: Tensor
    """[n, C] W_b; an id whose logit is -inf adds 0."""


def block_sums(logits: Tensor, temperatures: Sequence[float]) -> BlockSums:
    """Sums over the blocks of [n, V] logits at 1 and at m other temperatures.

    Rows are taken by the cacheful.
    """
    rows = len(logits) if logits.is_cuda else max(1, CACHE_BYTES // (4 * logits.shape[1]))
    parts = [_sums_of(part, temperatures) for part in logits.split(rows)]
    maxima, sums, weighted = (torch.cat(found) for found in zip(*parts, strict=True))
    return BlockSums(maxima, sums, weighted)


def _sums_of(logits: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for blocks in _blocks(logits):
        blocks = blocks.float()
        maxima = blocks.amax(-1)
        below = blocks - maxima.masked_fill(maxima == -torch.inf, 0.0)[..., None]
        tempered = [(below / t).exp_().sum(-1) for t in temperatures]
        mass = below.exp()
        sums = torch.stack([mass.sum(-1), *tempered], dim=1)
        found.append((maxima, sums, mass.mul_(below.clamp_(min=LEAST)).sum(-1)))
    maxima, sums, weighted = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return maxima, sums, weighted


def _blocks(logits: Tensor) -> list[Tensor]:
    """[n, c, width] views: the whole blocks, and the shorter one after them."""
    whole = logits.shape[1] // BLOCK
    parts = [
        logits[:, : whole * BLOCK].unflatten(-1, (whole, BLOCK)),
        logits[:, None, whole * BLOCK :],
    ]
    return [part for part in parts if part.numel()]
