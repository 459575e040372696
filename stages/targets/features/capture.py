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

from ....storage.tables.features import Layout
from ...recipe.features import ATTENTION, Feature
from .shown import Need, Shown, check_shown, showing

Name = tuple[str, int]
"""Kind and layer."""
Found = Mapping[Name, np.ndarray]
"""[T, D] float32 of each feature of a text."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken of a pass over B rows, each from the first position on."""

    names: Sequence[Name]
    shown: Shown

    def rows(self, lengths: Sequence[int]) -> list[Found]:
        """The features of each row, without what fills it up; waits for the device."""
        whole = {name: self._vectors(name).float().cpu().numpy() for name in self.names}
        return [
            {name: vectors[row, :length] for name, vectors in whole.items()}
            for row, length in enumerate(lengths)
        ]

    def layouts(self) -> dict[Name, Layout]:
        """What is alike in all rows of each feature."""
        return {name: self._layout(name) for name in self.names}

    def _vectors(self, name: Name) -> Tensor:
        """[B, T, D], the heads of queries, keys and values one after another."""
        kind, layer = name
        if kind not in ATTENTION:
            return self.shown.hidden[layer]
        part: Tensor = getattr(self.shown.attention(layer), kind)
        return part.transpose(1, 2).flatten(2)

    def _layout(self, name: Name) -> Layout:
        kind, layer = name
        width = self._vectors(name).shape[-1]
        if kind not in ATTENTION:
            return Layout(width=width)
        recorded = self.shown.attention(layer)
        heads = getattr(recorded, kind).shape[1]
        if kind != "queries":
            return Layout(width=width, heads=heads)
        return Layout(
            width=width,
            heads=heads,
            score_scale=recorded.scale,
            causal=recorded.causal,
            window=recorded.window,
        )


def needs_of(features: Iterable[Feature]) -> list[Need]:
    """What of a teacher's pass these features are taken of."""
    return [("attention" if one.kind in ATTENTION else "hidden", one.layer) for one in features]


@contextmanager
def capturing(model: nn.Module, features: Iterable[Feature]) -> Iterator[Taken]:
    """What the forward pass inside shows of these features."""
    features = sorted(features)
    with showing(model, needs_of(features)) as shown:
        yield Taken([(one.kind, one.layer) for one in features], shown)


def check_capture(model: nn.Module, features: Iterable[Feature]) -> None:
    """See that a teacher shows what is asked of it, before any row.

    Raises:
        UsageError: it does not.
    """
    check_shown(model, needs_of(features))
