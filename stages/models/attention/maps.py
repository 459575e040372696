"""Maps softmax(scale x y^T) over the tokens of a sample: attention, of queries and keys.

Samples follow one another in a pass. Each is cut out, so none sees another and none is padded.
Every token sees itself, so no row of a map is empty. All is float32.

Letters: A maps (heads), T tokens of a pass, t of a sample, d width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_UNSEEN = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """What maps are made of: row i of map a is the softmax of scale x_ai . y_aj.

    It is over the tokens j that i sees.
    """

    x: Tensor
    """[A, T, d], of attention the queries."""
    y: Tensor
    """[B, T, d], of attention the keys. B divides A: each serves A / B maps, one after another."""
    scale: float
    causal: bool = False
    """A token sees nothing behind itself."""
    window: int | None = None
    """A token sees those less than this far away; None: however far."""


def maps(scores: Scores, lengths: Sequence[int]) -> Iterator[Tensor]:
    """The maps [A, t, t] of one sample after another, whole.

    They are to look at, or to compare with a model's own.
    """
    for own in samples(scores, lengths):
        yield log_rows(own, 0, own.x.shape[1]).exp()


def samples(scores: Scores, lengths: Sequence[int]) -> Iterator[Scores]:
    """The same of each sample alone; the lengths make T together."""
    sizes = list(lengths)
    for x, y in zip(scores.x.split(sizes, dim=1), scores.y.split(sizes, dim=1), strict=True):
        yield replace(scores, x=x, y=y)


def log_rows(own: Scores, start: int, stop: int) -> Tensor:
    """Log-probabilities [A, stop - start, t] of rows of one sample's maps.

    What is not seen has -3.4e38, not -inf.
    """
    served, tokens, width = own.y.shape
    # Autocast would multiply in bfloat16.
    with torch.autocast(own.x.device.type, enabled=False):
        rows = own.scale * own.x[:, start:stop].float()
        # The maps that share a y stand below one another, so that y is never repeated.
        products = rows.reshape(served, -1, width) @ own.y.float().transpose(1, 2)
    products = products.reshape(len(own.x), stop - start, tokens)
    return products.masked_fill(_unseen(own, start, stop), _UNSEEN).log_softmax(-1)


def _unseen(own: Scores, start: int, stop: int) -> Tensor:
    """[stop - start, t] bool: what each of these tokens does not see of its sample."""
    here = torch.arange(own.y.shape[1], device=own.y.device)
    ahead = here - here[start:stop, None]
    unseen = ahead > 0 if own.causal else torch.zeros_like(ahead, dtype=torch.bool)
    return unseen if own.window is None else unseen | (ahead.abs() >= own.window)
