"""Losses between samples as parts of what is matched: `match: rkd`, `similarity`, `infonce`.

Each compares one vector a sample on both sides, the student's pooled from the states of its own
block as the teacher's was, over the groups of a step.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ...recipe.features import FeatureLoss, Name, pooling_of
from ...targets.features.batch import FeatureTargets
from ...targets.features.pooling import pooled
from ...targets.features.shown import Need, Shown
from .between_samples import (
    Measure,
    Terms,
    cells,
    infonce,
    members,
    over_groups,
    pairs,
    rkd_angle,
    rkd_distance,
    similarity,
    terms_of,
    triples,
)
from .part import Part, StepSize


@dataclass(frozen=True, slots=True)
class Between:
    """A loss between the samples of a group."""

    ending: str
    """Of its part's name."""
    measure: Measure
    terms: Terms
    times: float = 1.0
    """Of the weight of its entry."""


def betweens(loss: FeatureLoss) -> list[Between]:
    """What an entry of `loss.features` compares between samples."""
    match loss.match:
        case "rkd":
            # Park et al. 2019, section 4: distances weigh 1, angles 2.
            return [
                Between("_distance", rkd_distance, pairs),
                Between("_angle", rkd_angle, triples, times=2.0),
            ]
        case "similarity":
            return [Between("", similarity, cells)]
        case "infonce":
            return [Between("", partial(infonce, temperature=loss.temperature), members)]
    raise AssertionError(f"{loss.match} is not between samples")


class GroupPart(Part):
    """A loss between samples, of one block's pooled states."""

    def __init__(
        self,
        name: str,
        *,
        asked: int,
        need: Need,
        teacher: Name,
        of: Between,
        group: int,
        to_teacher: nn.Parameter | None = None,
    ) -> None:
        super().__init__(name, asked=asked, need=need, times=of.times)
        self.map = to_teacher
        """W [D, d] of the student's pooled vector; None: as it is."""
        self.group = group
        self._teacher, self._of = teacher, of

    def forward(self, shown: Shown, targets: FeatureTargets) -> Tensor:
        """The sum over the groups of a pass, which begins where a group begins."""
        states = shown.hidden[self.need[1]].flatten(0, 1)[targets.at]
        mine = pooled(states, targets.lengths, pooling_of(self._teacher[0]))
        if self.map is not None:
            mine = mine @ self.map.T  # s = W x
        theirs = targets.vectors[self._teacher]
        return over_groups(self._of.measure, theirs, mine, group=self.group).total

    def count(self, size: StepSize) -> int:
        """Terms of the step's groups."""
        return terms_of(self._of.terms, size.samples, group=self.group)
