"""What the loss is asked for at N positions: hard and soft targets, in the student's vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...storage.errors import UsageError
from ..models.inputs.reads import check_ids


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TargetBatch:
    """What N predicting positions are asked for: hard targets, and maybe soft ones.

    Soft ones are log-probabilities, or sampled.
    """

    labels: Tensor
    """[N] int64 hard targets: the tokens that are there."""
    ids: Tensor | None = None
    """[N, K] int64, distinct in a row; -1 is no entry (logprob -inf, probability 0). None with
    logprobs: full, in id order."""
    logprobs: Tensor | None = None
    """[N, K] float32 natural-log probabilities of the teacher, at the objective's temperature."""
    tail_logprob: Tensor | None = None
    """[N] float32 log of the teacher's probability outside the entries, at the same temperature;
    -inf if none."""
    probabilities: Tensor | None = None
    """[N, K] float32 sampled: estimate of the teacher's probabilities at that temperature, in place
    of logprobs."""
    entropy: Tensor | None = None
    """[N] float32 sampled: entropy of the whole teacher at that temperature, nats."""
    weights: Tensor | None = None
    """[N] float32 of the divergence at each position, of several teachers; None: 1."""

    @property
    def soft(self) -> bool:
        """Whether there are soft targets."""
        return self.logprobs is not None or self.probabilities is not None

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        values = (getattr(self, f.name) for f in fields(self))
        return sum(value.nbytes for value in values if value is not None)

    def rows(self, start: int, stop: int) -> Self:
        """Positions start to stop."""
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from which copies to a GPU do not block."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: change(value) for name, value in values.items() if value is not None}
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MoreTargets:
    """What further teachers say at some of the N positions."""

    at: Tensor
    """[M] int64 which of the N."""
    targets: TargetBatch
    """M of them, with weights."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.at.nbytes + self.targets.nbytes

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same on another device."""
        targets = self.targets.to(device, non_blocking=non_blocking)
        return replace(self, at=self.at.to(device, non_blocking=non_blocking), targets=targets)

    def pin_memory(self) -> Self:
        """The same in page-locked memory."""
        return replace(self, at=self.at.pin_memory(), targets=self.targets.pin_memory())


def fit_vocabulary(targets: TargetBatch, student_vocab: int) -> TargetBatch:
    """Targets in terms of the student's vocabulary.

    A teacher whose embedding is padded further has ids beyond it.

    Entries with such ids become no entries and their mass joins the tail. Where the entries that
    remain are the student's whole vocabulary it has no id left for a tail: there the teacher is
    conditioned on the ids both have. Of sampled targets, which have no tail, draws of such ids are
    left out.

    Raises:
        UsageError: a hard target is not in the student's vocabulary.
    """
    if targets.labels.numel():
        check_ids(int(targets.labels.max()), student_vocab, "the text has")
    if targets.probabilities is not None:
        assert targets.ids is not None
        foreign = targets.ids >= student_vocab
        drawn = targets.probabilities.masked_fill(foreign, 0.0)
        return replace(targets, ids=targets.ids.masked_fill(foreign, -1), probabilities=drawn)
    if targets.logprobs is None or targets.tail_logprob is None:
        return targets
    ids, logprobs, tail = targets.ids, targets.logprobs, targets.tail_logprob
    if ids is None:
        logprobs = logprobs[:, :student_vocab]
        complete = torch.full_like(tail, logprobs.shape[-1] == student_vocab, dtype=torch.bool)
    else:
        foreign = ids >= student_vocab
        tail = torch.logaddexp(tail, logprobs.masked_fill(~foreign, -torch.inf).logsumexp(-1))
        ids, logprobs = ids.masked_fill(foreign, -1), logprobs.masked_fill(foreign, -torch.inf)
        complete = (ids >= 0).sum(-1) == student_vocab
    logprobs = torch.where(
        complete[:, None], logprobs - logprobs.logsumexp(-1, keepdim=True), logprobs
    )
    return replace(
        targets, ids=ids, logprobs=logprobs, tail_logprob=tail.masked_fill(complete, -torch.inf)
    )


def joined(parts: Sequence[TargetBatch]) -> TargetBatch:
    """One sample's targets after the other's; narrower ones are filled up with no entries.

    Raises:
        UsageError: some are sampled and others are not.
    """
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    drawn = [part.probabilities for part in parts if part.probabilities is not None]
    if logprobs and drawn:
        raise UsageError(
            "train.snapshot: some of its rows have sampled targets and others do not, expected "
            "one kind. Name a snapshot of one kind, or leave it out."
        )
    values = logprobs or drawn
    ids = None
    if (
        any(part.ids is not None for part in parts)
        or len({value.shape[-1] for value in values}) > 1
    ):
        ids = _wide([_ids(part.ids, value) for part, value in zip(parts, values, strict=True)], -1)
    weights = [part.weights for part in parts if part.weights is not None]
    tails = [part.tail_logprob for part in parts if part.tail_logprob is not None]
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return TargetBatch(
        labels=torch.cat([part.labels for part in parts]),
        ids=ids,
        logprobs=_wide(logprobs, -torch.inf) if logprobs else None,
        tail_logprob=torch.cat(tails) if tails else None,
        probabilities=_wide(drawn, 0.0) if drawn else None,
        entropy=torch.cat(entropies) if entropies else None,
        weights=torch.cat(weights) if weights else None,
    )


def weighed(targets: TargetBatch, weights: np.ndarray | None) -> TargetBatch:
    """The same with a weight of the divergence at each position; None: 1."""
    return targets if weights is None else replace(targets, weights=torch.tensor(weights).float())


def _ids(ids: Tensor | None, values: Tensor) -> Tensor:
    return torch.arange(values.shape[-1]).expand(values.shape) if ids is None else ids


def _wide(parts: Sequence[Tensor], filling: float) -> Tensor:
    """[N, K] of all parts, K the widest's."""
    widest = max(part.shape[-1] for part in parts)
    return torch.cat(
        [functional.pad(part, (0, widest - part.shape[-1]), value=filling) for part in parts]
    )
