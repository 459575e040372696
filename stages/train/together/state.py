"""What a training goes on from, as tensors with names that are the same however the student is held."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizer import load_optimizer_state, optimizer_state
from ..shards import Stored
from .root import Root, reshard


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Of a student under training."""

    model: nn.Module
    matching: nn.Module | None
    """Holds the maps of matched features; None: none are matched."""
    optimizer: torch.optim.Optimizer
    root: Root | None
    """Around the model where it is sharded."""

    def weights(self) -> dict[str, Tensor]:
        """The parameters that train; of sharded ones this rank's shards."""
        reshard(self.root)
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def averages(self) -> dict[str, Tensor]:
        """The buffers that are saved with a model."""
        saved = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in saved}

    def tensors(self) -> dict[str, Tensor]:
        """All of it."""
        return {
            **_under("weights", self.weights()),
            **_under("averages", self.averages()),
            **_under("maps", self._maps()),
            **_under("optimizer", optimizer_state(self.optimizer, self._trained())),
        }

    def load(self, stored: Stored) -> None:
        """Take over what a checkpoint has; all ranks call it."""
        stored.read(self._of_student(stored) | _under("maps", self._maps()))
        load_optimizer_state(self.optimizer, self._trained(), stored)

    def load_weights(self, stored: Stored) -> None:
        """Take over its weights and averages alone; all ranks call it."""
        stored.read(self._of_student(stored))

    def _of_student(self, stored: Stored) -> dict[str, Tensor]:
        """Checkpoints of before have no averages."""
        averages = self.averages() if stored.names("averages/") else {}
        return _under("weights", self.weights()) | _under("averages", averages)

    def _maps(self) -> dict[str, Tensor]:
        return {} if self.matching is None else self.matching.state_dict()

    def _trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer has."""
        reshard(self.root)
        maps = {} if self.matching is None else dict(self.matching.named_parameters())
        named = _under("weights", dict(self.model.named_parameters())) | _under("maps", maps)
        return {name: p for name, p in named.items() if p.requires_grad}


def _under(group: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """By the names that they have in a checkpoint."""
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}
