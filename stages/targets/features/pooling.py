"""One vector a text from the states of its tokens."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ....storage.errors import UsageError
from ...recipe.features import Pooling


def pooled(states: Tensor, lengths: Sequence[int], how: Pooling) -> Tensor:
    """One vector of each sample [S, D] float32, made from its states.

    It is that of its first token (`cls`), that of its last, or the mean over all.

    `cls` is for encoders that are trained so, `last` for causal models, whose last token alone has
    seen the text; `mean` for both.

    Args:
        states: [T, D] of samples that follow one another. Of a padded batch [B, t, D] with a mask
            [B, t] they are `states[mask]`, and the lengths `mask.sum(1)`.
        lengths: Tokens of each sample; their sum is T.
        how: Which.

    Raises:
        UsageError: a sample has no token.
    """
    sizes = list(lengths)
    if min(sizes, default=1) < 1:
        raise UsageError(f"pooled: sample {sizes.index(min(sizes))} has no token. Leave it out.")
    if how == "mean":
        return torch.stack([part.float().mean(0) for part in states.split(sizes)])
    ends = list(accumulate(sizes))
    at = [end - 1 for end in ends] if how == "last" else [0, *ends[:-1]]
    return states[torch.tensor(at, device=states.device)].float()
