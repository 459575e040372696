"""What is minimised, as a recipe's `loss` section says it."""

from typing import Any

from stillroom.stages.losses.objective import Objective, objective_at
from stillroom.stages.recipe.sections import Loss


def objective_of(**loss: Any) -> Objective:
    """The soft part of a loss with these settings, at the start of the training."""
    return objective_at(Loss(**loss), 0.0)
