"""Draws from the teacher (Random Sampling KD): which ids, how often, from which seed."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .spec import Kept

Columns = dict[str, Tensor]
"""Fields of `SoftTargets` at some positions."""


@dataclass(frozen=True, slots=True)
class Span:
    """The positions of one row in a batch."""

    positions: int
    seed: int = 0
    """sampled: the row's. Position n's draws depend on it and on n, not on the batch, the chunk or
    later positions."""


def drawn_columns(logprobs: Tensor, points: Tensor, kept: Kept) -> Columns:
    """Ids drawn from the teacher, and how often.

    They are an estimate of its distribution whose mean is that distribution.

    With p the teacher at the one temperature, softmax(z / T), and c_i how often id i was drawn in R
    rounds from q, q proportional to p to the power `proposal`:

        counts c_i          E[c_i / R] = p_i        proposal 1: c_i / R is the target
        weights w_i         w_i = c_i / R * p_i / q_i, E[w_i] = p_i, else

    `multinomial` draws R independent points of [0, 1) and takes the ids whose share of the
    cumulative q they hit. `systematic` takes R equidistant points from one random offset: same
    mean, c_i is R q_i rounded up or down. Anshumann et al. 2025 (Random Sampling KD), arXiv
    2503.16870; Kitagawa 1996 for systematic resampling.

    Args:
        logprobs: [n, V] at temperature 1.
        points: [n, R] in [0, 1).
        kept: How it is drawn.
    """
    found: Columns = {}
    for t in kept.temperatures:
        normaliser = (logprobs / t).logsumexp(-1, keepdim=True)
        logprobs = logprobs / t - normaliser
        terms = torch.where(logprobs == -torch.inf, 0.0, logprobs.exp() * logprobs)
        found = {"entropy": -terms.sum(-1), "tempered_tails": normaliser}
    assert kept.proposal is not None
    scaled = logprobs if kept.proposal == 1.0 else (logprobs * kept.proposal).log_softmax(-1)
    share = scaled.double().exp().cumsum(-1)
    below = torch.nextafter(
        share[:, -1:], torch.zeros_like(share[:, -1:])
    )  # a point must not round up to the end
    hits = torch.searchsorted(share, torch.minimum(points * share[:, -1:], below), right=True)
    hits.clamp_(
        max=share.shape[-1] - 1
    )  # past the end where the teacher's numbers are NaN, which the caller refuses
    ids, counts = _counted(hits)
    found |= {"ids": ids.int(), "entries": (counts > 0).sum(-1).int()}
    if kept.proposal == 1.0:
        return found | {"counts": counts.int()}
    ratio = (logprobs.gather(-1, ids.clamp(min=0)) - scaled.gather(-1, ids.clamp(min=0))).exp()
    return found | {"weights": (counts / kept.k * ratio).masked_fill(counts == 0, 0.0)}


def points_of(kept: Kept, spans: Iterable[Span]) -> Tensor | None:
    """sampled: [N, R] points in [0, 1). A row has a counter-based generator.

    The points of a position follow those of the one before.
    """
    if not kept.structure.drawn:
        return None
    found = []
    for span in spans:
        uniform = np.random.Generator(np.random.Philox(span.seed))
        if kept.draw == "multinomial":
            found.append(uniform.random((span.positions, kept.k)))
        else:
            found.append((np.arange(kept.k) + uniform.random((span.positions, 1))) / kept.k)
    return torch.from_numpy(np.concatenate(found))


def _counted(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and counts [n, R], most drawn first, then by id; -1 and 0 after the last."""
    ordered, _ = drawn.sort(-1)
    place = torch.zeros_like(ordered)
    place[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    counts = torch.zeros_like(ordered).scatter_add_(-1, place, torch.ones_like(ordered))
    ids = torch.full_like(ordered, -1).scatter_(-1, place, ordered)
    best = counts.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, best), counts.gather(-1, best)
