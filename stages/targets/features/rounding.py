"""What rounding does to attention.

Attention is rebuilt from queries and keys as they are, and as they are read back.

One number in 127 of a vector's largest bends heads that are sharp: int8 may move a token's
attention to another by 0.28. So queries and keys of 8 bits are stored where no number of a text's
maps moves by more than `ALLOWED`, and refused elsewhere, by name.
"""

from collections.abc import Mapping

import numpy as np
import torch

from ....storage.tables.features import HEADED, SCALED, Layout, Rounded
from ...models.attention.maps import Scores, log_rows
from ...recipe.features import Feature, Name
from .capture import Found

ALLOWED = 0.05
"""Of a number of a map, which is between 0 and 1."""
_ROWS = 256
"""Tokens whose rows are made at once."""


def with_counterparts(features: set[Feature]) -> set[Feature]:
    """With the keys of queries of 8 bits, and the queries of such keys.

    What rounding does shows in both.
    """
    more = {
        Feature(kind=kind, layer=one.layer, bits=one.bits)
        for one in features
        if one.kind in HEADED[:2] and one.dtype == SCALED
        for kind in HEADED[:2]
    }
    known = {(one.kind, one.layer) for one in features}
    return features | {one for one in more if (one.kind, one.layer) not in known}


def check_rounding(
    features: tuple[Feature, ...], found: Found, layouts: Mapping[Name, Layout]
) -> None:
    """See that queries and keys of 8 bits still make their attention.

    Raises:
        FloatingPointError: they do not; says of which block, by how much, and what to do.
    """
    layers = {f.layer for f in features if f.kind in HEADED[:2] and f.dtype == SCALED}
    for layer in sorted(layers):
        moved = attention_moved(found, layouts, layer)
        if moved > ALLOWED:
            raise FloatingPointError(
                f"with queries and keys of block {layer} in 8 bits its attention moves by "
                f"{moved:.3f}, and {ALLOWED} are allowed. Ask for bits: 16"
            )


def attention_moved(found: Found, layouts: Mapping[Name, Layout], layer: int) -> float:
    """The most that a number of attention maps moves with queries and keys in 8 bits."""
    names: list[Name] = [(kind, layer) for kind in HEADED[:2]]
    exact = _scores([found[name] for name in names], names, layouts)
    read_back = [Rounded.of(found[name], SCALED).restored() for name in names]
    rounded = _scores(read_back, names, layouts)
    tokens, most = exact.x.shape[1], 0.0
    for start in range(0, tokens, _ROWS):
        stop = min(start + _ROWS, tokens)
        apart = log_rows(exact, start, stop).exp() - log_rows(rounded, start, stop).exp()
        most = max(most, float(apart.abs().max()))
    return most


def _scores(both: list[np.ndarray], names: list[Name], layouts: Mapping[Name, Layout]) -> Scores:
    queries, keys = (layouts[name] for name in names)
    assert queries.heads is not None
    assert keys.heads is not None
    assert queries.score_scale is not None
    x, y = (
        torch.from_numpy(part).reshape(len(part), heads, -1).transpose(0, 1)
        for part, heads in zip(both, (queries.heads, keys.heads), strict=True)
    )
    return Scores(
        x=x, y=y, scale=queries.score_scale, causal=bool(queries.causal), window=queries.window
    )
