"""What is minimised at a point of the training: divergence, tail, temperature, weights."""

from dataclasses import dataclass

from ..recipe.fields import Divergence, Tail, extremes, value_at
from ..recipe.sections import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What the soft part of the loss is, at one step."""

    divergence: Divergence = "forward_kl"
    tail: Tail = "bucket"
    """Of targets that have a tail; full and sampled ones do not."""
    temperature: float = 1.0
    """T; the targets are handed over at this temperature already."""
    skew: float = 0.1
    """skew_forward_kl, skew_reverse_kl: share that the first distribution has in the mixture."""
    jsd_weight: float = 0.5
    """jsd: the teacher's share in the mixture."""
    alpha_beta: tuple[float, float] = (0.2, 0.7)
    """alpha_beta: the two exponents."""
    head_mass: float = 0.5
    """adaptive_kl: the teacher's mass that is its head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Aim:
    """What is minimised at one point of the training."""

    soft_weight: float
    hard_weight: float
    objective: Objective | None
    """None: cross-entropy alone, all along."""


def aim_at(loss: Loss, done: float) -> Aim:
    """What the recipe's loss is at the share `done` of all tokens."""
    objective = Objective(
        divergence=loss.divergence,
        tail=loss.tail,
        temperature=value_at(loss.temperature, done),
        skew=loss.skew,
        jsd_weight=loss.jsd_weight,
        alpha_beta=loss.alpha_beta,
        head_mass=loss.head_mass,
    )
    return Aim(
        soft_weight=value_at(loss.soft_weight, done),
        hard_weight=value_at(loss.hard_weight, done),
        objective=objective if extremes(loss.soft_weight)[1] > 0 else None,
    )
