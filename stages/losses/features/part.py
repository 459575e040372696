"""One part of what a student matches of its teacher's features: a loss of one pair of layers.

A part is summed over a pass and divided by its count over the whole step, so passes of any size
make the same gradient. The count follows from which samples the step has, never from values.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....storage.keys import row_seed
from ...targets.features.batch import FeatureTargets
from ...targets.features.shown import Need, Shown


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSize:
    """What a step has, by which the sums of its parts are divided."""

    compared: int
    """Tokens that are compared one by one. They are those that predict, or all of a text that is
    classified."""
    tokens: int
    """Of all samples."""
    samples: int


class Part(nn.Module):
    """A loss of one pair of layers, with its trained map where it has one."""

    def __init__(self, name: str, *, asked: int, need: Need, times: float = 1.0) -> None:
        super().__init__()
        self.name = name
        """In records: `hidden_3_to_1_mse`."""
        self.asked = asked
        """Which entry of `loss.features`."""
        self.need = need
        """What of the student is compared."""
        self.times = times
        """Of its entry's weight."""

    @abstractmethod
    def forward(self, shown: Shown, targets: FeatureTargets) -> Tensor:
        """[] float32: the sum over a pass, not weighted.

        Args:
            shown: By the student.
            targets: The samples of the pass, and the teacher's features of them.
        """

    def check(self, shown: Shown, longest: int) -> None:
        """See that the student can be compared, before any step.

        Args:
            shown: By the student, of some pass.
            longest: Tokens of the longest sample that is read.

        Raises:
            UsageError: it cannot; says why, and what to do.
        """

    @abstractmethod
    def count(self, size: StepSize) -> int:
        """The number of terms of a step, by which the sums of its passes are divided together.

        It is 0 where there is none.
        """


def drawn_map(rows: int, columns: int, name: bytes) -> nn.Parameter:
    """W [rows, columns] uniform within 1 / sqrt(columns), as a linear layer of torch begins.

    It is drawn by a generator of its own, from `name` alone: nothing else is drawn otherwise for
    it.
    """
    generator = torch.Generator().manual_seed(row_seed(name))
    bound = columns**-0.5
    return nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound, generator=generator))


def in_heads(vectors: Tensor, heads: int) -> Tensor:
    """[h, T, d] of [T, h d], the heads one after another."""
    tokens, width = vectors.shape
    return vectors.reshape(tokens, heads, width // heads).transpose(0, 1)
