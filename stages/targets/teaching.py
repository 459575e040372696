"""Several teachers of one text: how their words are weighed against one another, and their mixture.

With teachers j of a text, t_j their distributions at a position and w_j their weights there:

    sum        sum_j w_j D(t_j || p)      each divergence by itself: the loss adds them up
    mixture    D(m || p), m = sum_j w_j t_j / sum_j w_j

For forward KL the two have the same gradient at temperature 1, for sum_j w_j = 1: -sum_i (sum_j w_j
t_ji) log p_i is linear in t. At another temperature they have not, for the mixture of what is
softened is not the softened mixture; nor have other divergences. So the sum is an objective of its
own.

The weights of a position may follow what the teachers say there, their sum over the teachers of the
text staying W = sum_j w_j:

    entropy       W w_j exp(-H_j) / sum_k w_k exp(-H_k)          H_j the entropy of t_j
    likelihood    W w_j t_j(x) / sum_k w_k t_k(x)                x the token that is there

t_j is at temperature 1 in both, whatever the loss compares. Where no teacher gives the token any
probability, the weights are w_j.

The mixture of `full` targets is exact. Of sampled ones the draws are pooled: ids united, the
estimates of each id's probability added with the weights, so their mean is the mixture. Its entropy
is not known of draws: sum_j w_j H_j stands in, so the value of the loss is that of the sum, and the
gradient that of the mixture.

Letters: J teachers, N positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from ...storage.tables.soft_targets import SoftTargets
from ..recipe.fields import Schedule, value_at
from ..recipe.sections import Recipe

Found = Sequence[tuple[int, SoftTargets]]
"""Of one text: number of each teacher that it has, and its targets; all of the same positions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """What a recipe says of its teachers' words."""

    weights: tuple[float | Schedule, ...]
    """Of each teacher, in the recipe's order."""
    each_token: Literal["fixed", "entropy", "likelihood"] = "fixed"
    mixture: bool = False
    done: float = 1.0
    """Share of all tokens of the training: where schedules stand."""

    @classmethod
    def of(cls, recipe: Recipe) -> Self | None:
        """None: the recipe has one teacher, whose word counts as it is."""
        if not recipe.several:
            return None
        return cls(
            weights=tuple(one.weight for one in recipe.several),
            each_token=recipe.loss.teacher_weights,
            mixture=recipe.loss.teachers == "mixture",
        )

    def at(self, done: float) -> Self:
        """The same at a point of the training."""
        return replace(self, done=done)

    def shares(self, found: Found) -> np.ndarray:
        """[J, N] float64 weight of each teacher of a text at each position."""
        weights = np.array([value_at(self.weights[number], self.done) for number, _ in found])
        each = weights[:, None] * np.ones((1, len(found[0][1].entropy)))
        if self.each_token == "fixed":
            return each
        surely = np.stack([_says(targets, self.each_token) for _, targets in found])
        surely = np.where((surely == -np.inf).all(axis=0), 0.0, surely)
        raw = np.log(each) + surely
        raw = np.exp(raw - raw.max(axis=0))
        shares: np.ndarray = weights.sum() * raw / raw.sum(axis=0)
        return shares

    def of_text(self, found: Found) -> list[tuple[SoftTargets, np.ndarray | None]]:
        """What the loss compares with, and the weight of each at each position; None: 1."""
        shares = self.shares(found)
        if self.mixture:
            shares = shares / shares.sum(axis=0)
            return [(mixed([targets for _, targets in found], shares), None)]
        return [(targets, share) for (_, targets), share in zip(found, shares, strict=True)]


def _says(targets: SoftTargets, what: str) -> np.ndarray:
    """[N] log of what a teacher's weight is multiplied by."""
    said = -targets.entropy if what == "entropy" else targets.token_logprob
    return said.astype(np.float64)


def mixed(targets: Sequence[SoftTargets], shares: np.ndarray) -> SoftTargets:
    """The mixture of full or of sampled targets.

    Args:
        targets: J of the same N positions, full ones normalised.
        shares: [J, N] that sum to 1 over the teachers.
    """
    if len(targets) == 1:
        return targets[0]
    with np.errstate(divide="ignore"):
        logs = np.log(shares)
    token = _log_sum([one.token_logprob + log for one, log in zip(targets, logs, strict=True)])
    if targets[0].logprobs is None:
        return _pooled(targets, shares, token_logprob=token)
    stated = [one.logprobs for one in targets if one.logprobs is not None]
    logprobs = _log_sum([one + log[:, None] for one, log in zip(stated, logs, strict=True)])
    # p log p is 0 where p is.
    finite = np.where(logprobs == -np.inf, 0.0, logprobs)
    return SoftTargets(
        ids=None,
        logprobs=logprobs.astype(np.float32),
        tail_logprob=np.full(len(token), -np.inf, np.float32),
        token_logprob=token.astype(np.float32),
        entropy=-(np.exp(logprobs) * finite).sum(axis=1).astype(np.float32),
    )


def _log_sum(terms: Sequence[np.ndarray]) -> np.ndarray:
    """Log sum_j exp of arrays of one shape, in float64."""
    total: np.ndarray = np.logaddexp.reduce(np.stack(terms).astype(np.float64), axis=0)
    return total


def _pooled(
    targets: Sequence[SoftTargets], shares: np.ndarray, *, token_logprob: np.ndarray
) -> SoftTargets:
    """Draws of all teachers: each id once, with the weighted sum of what they say of it."""
    ids = np.concatenate([one.ids for one in targets if one.ids is not None], axis=1)
    said = np.concatenate(
        [one.probabilities * s[:, None] for one, s in zip(targets, shares, strict=True)], axis=1
    )
    # Equal ids of a position stand beside one another; padding, -1, comes first.
    order = np.argsort(ids, axis=1, kind="stable")
    ids, said = np.take_along_axis(ids, order, 1), np.take_along_axis(said, order, 1)
    first = np.diff(ids, axis=1, prepend=-1) != 0
    entries, places = first.sum(axis=1), np.cumsum(first, axis=1) - 1
    there, rows = ids >= 0, np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    shape = len(ids), int(entries.max(initial=0))
    pooled_ids, weights = np.full(shape, -1, np.int32), np.zeros(shape)
    at = rows[there], places[there]
    pooled_ids[at] = ids[there]
    np.add.at(weights, at, said[there])
    entropy = sum(one.entropy * s for one, s in zip(targets, shares, strict=True))
    return SoftTargets(
        ids=pooled_ids,
        logprobs=None,
        tail_logprob=None,
        token_logprob=token_logprob.astype(np.float32),
        entropy=np.asarray(entropy, np.float32),
        entries=entries.astype(np.int32),
        weights=weights.astype(np.float32),
        temperatures=targets[0].temperatures,
    )
