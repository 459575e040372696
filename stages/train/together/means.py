"""What a step or a validation reports: mean losses per scored token.

They are means of sums over passes and ranks.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from ...losses.definition import Distilled
from ...losses.objective import Aim


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Means per scored token, nats."""

    loss: float
    """soft_weight * divergence + hard_weight * cross-entropy, over all: without a label the second
    is 0. And what of the features is matched, weighted."""
    soft: float | None
    """Divergence from the teacher; None where it was not computed."""
    hard: float | None
    """Cross-entropy, over the texts that have a label; None where none has."""
    features: dict[str, float] = field(default_factory=dict)
    """Of each part that is matched, not weighted: its mean over the terms that it has."""

    def parts(self) -> dict[str, Any]:
        """By name; the features where there are some."""
        found: dict[str, Any] = {"loss": self.loss, "soft": self.soft, "hard": self.hard}
        return found | ({"features": self.features} if self.features else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What an optimizer step did."""

    losses: Losses
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    scheduled: dict[str, float]
    """The loss's settings that follow a schedule, as they were at this step."""
    positions: int
    """Computed by all ranks, padding included."""


def means_of(sums: torch.Tensor, scored: int, aim: Aim) -> Losses:
    """Of the first three of `sums_of`, over so many scored tokens; weighted as `aim` says."""
    soft, hard, labelled = sums.tolist()
    scored = max(scored, 1)
    parts = ((aim.soft_weight, soft / scored), (aim.hard_weight, hard / scored))
    # One that weighs nothing may be infinite: left out, as 0 * inf is no number.
    total = sum((weight * mean for weight, mean in parts if weight), 0.0)
    return Losses(
        loss=total,
        soft=soft / scored if aim.objective else None,
        hard=hard / labelled if labelled else None,
    )


def sums_of(found: Distilled) -> torch.Tensor:
    """[3 + P] float64 sums of soft and hard losses, of how many have a hard one, and of P parts.

    The parts are those that are matched.
    """
    hard = found.hard.double().sum()
    soft = torch.zeros_like(hard) if found.soft is None else found.soft.double().sum()
    sums = torch.stack([soft, hard, torch.full_like(hard, len(found.hard))])
    return sums if found.features is None else torch.cat([sums, found.features.double()])
