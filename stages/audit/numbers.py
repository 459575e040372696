"""A row's numbers as they are stored, and as the teacher gives them now for the same entries.

What the teacher gives is read off the dense distribution, not made by the code that made the row:
the stored ids are looked up in log p = z - logsumexp(z), whatever kind of target they belong to.

Letters: N scored tokens, K entries, V vocabulary, D hidden, m temperatures, R draws.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..targets.entries_and_tail import CHUNK_BYTES

Numbers = dict[str, np.ndarray]
"""Quantity -> values in nats, position after position; `draws` and `draws_variance` are [N]."""


def stored_numbers(targets: SoftTargets) -> Numbers:
    """The quantities of a row as they are stored; padding is left out."""
    logprobs = targets.logprobs
    found: dict[str, np.ndarray | None] = {
        "logprobs": None if logprobs is None else logprobs[_used(logprobs, targets.entries)],
        # Where every id is an entry, nothing is outside.
        "tail_logprob": None if targets.ids is None else targets.tail_logprob,
        "tempered_tails": targets.tempered_tails,
        "token_logprob": targets.token_logprob,
        "entropy": targets.entropy,
    }
    return {name: values.reshape(-1) for name, values in found.items() if values is not None}


def entries_alone(numbers: Numbers, targets: SoftTargets, following: np.ndarray) -> Numbers:
    """Of a row's quantities those that a foreign table holds.

    They are its entries, and the tokens that are among them.

    Args:
        numbers: Stored or measured, of all positions.
        targets: The row's targets, with ids.
        following: [N] the tokens that follow.
    """
    inside = np.any(targets.ids == following[:, None], axis=1)
    held = {"logprobs": numbers["logprobs"]}
    if inside.any():
        held["token_logprob"] = numbers["token_logprob"][inside]
    return held


class Says(Protocol):
    """What makes logits of states."""

    @property
    def vocab_size(self) -> int:
        """V, of a head over classes their number."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 of [N, D]."""


def measured_numbers(
    states: Tensor,
    head: Says,
    *,
    targets: SoftTargets,
    following: Tensor,
    draw: Mapping[str, float] | None = None,
) -> Numbers:
    """The same quantities by these hidden states, in the same order.

    Of drawn ids there is also `draws`.

    Args:
        states: [N, D] hidden states at the predicting positions, after the final norm, where the
            head is.
        head: The teacher's output head.
        targets: The row's: which ids, which temperatures.
        following: [N] the tokens that follow.
        draw: Sampled: `rounds` R and the exponent `proposal`.
    """
    # [positions, V] float32 logits, so many positions at once.
    size = max(1, CHUNK_BYTES // (4 * head.vocab_size))
    parts: list[Numbers] = []
    for start in range(0, len(states), size):
        chunk = slice(start, start + size)
        logprobs = head.logits(states[chunk]).log_softmax(-1)
        part = targets.positions(chunk)
        measured = dict(_measured(logprobs, part, following[chunk].to(logprobs.device)))
        if draw is not None:
            measured |= _draws(logprobs, part, draw)
        parts.append(
            {name: values.float().cpu().numpy().reshape(-1) for name, values in measured.items()}
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measured(
    logprobs: Tensor, targets: SoftTargets, following: Tensor
) -> Iterator[tuple[str, Tensor]]:
    temperatures = [] if targets.temperatures is None else targets.temperatures.tolist()
    ids = _ids(targets, logprobs)
    outside = logprobs
    if targets.logprobs is None:
        # Sampled: the entropy is that of the distribution that was drawn from.
        drawn_at = temperatures[0] if temperatures else 1.0
        yield "entropy", _entropy((logprobs / drawn_at).log_softmax(-1))
    elif targets.ids is None:
        # Full: every id is an entry.
        yield "entropy", _entropy(logprobs)
        yield "logprobs", logprobs
    else:
        yield "entropy", _entropy(logprobs)
        used = torch.from_numpy(_used(targets.logprobs, targets.entries)).to(ids.device)
        yield "logprobs", logprobs.gather(-1, ids.clamp(min=0))[used]
        outside = _without(logprobs, ids)
        yield "tail_logprob", outside.logsumexp(-1)
    if temperatures:
        # log sum p_i^(1/T) over the ids outside the entries; sampled: over all ids.
        yield "tempered_tails", torch.stack([(outside / t).logsumexp(-1) for t in temperatures], -1)
    yield "token_logprob", logprobs.gather(-1, following.long()[:, None]).squeeze(-1)


def _draws(logprobs: Tensor, targets: SoftTargets, draw: Mapping[str, float]) -> dict[str, Tensor]:
    """Whether ids may have been drawn from this teacher.

    The answer is a number that is 0 in the mean, and its variance. t is the distribution that is
    estimated, softmax(z / T); R ids were drawn from q, its power `proposal`, normalised; w_i is the
    stored estimate of t_i (counts / R, or weights).

        draws            sum_i w_i log t_i + H(t)
                         E[w_i] = t_i: its mean over draws is 0
        draws_variance   (sum_i q_i (t_i / q_i log t_i)^2 - H(t)^2) / R
                         of R independent draws; systematic has less
    """
    temperature = 1.0 if targets.temperatures is None else float(targets.temperatures[0])
    # float64: what is left of the sums is small beside their terms.
    log_t = (logprobs.double() / temperature).log_softmax(-1)
    log_q = (log_t * draw["proposal"]).log_softmax(-1)
    # An id without probability adds nothing: 0 log 0 = 0.
    finite_log_t = log_t.masked_fill(log_t == -torch.inf, 0.0)
    negative_entropy = (log_t.exp() * finite_log_t).sum(-1)
    # q (t / q)^2 = t^2 / q
    square = ((2 * log_t - log_q).exp() * finite_log_t**2).nan_to_num(0.0).sum(-1)
    estimate = torch.from_numpy(targets.probabilities).to(log_t.device)
    of_entries = log_t.gather(-1, _ids(targets, logprobs).clamp(min=0))
    # Padding has estimate 0. An id that this teacher cannot say stays -inf: it was not drawn here.
    drawn = (estimate * of_entries).nan_to_num(0.0, neginf=-torch.inf).sum(-1)
    return {
        "draws": drawn - negative_entropy,
        "draws_variance": (square - negative_entropy**2).clamp(min=0.0) / draw["rounds"],
    }


def _entropy(logprobs: Tensor) -> Tensor:
    """-sum p log p, where 0 log 0 is 0."""
    return -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)


def _without(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities with -inf at the ids; -1 is no id."""
    n, vocab_size = logprobs.shape
    # One column more than there are ids takes the marks of the padding.
    marks = torch.zeros(n, vocab_size + 1, dtype=torch.bool, device=logprobs.device)
    marks.scatter_(-1, ids.masked_fill(ids < 0, vocab_size), True)
    return logprobs.masked_fill(marks[:, :vocab_size], -torch.inf)


def _ids(targets: SoftTargets, logprobs: Tensor) -> Tensor:
    """[N, K] the entries' ids beside the log-probabilities; of full targets none."""
    ids = np.empty((len(logprobs), 0), np.int32) if targets.ids is None else targets.ids
    return torch.from_numpy(ids).long().to(logprobs.device)


def _used(logprobs: np.ndarray, entries: np.ndarray | None) -> np.ndarray:
    """[N, K] which places hold an entry; the rest is padding."""
    n, k = logprobs.shape
    counts = np.full(n, k) if entries is None else entries
    return np.arange(k) < counts[:, None]
