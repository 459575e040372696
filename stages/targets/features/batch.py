"""The teacher's features for one forward pass of a student: which positions are compared, and the states there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .capture import Found, Name


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureTargets:
    """M positions of a pass, and what the teacher's layers say there."""

    at: Tensor
    """[M] int64 indices into the flattened [B * T] of the pass."""
    states: Mapping[Name, Tensor]
    """Kind and layer -> [M, D] float32."""

    @classmethod
    def of(
        cls, at: Tensor, found: Sequence[Found], positions: Sequence[np.ndarray]
    ) -> "FeatureTargets | None":
        """Of samples one after another; None where they have no features.

        Args:
            at: [M] their positions in the pass, of all samples one after another.
            found: The features of each sample, at all of its tokens.
            positions: Which tokens of each sample are compared.
        """
        if not found or not found[0]:
            return None
        states = {
            name: torch.from_numpy(
                np.concatenate([one[name][p] for one, p in zip(found, positions, strict=True)])
            )
            for name in found[0]
        }
        return cls(at=at, states=states)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.at.nbytes + sum(states.nbytes for states in self.states.values())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        states = {name: change(part) for name, part in self.states.items()}
        return type(self)(at=change(self.at), states=states)
