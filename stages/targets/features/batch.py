"""The teacher's features for one forward pass of a student, and where the samples lie in it.

A pass of B rows of T positions is flattened to [B * T]. A sample's tokens follow one another there,
and all tokens of the pass's samples, sample after sample, are N; padding is none of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ...recipe.features import Name
from .capture import Found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureTargets:
    """The samples of a pass in their order, and what the teacher's layers say of them."""

    lengths: tuple[int, ...]
    """[S] tokens of each sample; their sum is N."""
    at: Tensor
    """[N] int64 indices into the flattened [B * T] of all tokens."""
    compared: Tensor
    """[M] int64 which of the N tokens the losses of single positions compare."""
    token_ids: Tensor
    """[N] int64."""
    vectors: Mapping[Name, Tensor]
    """Kind and layer -> float32 [N, D] of all tokens, or [S, D] of what is one vector a sample."""

    @classmethod
    def of(
        cls,
        found: Sequence[Found],
        *,
        lengths: Sequence[int],
        starts: Sequence[int],
        compared: Sequence[np.ndarray],
        token_ids: Sequence[np.ndarray] = (),
    ) -> Self:
        """Of S samples, in their order.

        Args:
            found: The features of each.
            lengths: Tokens of each.
            starts: Where each begins in the flattened pass.
            compared: Which tokens of each are compared one by one.
            token_ids: Of each; none: nothing asks for them.
        """
        at = [np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
        before = np.cumsum([0, *lengths[:-1]])
        tokens = [first + p for first, p in zip(before, compared, strict=True)]
        vectors = {
            name: torch.from_numpy(np.concatenate([one[name] for one in found]))
            for name in found[0]
        }
        return cls(
            lengths=tuple(lengths),
            at=torch.from_numpy(np.concatenate(at)),
            compared=torch.from_numpy(np.concatenate(tokens)),
            token_ids=torch.from_numpy(np.concatenate([*token_ids, np.zeros(0, np.int64)])).long(),
            vectors=vectors,
        )

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        places = self.at.nbytes + self.compared.nbytes + self.token_ids.nbytes
        return places + sum(vectors.nbytes for vectors in self.vectors.values())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        vectors = {name: change(part) for name, part in self.vectors.items()}
        return replace(
            self,
            at=change(self.at),
            compared=change(self.compared),
            token_ids=change(self.token_ids),
            vectors=vectors,
        )
