"""Distillation losses with the output head inside: hidden states in, per-token losses out, float32 throughout.

A sparse soft target is K entries and a bucket for all other ids. The student is seen through the same K + 1 outcomes,
so no mass of either side is thrown away:

    t_i  teacher's probability of entry i          t_B = 1 - sum t_i    stored as a log, `tail_logprob`
    p_i  student's probability of the same id      p_B = 1 - sum p_i    computed as a logsumexp over what is not kept

    forward_kl   KL(t || p) = sum_i t_i (log t_i - log p_i) + t_B (log t_B - log p_B)
    reverse_kl   KL(p || t) = sum_i p_i (log p_i - log t_i) + p_B (log p_B - log t_B)

Both are 0 when the K + 1 numbers agree, and a lower bound of the divergence over the whole vocabulary; with K = V the
bucket is empty and they are that divergence. Values are nats per token, never averaged: the caller divides by the
scored tokens of the whole step. 0 * log 0 is 0, in value and gradient.

Letters: N scored tokens, K entries, V the student's vocabulary, D hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..storage.errors import UsageError
from .head import Head

Divergence = Literal["forward_kl", "reverse_kl"]

CHUNK_BYTES = 64 * 2**20  # float32 logits held at once

# Least log-probability that a teacher counts with where the student has mass: reverse_kl is infinite at 0.
_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TargetBatch:
    """What N predicting positions are asked for. Without soft targets, `logprobs` and `tail_logprob` are None."""

    labels: Tensor
    """[N] int64 hard targets: the tokens that are there."""
    ids: Tensor | None = None
    """[N, K] int64, distinct in a row; -1 is no entry (its logprob is -inf). None with logprobs: full, in id order."""
    logprobs: Tensor | None = None
    """[N, K] float32 natural-log probabilities of the teacher."""
    tail_logprob: Tensor | None = None
    """[N] float32 log of the teacher's probability outside the entries; -inf if none."""

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
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossParts:
    """Per-token losses in nats, not weighted."""

    hard: Tensor
    """[N] cross-entropy with the token that is there."""
    soft: Tensor | None
    """[N] divergence from the teacher; None where it was not asked for."""

    def weighted(self, soft_weight: float, hard_weight: float) -> Tensor:
        """[N] soft_weight * soft + hard_weight * hard, weights used as given."""
        hard = hard_weight * self.hard
        return hard if self.soft is None else soft_weight * self.soft + hard


def linear_distillation(
    hidden: Tensor, head: Head, targets: TargetBatch, *, divergence: Divergence | None, chunk_tokens: int | None = None
) -> LossParts:
    """Divergence and cross-entropy of each token in one pass over the vocabulary.

    Logits exist for `chunk_tokens` tokens at a time and are made again in the backward pass; what is kept between the
    passes does not grow with V.

    Args:
        hidden: [N, D] states at the predicting positions, in the dtype the matrix product shall run in.
        head: Output head of the student.
        targets: N targets, already passed through `fit_vocabulary`.
        divergence: None skips the soft part.
        chunk_tokens: None: as many as fill `CHUNK_BYTES`.
    """
    if targets.logprobs is None:
        divergence = None
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * head.vocab_size))
    parts = []
    for start in range(0, max(len(hidden), 1), chunk):
        rows = hidden[start : start + chunk], head, targets.rows(start, start + chunk), divergence
        if torch.is_grad_enabled():
            # The weight is used inside: each chunk adds its gradient in the weight's own float32.
            parts.append(checkpoint(_chunk, *rows, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk(*rows))
    hard = torch.cat([h for h, _ in parts])
    return LossParts(hard=hard, soft=torch.cat([s for _, s in parts if s is not None]) if divergence else None)


def _chunk(
    hidden: Tensor, head: Head, targets: TargetBatch, divergence: Divergence | None
) -> tuple[Tensor, Tensor | None]:
    logits = head.logits(hidden)
    normaliser = logits.logsumexp(-1)
    hard = normaliser - logits.gather(-1, targets.labels[:, None]).squeeze(-1)
    if divergence is None:
        return hard, None
    assert targets.logprobs is not None
    assert targets.tail_logprob is not None
    student, student_tail = _student_outcomes(logits, normaliser, targets)
    measure = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[divergence]
    return hard, measure(
        torch.cat([targets.logprobs, targets.tail_logprob[:, None]], -1),
        torch.cat([student, student_tail[:, None]], -1),
    )


def _student_outcomes(logits: Tensor, normaliser: Tensor, targets: TargetBatch) -> tuple[Tensor, Tensor]:
    """The student's log-probabilities of the entries [N, K] and of all other ids together [N]; -inf where none."""
    assert targets.logprobs is not None
    if targets.ids is None:
        kept = targets.logprobs.shape[-1]
        student = logits[:, :kept] - normaliser[:, None]
        rest = logits[:, kept:]
        nothing_left = torch.full_like(normaliser, -torch.inf)
        return student, rest.logsumexp(-1) - normaliser if rest.shape[-1] else nothing_left
    absent = targets.ids < 0
    student = logits.gather(-1, targets.ids.clamp_min(0)) - normaliser[:, None]
    # One column more than the vocabulary takes the marks of absent entries.
    marks = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    kept_ids = marks.scatter_(-1, targets.ids.masked_fill(absent, logits.shape[1]), True)[:, :-1]
    # logsumexp over nothing has a gradient of NaN, so where the entries are the whole vocabulary nothing is masked.
    all_kept = kept_ids.all(-1)
    rest = logits.masked_fill(kept_ids & ~all_kept[:, None], -torch.inf).logsumexp(-1)
    return student.masked_fill(absent, -torch.inf), (rest - normaliser).masked_fill(all_kept, -torch.inf)


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(t || p) = sum_i t_i (log t_i - log p_i), nats; terms with t_i = 0 are 0.

    Args:
        teacher: [N, K + 1] log-probabilities, the bucket last.
        student: [N, K + 1] log-probabilities of the same outcomes.

    Returns:
        [N]. Gradient with respect to the student's logits, over the whole vocabulary: p_j - t_j for an entry,
        p_j (1 - t_B / p_B) for an id in the bucket.
    """
    none = teacher == -torch.inf
    terms = teacher.exp() * (teacher - student.masked_fill(none, 0.0))
    return terms.masked_fill(none, 0.0).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p || t) = sum_i p_i (log p_i - log t_i), nats; terms with p_i = 0 are 0.

    A teacher's probability below the least that float32 can hold counts as that (log: -87.3): the divergence stays
    finite, and large, where the student has mass and the teacher none.

    Args:
        teacher: [N, K + 1] log-probabilities, the bucket last.
        student: [N, K + 1] log-probabilities of the same outcomes.
    """
    none = student == -torch.inf
    student = student.masked_fill(none, 0.0)
    terms = student.exp() * (student - teacher.clamp_min(_LOG_TINY))
    return terms.masked_fill(none, 0.0).sum(-1)


def fit_vocabulary(targets: TargetBatch, student_vocab: int) -> TargetBatch:
    """Targets in terms of the student's vocabulary: a teacher whose embedding is padded further has ids beyond it.

    Entries with such ids become no entries and their mass joins the tail. Where the entries that remain are the
    student's whole vocabulary it has no id left for a tail: there the teacher is conditioned on the ids both have.

    Raises:
        UsageError: a hard target is not in the student's vocabulary.
    """
    if targets.labels.numel() and int(targets.labels.max()) >= student_vocab:
        raise UsageError(
            f"student: its vocabulary has {student_vocab} ids, but the text has token {int(targets.labels.max())}. "
            "Choose a student with the teacher's tokenizer and at least its vocabulary."
        )
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
    logprobs = torch.where(complete[:, None], logprobs - logprobs.logsumexp(-1, keepdim=True), logprobs)
    return replace(targets, ids=ids, logprobs=logprobs, tail_logprob=tail.masked_fill(complete, -torch.inf))
