"""What the losses are: divergence from the teacher and cross-entropy of each token.

All is float32 throughout.

A sparse soft target is K entries and a bucket for all other ids. The student is seen through the
same K + 1 outcomes, so no mass of either side is thrown away:

    t_i  teacher's probability of entry i        t_B = 1 - sum t_i    its log is `tail_logprob`
    p_i  student's probability of the same id    p_B = 1 - sum p_i    a logsumexp over other ids

`divergences.py` compares the two; each divergence is 0 when the K + 1 numbers agree, and at K = V
the bucket is empty. Other tail policies, for comparison, change what is compared:

    drop          t_i / sum t, no bucket for the teacher; the student over its whole vocabulary
    renormalize   t_i / sum t and p_i / sum p: only the entries are seen
    to_label      t_B joins the token that is there, which becomes an entry if it is none; the
                  student as in drop

A sampled target has no tail: its K probabilities are an estimate whose mean is the teacher, and
forward KL is -sum t_i log p_i - (entropy of the teacher), p over the whole vocabulary: right in the
mean, in value and gradient, and below 0 for some tokens.

At a temperature T the student's logits are divided by T, targets are of the teacher's logits
divided by T, and the divergence is multiplied by T^2, in value and gradient (Hinton et al. 2015,
arXiv 1503.02531, section 2). Cross-entropy with the token that is there is at temperature 1. Values
are never averaged: the caller divides by the scored tokens of the whole step.

All that is needed of the student's logits is `Seen`: those of the entries and of the label, and two
sums. `losses_of` is the definition, in these terms. `logits_distillation` sees logits that are
there anyway, and autograd finds the way back; `fused_linear.py` never holds the logits of all
tokens, and takes the way back itself.

Letters: N scored tokens, K entries, V the student's vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...storage.errors import UsageError
from ..recipe.divergences import DIVERGENCES
from ..targets.batch import TargetBatch
from . import divergences
from .objective import Aim, Objective
from .vocabulary import Seen


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Distilled:
    """The loss of one forward pass, and what it is made of."""

    total: Tensor
    """Sum over the tokens of soft_weight * soft + hard_weight * hard, and of what of the features
    is matched, weighted. It is the one that has a gradient."""
    hard: Tensor
    """[N] cross-entropy of each token, nats; a value without a gradient. Of texts those with a
    label."""
    soft: Tensor | None
    """[N] divergence of each token; a value without a gradient. None where it was not asked for."""
    features: Tensor | None = None
    """[P] of each part of what of the features is matched, the sum over the pass; a value without a
    gradient. None where there is none."""

    def plus(self, more: "Distilled", at: Tensor) -> "Distilled":
        """This loss with the divergences from further teachers, which are of the tokens `at`.

        Their cross-entropy is the same.
        """
        soft = self.soft
        if soft is not None and more.soft is not None:
            soft = soft.index_add(0, at, more.soft)
        return replace(self, total=self.total + more.total, soft=soft)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossParts:
    """Per-token losses in nats, not weighted."""

    hard: Tensor
    """[N] cross-entropy with the token that is there."""
    soft: Tensor | None
    """[N] divergence from the teacher; None where it was not asked for."""

    def weighted(self, soft_weight: float, hard_weight: float) -> Tensor:
        """[N] soft_weight * soft + hard_weight * hard, with the weights used as given.

        A part whose weight is 0 is left out.
        """
        # It may be infinite, as at a label of probability 0, and 0 * inf is no number. Autograd
        # knows the zeros.
        hard = (
            hard_weight * self.hard
            if hard_weight
            else torch.where(self.hard.isnan(), self.hard, 0.0)
        )
        return hard if self.soft is None or not soft_weight else soft_weight * self.soft + hard

    def summed(self, aim: Aim) -> Distilled:
        """Their sum over the tokens, weighted."""
        soft = None if self.soft is None else self.soft.detach()
        total = self.weighted(aim.soft_weight, aim.hard_weight).sum()
        return Distilled(total=total, hard=self.hard.detach(), soft=soft)


def logits_distillation(
    logits: Tensor, targets: TargetBatch, *, objective: Objective | None
) -> LossParts:
    """Divergence and cross-entropy of each token from logits [N, V] float32.

    Autograd goes through both.

    Raises:
        UsageError: the targets are sampled, which serve forward KL only.
    """
    if objective is None or not targets.soft:
        normaliser = logits.logsumexp(-1)
        label = logits.gather(-1, targets.labels[:, None]).squeeze(-1)
        return LossParts(hard=normaliser - label, soft=None)
    targets = compared(targets, objective)
    return losses_of(_seen(logits, targets, objective.temperature), targets, objective=objective)


def compared(targets: TargetBatch, objective: Objective) -> TargetBatch:
    """The targets with the entries that the student is seen through.

    The policy to_label adds one where the label is none.
    """
    return (
        _tail_to_label(targets)
        if objective.tail == "to_label" and targets.logprobs is not None
        else targets
    )


def losses_of(seen: Seen, targets: TargetBatch, *, objective: Objective | None) -> LossParts:
    """The definition: divergence and cross-entropy of each token.

    They follow from what is seen of the student's logits.

    Args:
        seen: Of N tokens, `rest` at the objective's temperature.
        targets: As `compared` returned them.
        objective: None skips the soft part, and so do targets without one.

    Raises:
        UsageError: the targets are sampled, which serve forward KL only.
    """
    hard = seen.normaliser - seen.label
    if objective is None or not targets.soft:
        return LossParts(hard=hard, soft=None)
    scale, weights = objective.temperature, targets.weights
    outcomes = torch.cat(
        [seen.entries if scale == 1.0 else seen.entries / scale, seen.rest[:, None]], -1
    )
    if weights is not None:
        # 0 times an infinite divergence is no number: of weight 0 the student is not looked at.
        outcomes = outcomes.masked_fill((weights == 0)[:, None], 0.0)
    if targets.probabilities is not None:
        soft = _sampled_forward_kl(outcomes.log_softmax(-1), targets, objective)
    else:
        soft = _divergence(_teacher(targets, objective), _student(outcomes, objective), objective)
    soft = soft if scale == 1.0 else scale**2 * soft
    if weights is not None:
        soft = torch.where(weights == 0, 0.0, weights * soft)
    return LossParts(hard=hard, soft=soft)


def _divergence(teacher: Tensor, student: Tensor, objective: Objective) -> Tensor:
    """[N] of the log-probabilities of the same outcomes."""
    divergence = getattr(divergences, objective.divergence)
    of_positions: Tensor = divergence(teacher, student, **objective.parameters)
    return of_positions


def _sampled_forward_kl(student: Tensor, targets: TargetBatch, objective: Objective) -> Tensor:
    """-sum_i t_i log p_i - entropy of the teacher [N].

    The mean over the draws is forward KL over the vocabulary.
    """
    if not DIVERGENCES[objective.divergence].draws_suffice:
        raise UsageError(
            f"loss.divergence: {objective.divergence} needs the teacher's probability of each "
            "outcome, sampled targets say it in the mean only. Use forward_kl, or score the rows "
            "with targets topk, topp or full."
        )
    assert targets.ids is not None
    assert targets.probabilities is not None
    assert targets.entropy is not None
    drawn = student[:, :-1].masked_fill(targets.ids < 0, 0.0)
    return -(targets.probabilities * drawn).sum(-1) - targets.entropy


def _teacher(targets: TargetBatch, objective: Objective) -> Tensor:
    """Log-probabilities [N, K + 1] of the outcomes that are compared, the bucket last."""
    assert targets.logprobs is not None
    assert targets.tail_logprob is not None
    entries, tail = targets.logprobs, targets.tail_logprob
    if objective.tail in ("drop", "renormalize"):
        entries, tail = _conditioned(entries), torch.full_like(tail, -torch.inf)
    return torch.cat([entries, tail[:, None]], -1)


def _student(outcomes: Tensor, objective: Objective) -> Tensor:
    """Log-probabilities [N, K + 1] of the same outcomes, from their logits.

    No tail of the teacher hides the bucket.
    """
    if objective.tail != "renormalize":
        return outcomes.log_softmax(-1)
    unseen = torch.full_like(outcomes[:, -1:], -torch.inf)
    return torch.cat([_conditioned(outcomes[:, :-1]), unseen], -1)


def _conditioned(values: Tensor) -> Tensor:
    """Log-softmax over the entries [N, K].

    A row that has none, -inf throughout, stays so and has no gradient.
    """
    empty = (values == -torch.inf).all(-1, keepdim=True)
    return values.masked_fill(empty, 0.0).log_softmax(-1).masked_fill(empty, -torch.inf)


def _tail_to_label(targets: TargetBatch) -> TargetBatch:
    """The targets with the tail's mass on the token that is there.

    It is added to that token's entry, or is an entry of its own in one column more.
    """
    assert targets.logprobs is not None
    assert targets.tail_logprob is not None
    if targets.ids is None:
        return targets
    labels, tail = targets.labels[:, None], targets.tail_logprob[:, None]
    there = targets.ids == labels
    joined = torch.where(there, torch.logaddexp(targets.logprobs, tail), targets.logprobs)
    absent = ~there.any(-1, keepdim=True)
    own = torch.where(absent, tail, -torch.inf)
    return replace(
        targets,
        ids=torch.cat([targets.ids, torch.where(own > -torch.inf, labels, -1)], -1),
        logprobs=torch.cat([joined, own], -1),
        tail_logprob=torch.full_like(targets.tail_logprob, -torch.inf),
    )


def _seen(logits: Tensor, targets: TargetBatch, temperature: float) -> Seen:
    """What is seen of logits [N, V], by operations that autograd knows."""
    label = logits.gather(-1, targets.labels[:, None]).squeeze(-1)
    if targets.ids is None:
        assert targets.logprobs is not None
        entries, others = logits.tensor_split([targets.logprobs.shape[-1]], -1)
        rest = (
            (others / temperature).logsumexp(-1)
            if others.shape[-1]
            else torch.full_like(label, -torch.inf)
        )
    else:
        entries = logits.gather(-1, targets.ids.clamp_min(0)).masked_fill(
            targets.ids < 0, -torch.inf
        )
        # One column more than the vocabulary takes the marks of absent entries.
        marks = torch.zeros(
            logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device
        )
        kept = marks.scatter_(-1, targets.ids.masked_fill(targets.ids < 0, logits.shape[1]), True)[
            :, :-1
        ]
        # logsumexp over nothing has a gradient of NaN, so where the entries are the whole
        # vocabulary nothing is masked.
        all_kept = kept.all(-1)
        others = (logits / temperature).masked_fill(kept & ~all_kept[:, None], -torch.inf)
        rest = others.logsumexp(-1).masked_fill(all_kept, -torch.inf)
    return Seen(entries=entries, label=label, normaliser=logits.logsumexp(-1), rest=rest)
