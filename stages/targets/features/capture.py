"""What is taken of a teacher's forward pass beside its distribution.

These are features of each row, at all of its tokens.

A position is that of the token whose state it is, in every kind of model. Which positions a loss
compares is `alignment.py`'s to say: of text that is continued those that predict a scored token,

    index              0     1     2     3     4
    token_ids          <s>   hi    a     b     </s>
    scored tokens                  a     b     </s>
    states             h0    h1    h2    h3    h4        stored: all five
    compared                 h1    h2    h3              with the targets of a, b and </s>

and of a labelled text all of them. Pooled states are one vector a text, made of all of its tokens
and of no padding; projected vectors are made of those of a token. Both are on the device,
in float32.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....storage.errors import UsageError
from ....storage.tables.features import HEADED, Layout, Projected, of_text, what_and_how
from ...models.device import evaluating
from ...recipe.features import Feature, Name, pooling_of
from .blocks import states_of
from .pooling import pooled
from .projection import Projection
from .shown import Need, Shown, check_shown, showing

Found = Mapping[Name, np.ndarray]
"""[T, D] float32 of each feature of a text; of pooled states [1, D]."""
Projections = Mapping[Name, Projection]
"""By what the vectors of each projected feature are made narrower."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken of a pass over B rows, each from the first position on."""

    names: Sequence[Name]
    shown: Shown
    projections: Projections

    def rows(self, lengths: Sequence[int]) -> list[Found]:
        """The features of each row, without what fills it up; waits for the device."""
        whole = {name: self._stored(name, lengths).cpu().numpy() for name in self.names}
        kept = {name: [1] * len(lengths) if of_text(name[0]) else lengths for name in whole}
        return [
            {name: vectors[row, : kept[name][row]] for name, vectors in whole.items()}
            for row in range(len(lengths))
        ]

    def projected(self, lengths: Sequence[int]) -> list[dict[Name, Projected]]:
        """Of each row: by which matrices vectors were made narrower, and what that costs.

        It waits for the device.
        """
        return [
            {
                name: Projected(
                    projection=self.projections[name].id,
                    projection_error=self.projections[name].error(
                        self._vectors(name)[row, :length]
                    ),
                )
                for name in self.names
                if name in self.projections
            }
            for row, length in enumerate(lengths)
        ]

    def layouts(self) -> dict[Name, Layout]:
        """What is alike in all rows of each feature."""
        return {name: self._layout(name) for name in self.names}

    def _stored(self, name: Name, lengths: Sequence[int]) -> Tensor:
        """[B, T, D] float32; of pooled states [B, 1, D]."""
        vectors = self._vectors(name)
        if name in self.projections:
            return self.projections[name].of(vectors)
        if not of_text(name[0]):
            return vectors.float()
        texts = torch.cat([row[:length] for row, length in zip(vectors, lengths, strict=True)])
        return pooled(texts, lengths, pooling_of(name[0]))[:, None]

    def _vectors(self, name: Name) -> Tensor:
        """[B, T, D] as the model has them, heads of queries, keys and values one after another."""
        what, layer = what_and_how(name[0])[0], name[1]
        if what not in HEADED:
            return self.shown.hidden[layer]
        part: Tensor = getattr(self.shown.attention(layer), what)
        return part.transpose(1, 2).flatten(2)

    def _layout(self, name: Name) -> Layout:
        kind, layer = name
        if name in self.projections:
            before, width = self.projections[name].matrix.shape
            return Layout(width=width, projected_from=before)
        if kind not in HEADED:
            return Layout(width=self.shown.hidden[layer].shape[-1])
        recorded = self.shown.attention(layer)
        _, heads, _, width = getattr(recorded, kind).shape
        if kind != "queries":
            return Layout(width=heads * width, heads=heads)
        return Layout(
            width=heads * width,
            heads=heads,
            score_scale=recorded.scale,
            causal=recorded.causal,
            window=recorded.window,
        )


def needs_of(features: Iterable[Feature]) -> list[Need]:
    """What of a teacher's pass these features are taken of."""
    return [
        ("attention" if what_and_how(one.kind)[0] in HEADED else "hidden", one.layer)
        for one in features
    ]


@contextmanager
def capturing(
    model: nn.Module, features: Iterable[Feature], projections: Projections | None = None
) -> Iterator[Taken]:
    """What the forward pass inside shows of these features.

    `projections` are those of the kinds that are projected.
    """
    features = sorted(features)
    with showing(model, needs_of(features)) as shown:
        yield Taken([(one.kind, one.layer) for one in features], shown, projections or {})


def check_capture(model: nn.Module, features: Iterable[Feature]) -> None:
    """See that a teacher shows what is asked of it, before any row.

    Raises:
        UsageError: it does not.
    """
    asked = list(features)
    check_shown(model, needs_of(asked))
    check_first_token(model, sorted({one.layer for one in asked if one.kind == "pooled_cls"}))


def check_first_token(model: Any, layers: Sequence[int]) -> None:
    """Refuse `pooling: cls` of a model whose first token does not see the others.

    There it says nothing of a text.

    Raises:
        UsageError: a layer's state of the first token is the same whatever follows.
    """
    if not layers:
        return
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    texts = [(torch.arange(8, device=device)[None] * step + 1) % vocabulary for step in (1, 3)]
    with evaluating(model), torch.no_grad():
        found = []
        for ids in texts:
            with states_of(model, layers) as states:
                model(input_ids=ids)
            found.append({layer: states[layer][:, 0] for layer in layers})
    for layer in layers:
        if torch.equal(found[0][layer], found[1][layer]):
            raise UsageError(
                f"pooling: cls: in block {layer} of {type(model).__name__} the first token does "
                "not see the others, so its state says nothing of the text. Use last or mean."
            )
