"""Measuring screened texts: a class counts only where the model is sure of it."""

from torch import Tensor

from . import classification


class Measuring(classification.Measuring):
    """The measures of texts, and one more.

    It is how often the best class is the gold one and has more than half of the mass.
    """

    def named(self, measures: dict[str, Tensor]) -> dict[str, Tensor]:
        """With `surely_right`."""
        sure = measures["confidence"] > 0.5
        return super().named(measures) | {"surely_right": measures["correct"] & sure}
