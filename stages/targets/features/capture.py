"""What is taken of a teacher's forward pass beside its distribution: features of each row, at all of its tokens.

A position is that of the token whose state it is, in every kind of model. Which positions a loss
compares is `alignment.py`'s to say: of text that is continued those that predict a scored token,

    index              0     1     2     3     4
    token_ids          <s>   hi    a     b     </s>
    scored tokens                  a     b     </s>
    states             h0    h1    h2    h3    h4        stored: all five
    compared                 h1    h2    h3              with the targets of a, b and </s>

and of a labelled text all of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ...recipe.features import Feature
from .blocks import check_blocks, states_of

Name = tuple[str, int]
"""Kind and layer."""
Found = Mapping[Name, np.ndarray]
"""[T, D] float32 of each feature of a text."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken of a pass over B rows, each from the first position on."""

    hidden: Mapping[int, Tensor]
    """Layer -> [B, T, D]."""

    def rows(self, lengths: Sequence[int]) -> list[Found]:
        """The features of each row, without what fills it up; waits for the device."""
        whole = {("hidden", n): s.float().cpu().numpy() for n, s in self.hidden.items()}
        return [
            {name: states[row, :length] for name, states in whole.items()}
            for row, length in enumerate(lengths)
        ]


@contextmanager
def capturing(model: nn.Module, features: Iterable[Feature]) -> Iterator[Taken]:
    """What the forward pass inside shows of these features."""
    layers = sorted({one.layer for one in features if one.kind == "hidden"})
    with states_of(model, layers) as hidden:
        yield Taken(hidden)


def check_capture(model: nn.Module, features: Iterable[Feature]) -> None:
    """See that a teacher shows what is asked of it, before any row.

    Raises:
        UsageError: it does not.
    """
    check_blocks(model, sorted({one.layer for one in features if one.kind == "hidden"}))
