"""From hidden states to soft targets, a chunk of tokens at a time: [N, V] in float32 never exists whole.

Letters: N scored tokens, K entries, V vocabulary, D hidden, m temperatures. With z the logits, log p = z - logsumexp(z)
over the full vocabulary, in float32; every kind has `token_logprob` [N] and `entropy` [N] (nats) of that, but for
sampled targets at another temperature, whose entropy is that of the distribution they are drawn from.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..storage.codec import SoftTargets
from .head import Head
from .kept import Kept

CHUNK_BYTES = 64 * 2**20  # float32 logits held at once
_ENTRIES = ("ids", "logprobs", "counts", "weights")

Columns = dict[str, Tensor]
"""Fields of `SoftTargets` at some positions."""
Chunk = tuple[slice, Tensor, Columns]
"""Which positions, their logprobs [n, V], and what every kind has [n]."""


def soft_targets(hidden: Tensor, head: Head, next_ids: Tensor, *, kept: Kept, seed: int = 0) -> SoftTargets:
    """The distribution of the next token at each position, as far as it is kept.

    `topk`: the K best. `topp`: the fewest best whose mass is at least p, within `k_min` and `k`. Both with the mass
    outside the entries, a logsumexp over what is not kept (1 - sum of the kept would cancel), and for each temperature
    T the logsumexp of log p / T over the same ids. `full`: all V in id order. `sampled`: see `_drawn`.

    Args:
        hidden: [N, D] states at the predicting positions, after the final norm.
        head: The model's output head.
        next_ids: [N] the tokens that follow.
        kept: What is kept.
        seed: sampled: the row's. Position n's draws depend on it and on n, not on the chunk or on later positions.

    Returns:
        N targets of V ids at most; where positions differ in entries, K is the number of the widest.
    """
    return _collected(_chunks(hidden, head, next_ids), len(hidden), kept=kept, seed=seed)


def targets_of(logprobs: Tensor, next_ids: Tensor, *, kept: Kept, seed: int = 0) -> SoftTargets:
    """`soft_targets` of distributions that are there already: log-probabilities [N, V], which are overwritten."""
    whole = slice(0, len(logprobs)), logprobs, _known(logprobs, next_ids)
    return _collected([whole], len(logprobs), kept=kept, seed=seed)


def _collected(chunks: Iterable[Chunk], positions: int, *, kept: Kept, seed: int) -> SoftTargets:
    sampled = kept.kind == "sampled"
    points = torch.from_numpy(_points(positions, kept, seed)) if sampled else torch.empty(positions, 0)
    parts: list[Columns] = []
    for where, logprobs, known in chunks:
        if sampled:
            parts.append(known | _drawn(logprobs, points[where].to(logprobs.device), kept))
        elif kept.kind == "full":
            parts.append(known | {"logprobs": logprobs, "tail_logprob": torch.full_like(logprobs[:, 0], -torch.inf)})
        else:
            parts.append(known | _best(logprobs, kept))
    return _joined(parts, kept)


def _chunks(hidden: Tensor, head: Head, next_ids: Tensor) -> Iterator[Chunk]:
    hidden, next_ids = (t.to(head.weight.device) for t in (hidden, next_ids))  # a spread model has it elsewhere
    size = max(1, CHUNK_BYTES // (4 * head.vocab_size))
    for start in range(0, hidden.shape[0], size):
        chunk = slice(start, start + size)
        logprobs = head.logits(hidden[chunk]).log_softmax(-1)
        yield chunk, logprobs, _known(logprobs, next_ids[chunk])


def _known(logprobs: Tensor, next_ids: Tensor) -> Columns:
    token = logprobs.gather(-1, next_ids[:, None]).squeeze(-1)
    return {"token_logprob": token, "entropy": _entropy(logprobs)}


def _entropy(logprobs: Tensor) -> Tensor:
    terms = logprobs.exp() * logprobs
    return -torch.where(logprobs == -torch.inf, 0.0, terms).sum(-1)  # 0 * -inf is 0 here, and a NaN stays one


def _best(logprobs: Tensor, kept: Kept) -> Columns:
    """Entries of `topk` and `topp`, and what is outside them; overwrites `logprobs` [n, V]."""
    most = min(kept.k, logprobs.shape[-1])
    best, ids = logprobs.topk(most, dim=-1)
    found: Columns = {}
    used = torch.ones_like(ids, dtype=torch.bool)
    if kept.p is not None and kept.k_min is not None:
        needed = (best.double().exp().cumsum(-1) < kept.p).sum(-1) + 1
        entries = needed.clamp(min(kept.k_min, most), most)
        used = torch.arange(most, device=best.device) < entries[:, None]
        found["entries"] = entries.int()
    rest = logprobs.scatter_(-1, ids, best.masked_fill(used, -torch.inf))
    found |= {"ids": ids.int().masked_fill(~used, -1), "logprobs": best.masked_fill(~used, -torch.inf)}
    found["tail_logprob"] = rest.logsumexp(-1)
    if kept.temperatures:
        found["tempered_tails"] = torch.stack([(rest / t).logsumexp(-1) for t in kept.temperatures], dim=-1)
    return found


def _drawn(logprobs: Tensor, points: Tensor, kept: Kept) -> Columns:
    """Ids drawn from the teacher, and how often: an estimate of its distribution whose mean is that distribution.

    With p the teacher at the one temperature, softmax(z / T), and c_i how often id i was drawn in R rounds from q, q
    proportional to p to the power `proposal`:

        counts c_i          E[c_i / R] = p_i        proposal 1: c_i / R is the target
        weights w_i         w_i = c_i / R * p_i / q_i, E[w_i] = p_i, else

    `multinomial` draws R independent points of [0, 1) and takes the ids whose share of the cumulative q they hit.
    `systematic` takes R equidistant points from one random offset: same mean, c_i is R q_i rounded up or down.
    Anshumann et al. 2025 (Random Sampling KD), arXiv 2503.16870; Kitagawa 1996 for systematic resampling.

    Args:
        logprobs: [n, V] at temperature 1.
        points: [n, R] in [0, 1).
        kept: How it is drawn.
    """
    found: Columns = {}
    for t in kept.temperatures:
        normaliser = (logprobs / t).logsumexp(-1, keepdim=True)
        logprobs = logprobs / t - normaliser
        found = {"entropy": _entropy(logprobs), "tempered_tails": normaliser}
    assert kept.proposal is not None
    scaled = logprobs if kept.proposal == 1.0 else (logprobs * kept.proposal).log_softmax(-1)
    share = scaled.double().exp().cumsum(-1)
    below = torch.nextafter(share[:, -1:], torch.zeros_like(share[:, -1:]))  # a point must not round up to the end
    hits = torch.searchsorted(share, torch.minimum(points * share[:, -1:], below), right=True)
    ids, counts = _counted(hits)
    found |= {"ids": ids.int(), "entries": (counts > 0).sum(-1).int()}
    if kept.proposal == 1.0:
        return found | {"counts": counts.int()}
    ratio = (logprobs.gather(-1, ids.clamp(min=0)) - scaled.gather(-1, ids.clamp(min=0))).exp()
    return found | {"weights": (counts / kept.k * ratio).masked_fill(counts == 0, 0.0)}


def _points(positions: int, kept: Kept, seed: int) -> np.ndarray:
    """[N, R] points in [0, 1), a position's after the other's from one counter-based generator."""
    uniform = np.random.Generator(np.random.Philox(seed))
    if kept.draw == "multinomial":
        return uniform.random((positions, kept.k))
    return (np.arange(kept.k) + uniform.random((positions, 1))) / kept.k


def _counted(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and counts [n, R], most drawn first, then by id; -1 and 0 after the last."""
    ordered, _ = drawn.sort(-1)
    place = torch.zeros_like(ordered)
    place[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    counts = torch.zeros_like(ordered).scatter_add_(-1, place, torch.ones_like(ordered))
    ids = torch.full_like(ordered, -1).scatter_(-1, place, ordered)
    best = counts.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, best), counts.gather(-1, best)


def _joined(parts: list[Columns], kept: Kept) -> SoftTargets:
    found = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    if "entries" in found:
        widest = int(found["entries"].max(initial=0))
        found |= {name: found[name][:, :widest] for name in _ENTRIES if name in found}
    if kept.temperatures:
        found["temperatures"] = np.array(kept.temperatures, np.float32)
    nothing: dict[str, Any] = dict.fromkeys(("ids", "logprobs", "tail_logprob"))
    return SoftTargets(**nothing | found)
