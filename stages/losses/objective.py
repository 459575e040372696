"""What is minimised at a point of the training: divergence, tail, temperature, weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ...storage.errors import UsageError
from ..recipe.divergences import DIVERGENCES, Divergence, DivergenceSettings
from ..recipe.fields import Tail, extremes, value_at
from ..recipe.sections import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What the soft part of the loss is, at one step."""

    divergence: Divergence = "forward_kl"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Those of this divergence, by name; one that is left out has the recipe's default."""
    tail: Tail = "bucket"
    """Of targets that have a tail; full and sampled ones do not."""
    temperature: float = 1.0
    """T; the targets are handed over at this temperature already."""

    def __post_init__(self) -> None:
        """Fill in the defaults.

        Raises:
            UsageError: a parameter is another divergence's, or one that a recipe may not have.
        """
        known = DIVERGENCES[self.divergence].parameters
        if foreign := sorted(set(self.parameters) - set(known)):
            raise UsageError(
                f"Objective: {self.divergence!r} has no parameter {foreign[0]!r}. Expected "
                f"{' and '.join(known) or 'none'}."
            )
        defaults = {name: DivergenceSettings.model_fields[name].default for name in known}
        parameters = defaults | dict(self.parameters)
        try:
            DivergenceSettings(divergence=self.divergence, **parameters)
        except ValidationError as error:
            (wrong, *_) = error.errors()
            raise UsageError(
                f"Objective: {wrong['loc'][0]}: {wrong['msg']} (got {wrong['input']})."
            ) from error
        object.__setattr__(self, "parameters", parameters)


@dataclass(frozen=True, kw_only=True, slots=True)
class Aim:
    """What is minimised at one point of the training."""

    soft_weight: float
    hard_weight: float
    objective: Objective | None
    """None: cross-entropy alone, all along."""
    features: tuple[float, ...] = ()
    """Weight of each entry of `loss.features`; of each part of it where passes are computed."""


def aim_at(loss: Loss, done: float) -> Aim:
    """What the recipe's loss is at the share `done` of all tokens."""
    _, highest = extremes(loss.soft_weight)
    return Aim(
        soft_weight=value_at(loss.soft_weight, done),
        hard_weight=value_at(loss.hard_weight, done),
        objective=objective_at(loss, done) if highest > 0 else None,
        features=tuple(value_at(asked.weight, done) for asked in loss.features),
    )


def objective_at(loss: Loss, done: float) -> Objective:
    """What the soft part of the recipe's loss is at the share `done` of all tokens."""
    return Objective(
        divergence=loss.divergence,
        parameters=loss.parameters(),
        tail=loss.tail,
        temperature=value_at(loss.temperature, done),
    )
