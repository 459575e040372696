"""A stored row's numbers as the teacher gives them now, for the same entries: what deep verification compares with.

Everything is read off the dense distribution, not made by the code that made the row: the stored
ids are looked up in log p = z - logsumexp(z), whatever kind of target they belong to.

Letters: N scored tokens, K entries, V vocabulary, D hidden, m temperatures, R draws.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..models.head import Head
from ..targets.reduce import CHUNK_BYTES

Numbers = dict[str, np.ndarray]
"""Quantity -> values in nats, position after position; `draws` and `draws_variance` are [N]."""


def stored_numbers(targets: SoftTargets) -> Numbers:
    """The quantities of a row as they are stored; padding is left out."""
    found: dict[str, np.ndarray | None] = {
        "logprobs": None if targets.logprobs is None else targets.logprobs[_used(targets)],
        "tail_logprob": None if targets.ids is None else targets.tail_logprob,
        "tempered_tails": targets.tempered_tails,
        "token_logprob": targets.token_logprob,
        "entropy": targets.entropy,
    }
    return {name: values.reshape(-1) for name, values in found.items() if values is not None}


def entries_alone(numbers: Numbers, targets: SoftTargets, following: np.ndarray) -> Numbers:
    """Of a row's quantities those that a foreign table holds: its entries, and the tokens that are among them.

    Args:
        numbers: Stored or measured, of all positions.
        targets: The row's targets, with ids.
        following: [N] the tokens that follow.
    """
    assert targets.ids is not None
    inside = (targets.ids == following[:, None]).any(axis=1)
    held = {"logprobs": numbers["logprobs"]}
    return held | ({"token_logprob": numbers["token_logprob"][inside]} if inside.any() else {})


def remeasure(
    states: Tensor,
    head: Head,
    stored: SoftTargets,
    following: Tensor,
    *,
    draw: Mapping[str, float] | None = None,
) -> Numbers:
    """The same quantities by these hidden states, in the same order.

    Drawn ids do not repeat; for sampled targets it is measured whether they may have been drawn
    from this teacher. With w_i the stored estimate (counts / R, or weights) of the distribution t
    that was drawn from through a proposal q,

        draws            sum_i w_i log t_i + H(t)                              its mean over draws is 0
        draws_variance   (sum_i q_i (t_i / q_i log t_i)^2 - H(t)^2) / R        of independent draws; systematic has less

    Args:
        states: [N, D] hidden states at the predicting positions, after the final norm.
        head: The teacher's output head.
        stored: The row's targets: which ids, which temperatures.
        following: [N] the tokens that follow.
        draw: Sampled: `rounds` R and the exponent `proposal`.
    """
    size = max(1, CHUNK_BYTES // (4 * head.vocab_size))
    parts: list[Numbers] = []
    for start in range(0, len(states), size):
        chunk = slice(start, start + size)
        logprobs = head.logits(states[chunk].to(head.weight.device)).log_softmax(-1)
        part = stored.positions(chunk)
        measured = dict(_measured(logprobs, part, following[chunk].to(logprobs.device)))
        if draw is not None:
            measured |= _draws(logprobs, part, draw)
        parts.append(
            {name: values.float().cpu().numpy().reshape(-1) for name, values in measured.items()}
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measured(
    logprobs: Tensor, stored: SoftTargets, following: Tensor
) -> Iterator[tuple[str, Tensor]]:
    temperatures = [] if stored.temperatures is None else stored.temperatures.tolist()
    outside = logprobs
    if stored.logprobs is None:
        drawn_at = temperatures[0] if temperatures else 1.0
        yield "entropy", _entropy((logprobs / drawn_at).log_softmax(-1))
    else:
        yield "entropy", _entropy(logprobs)
        if stored.ids is None:
            yield "logprobs", logprobs
        else:
            ids = torch.from_numpy(stored.ids).long().to(logprobs.device)
            kept = logprobs.gather(-1, ids.clamp(min=0))
            yield "logprobs", kept[torch.from_numpy(_used(stored)).to(kept.device)]
            outside = _without(logprobs, ids)
            yield "tail_logprob", outside.logsumexp(-1)
    if temperatures:
        yield "tempered_tails", torch.stack([(outside / t).logsumexp(-1) for t in temperatures], -1)
    yield "token_logprob", logprobs.gather(-1, following.long()[:, None]).squeeze(-1)


def _draws(logprobs: Tensor, stored: SoftTargets, draw: Mapping[str, float]) -> dict[str, Tensor]:
    assert stored.ids is not None
    temperature = 1.0 if stored.temperatures is None else float(stored.temperatures[0])
    t = (logprobs.double() / temperature).log_softmax(-1)
    q = (t * draw["proposal"]).log_softmax(-1)
    information = t.masked_fill(t == -torch.inf, 0.0)
    mean = (t.exp() * information).sum(-1)
    square = ((2 * t - q).exp() * information**2).nan_to_num(0.0).sum(-1)
    ids = torch.from_numpy(stored.ids).long().to(t.device)
    estimate = torch.from_numpy(stored.probabilities).to(t.device)
    drawn = (estimate * t.gather(-1, ids.clamp(min=0))).nan_to_num(0.0, neginf=-torch.inf).sum(-1)
    return {
        "draws": drawn - mean,
        "draws_variance": (square - mean**2).clamp(min=0.0) / draw["rounds"],
    }


def _entropy(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)


def _without(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities with -inf at the ids; -1 is no id."""
    marks = torch.zeros(
        logprobs.shape[0], logprobs.shape[1] + 1, dtype=torch.bool, device=logprobs.device
    )
    marks.scatter_(-1, ids.masked_fill(ids < 0, logprobs.shape[1]), True)
    return logprobs.masked_fill(marks[:, :-1], -torch.inf)


def _used(targets: SoftTargets) -> np.ndarray:
    """[N, K] which places hold an entry."""
    assert targets.logprobs is not None
    n, k = targets.logprobs.shape
    return (
        np.arange(k) < np.full((n, 1), k)
        if targets.entries is None
        else np.arange(k) < targets.entries[:, None]
    )
