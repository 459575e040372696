"""What the loss takes of a sample's stored targets: the recipe's entries, at its temperature.

A store holds what any recipe asked for, so a row may have more entries than this one wants, and
several temperatures. With p the stored distribution at temperature 1 (entries i and a tail), the
one at temperature T is

    p_i^(1/T) / Z      Z = sum over all ids of p^(1/T), the tail's part of it stored:
                       `SoftTargets.tempered_tails`

which is the softmax of the teacher's logits divided by T. Entries that are cut join the tail, at T
their p_i^(1/T).

Letters: N scored tokens, K entries, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...storage.errors import UsageError
from ...storage.tables.soft_targets import SoftTargets
from .batch import TargetBatch
from .best_entries import ENTRIES
from .spec import Kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How stored targets are read."""

    kept: Kept | None = None
    """Entries to take of a row that has more: topk's or topp's. None: as stored."""
    temperature: float = 1.0
    """T."""
    unstored: Literal["refuse", "approximate"] = "refuse"
    """Where T is not stored; approximate: the tail, of mass q, counts as one id, q^(1/T). The n ids
    that it is made of have up to n^(1 - 1/T) times as much for T > 1, so the entries become too
    heavy; for T < 1 too light."""


def soft_part(targets: SoftTargets, labels: Tensor, reading: Reading) -> TargetBatch:
    """Targets of one sample.

    Raises:
        UsageError: they cannot be had at this temperature.
    """
    if targets.logprobs is None:
        return _sampled(targets, labels, reading)
    assert targets.tail_logprob is not None
    ids = None if targets.ids is None else torch.from_numpy(targets.ids.astype(np.int64))
    logprobs, tail = torch.from_numpy(targets.logprobs), torch.from_numpy(targets.tail_logprob)
    if reading.temperature != 1.0:
        logprobs, tail = logprobs / reading.temperature, _tempered_tail(targets, reading)
    entries = _wanted(targets, reading.kept)
    if entries is not None:
        if ids is None:
            ids = torch.from_numpy(targets.logprobs).argsort(dim=-1, descending=True, stable=True)
            logprobs = logprobs.gather(-1, ids)
        most = min(int(entries.max()) if len(entries) else 0, logprobs.shape[-1])
        cut = torch.arange(logprobs.shape[-1]) >= entries[:, None]
        tail = torch.logaddexp(tail, logprobs.masked_fill(~cut, -torch.inf).logsumexp(-1))
        logprobs = logprobs[:, :most].masked_fill(cut[:, :most], -torch.inf)
        ids = ids[:, :most].masked_fill(cut[:, :most], -1)
    if reading.temperature != 1.0:
        total = torch.logaddexp(tail, logprobs.logsumexp(-1))
        logprobs, tail = logprobs - total[:, None], tail - total
    return TargetBatch(labels=labels, ids=ids, logprobs=logprobs, tail_logprob=tail)


def _sampled(targets: SoftTargets, labels: Tensor, reading: Reading) -> TargetBatch:
    drawn = 1.0 if targets.temperatures is None else float(targets.temperatures[0])
    if np.float32(reading.temperature) != np.float32(drawn):
        raise UsageError(
            f"loss.temperature: is {reading.temperature:g}, but the sampled targets were drawn at "
            f"{drawn:g}, and draws cannot be tempered. Set it to {drawn:g}, or score with "
            f"score.temperatures: [{reading.temperature:g}]."
        )
    assert targets.ids is not None
    return TargetBatch(
        labels=labels,
        ids=torch.from_numpy(targets.ids.astype(np.int64)),
        probabilities=torch.tensor(targets.probabilities),
        entropy=torch.tensor(targets.entropy),
    )


def _tempered_tail(targets: SoftTargets, reading: Reading) -> Tensor:
    """[N] log of the sum of p^(1/T) over the ids that are no stored entry."""
    assert targets.tail_logprob is not None
    stored = np.empty(0, np.float32) if targets.temperatures is None else targets.temperatures
    place = np.flatnonzero(stored == np.float32(reading.temperature))
    if len(place) and targets.tempered_tails is not None:
        return torch.tensor(targets.tempered_tails[:, place[0]])
    as_one_id = torch.tensor(targets.tail_logprob) / reading.temperature
    if reading.unstored == "approximate" or bool(
        (as_one_id == -torch.inf).all()
    ):  # no tail has no tempered tail
        return as_one_id
    raise UsageError(
        f"loss.temperature: {reading.temperature:g} is not stored with these targets, which have "
        f"{', '.join(f'{t:g}' for t in (1.0, *stored))}. Score with it in score.temperatures, "
        "take one that is stored, or set loss.unstored_temperature to approximate."
    )


def _wanted(targets: SoftTargets, kept: Kept | None) -> Tensor | None:
    """[N] how many of the best entries to take; None: all that there are."""
    if kept is None or not kept.structure.has_tail:
        return None
    assert targets.logprobs is not None
    n, stored = targets.logprobs.shape
    if kept.kind not in ENTRIES:
        return torch.full((n,), kept.k) if kept.k < stored else None
    best = targets.logprobs if targets.ids is not None else -np.sort(-targets.logprobs, axis=1)
    mass = np.exp(best, dtype=np.float64).cumsum(axis=1)
    return torch.from_numpy(ENTRIES[kept.kind](mass[:, : kept.k], kept))
