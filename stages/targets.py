"""From hidden states to soft targets, a chunk of tokens at a time: [N, V] in float32 never exists whole.

Letters: N scored tokens, K entries, V vocabulary, D hidden. With z the logits, log p = z - logsumexp(z) over the full
vocabulary, in float32; every kind has `token_logprob` [N] and `entropy` [N] (nats) of that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..storage.codec import SoftTargets
from .head import Head

CHUNK_BYTES = 64 * 2**20  # float32 logits held at once


@dataclass(frozen=True, kw_only=True, slots=True)
class TopP:
    """Which entries `topp_targets` keeps."""

    p: float
    """Mass to keep."""
    k: int
    """Entries at most."""
    k_min: int = 1
    """Entries at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """How `sampled_targets` draws."""

    rounds: int
    """Draws per position, with replacement."""
    seed: int
    """The row's; position n's draws depend on it and on n, not on the chunk or on the positions that follow."""
    draw: Literal["multinomial", "systematic"] = "multinomial"
    proposal: float = 1.0
    """Draw from the teacher to this power, normalised; 1: from the teacher itself."""


def soft_targets(hidden: Tensor, head: Head, next_ids: Tensor, *, kind: str, k: int) -> SoftTargets:
    """The distribution of the next token at each position: its K best and the rest of its mass, or all of it.

    The mass outside the K best is a logsumexp over what is not kept (1 - sum of the kept would cancel).

    Args:
        hidden: [N, D] states at the predicting positions, after the final norm.
        head: The model's output head.
        next_ids: [N] the tokens that follow.
        kind: `topk`, or `full` for all V in id order.
        k: Entries per position (topk).

    Returns:
        ids [N, K] (full: None), logprobs [N, K] descending, tail_logprob [N], token_logprob [N], entropy [N].
    """
    parts: list[tuple[Tensor, ...]] = []
    for _, logprobs, known in _chunks(hidden, head, next_ids):
        if kind == "full":
            parts.append((logprobs, torch.full_like(known[0], -torch.inf), *known))
        else:
            kept, ids = logprobs.topk(k, dim=-1)
            tail = logprobs.scatter_(-1, ids, -torch.inf).logsumexp(-1)
            parts.append((kept, tail, *known, ids.int()))
    kept_logprobs, rest, token, entropy, *ids_of = _joined(parts)
    return SoftTargets(ids_of[0] if ids_of else None, kept_logprobs, rest, token, entropy)


def topp_targets(hidden: Tensor, head: Head, next_ids: Tensor, *, keep: TopP) -> SoftTargets:
    """The fewest best entries whose mass is at least p, within `k_min` and `k`, and the rest of the mass exactly.

    Takes what `soft_targets` takes; returns the same with `entries` [N], and K the number of the widest position.
    """
    parts: list[tuple[Tensor, ...]] = []
    most = min(keep.k, head.vocab_size)
    for _, logprobs, known in _chunks(hidden, head, next_ids):
        kept, ids = logprobs.topk(most, dim=-1)
        needed = (kept.double().exp().cumsum(-1) < keep.p).sum(-1) + 1
        entries = needed.clamp(min(keep.k_min, most), most)
        used = torch.arange(most, device=kept.device) < entries[:, None]
        tail = logprobs.scatter_(-1, ids, kept.masked_fill(used, -torch.inf)).logsumexp(-1)
        kept, ids = kept.masked_fill(~used, -torch.inf), ids.masked_fill(~used, -1)
        parts.append((kept, ids.int(), entries.int(), tail, *known))
    best, best_ids, widths, rest, token, entropy = _joined(parts)
    widest = int(widths.max(initial=0))
    return SoftTargets(best_ids[:, :widest], best[:, :widest], rest, token, entropy, entries=widths)


def sampled_targets(hidden: Tensor, head: Head, next_ids: Tensor, *, draws: Draws) -> SoftTargets:
    """Ids drawn from the teacher, and how often: an estimate of its distribution whose mean is that distribution.

    With c_i how often id i was drawn in R rounds from q, q proportional to p to the power `proposal`:

        counts c_i          E[c_i / R] = p_i        proposal 1: c_i / R is the target
        weights w_i         w_i = c_i / R * p_i / q_i, E[w_i] = p_i, else

    `multinomial` draws R independent points of [0, 1) and takes the ids whose share of the cumulative q they hit.
    `systematic` takes R equidistant points from one random offset: same mean, c_i is R q_i rounded up or down.
    Anshumann et al. 2025 (Random Sampling KD), arXiv 2503.16870; Kitagawa 1996 for systematic resampling.

    Takes what `soft_targets` takes; returns ids [N, K] most drawn first, counts or weights [N, K], entries [N].
    """
    points = torch.from_numpy(_points(len(hidden), draws)).to(head.weight.device)
    parts: list[tuple[Tensor, ...]] = []
    for chunk, logprobs, known in _chunks(hidden, head, next_ids):
        scaled = logprobs if draws.proposal == 1.0 else (logprobs * draws.proposal).log_softmax(-1)
        share = scaled.double().exp().cumsum(-1)
        below = torch.nextafter(share[:, -1:], torch.zeros_like(share[:, -1:]))  # a point must not round up to the end
        drawn = torch.searchsorted(share, torch.minimum(points[chunk] * share[:, -1:], below), right=True)
        ids, counts = _counted(drawn)
        values = counts.int()
        if draws.proposal != 1.0:
            ratio = (logprobs.gather(-1, ids.clamp(min=0)) - scaled.gather(-1, ids.clamp(min=0))).exp()
            values = (counts / draws.rounds * ratio).masked_fill(counts == 0, 0.0)
        parts.append((ids.int(), values, (counts > 0).sum(-1).int(), *known))
    all_ids, estimates, entries, token, entropy = _joined(parts)
    widest = int(entries.max(initial=0))
    name = "counts" if draws.proposal == 1.0 else "weights"
    return SoftTargets(
        ids=all_ids[:, :widest],
        logprobs=None,
        tail_logprob=None,
        token_logprob=token,
        entropy=entropy,
        entries=entries,
        **{name: estimates[:, :widest]},
    )


def _chunks(hidden: Tensor, head: Head, next_ids: Tensor) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor]]]:
    """Chunk by chunk: where it is, logprobs [n, V], and (token_logprob [n], entropy [n])."""
    hidden, next_ids = (t.to(head.weight.device) for t in (hidden, next_ids))  # a spread model has it elsewhere
    size = max(1, CHUNK_BYTES // (4 * head.vocab_size))
    for start in range(0, hidden.shape[0], size):
        chunk = slice(start, start + size)
        logprobs = head.logits(hidden[chunk]).log_softmax(-1)
        token = logprobs.gather(-1, next_ids[chunk, None]).squeeze(-1)
        entropy = -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)  # a logit of -inf: 0 * -inf is 0 here
        yield chunk, logprobs, (token, entropy)


def _points(positions: int, draws: Draws) -> np.ndarray:
    """[N, R] points in [0, 1), a position's after the other's from one counter-based generator."""
    uniform = np.random.Generator(np.random.Philox(draws.seed))
    if draws.draw == "multinomial":
        return uniform.random((positions, draws.rounds))
    return (np.arange(draws.rounds) + uniform.random((positions, 1))) / draws.rounds


def _counted(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and counts [n, R], most drawn first, then by id; -1 and 0 after the last."""
    ordered, _ = drawn.sort(-1)
    place = torch.zeros_like(ordered)
    place[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    counts = torch.zeros_like(ordered).scatter_add_(-1, place, torch.ones_like(ordered))
    ids = torch.full_like(ordered, -1).scatter_(-1, place, ordered)
    best = counts.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, best), counts.gather(-1, best)


def _joined(parts: list[tuple[Tensor, ...]]) -> list[np.ndarray]:
    return [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
