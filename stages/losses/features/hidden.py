"""Hidden states of the student against the teacher's: `match: hidden`."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...recipe.features import Name
from ...targets.features.batch import FeatureTargets
from ...targets.features.shown import Need, Shown
from .part import Part, StepSize


class HiddenPart(Part):
    """The states of one block at the positions that are compared, after the map."""

    def __init__(
        self,
        name: str,
        *,
        asked: int,
        need: Need,
        teacher: Name,
        distance: str,
        to_teacher: nn.Parameter | None,
    ) -> None:
        super().__init__(name, asked=asked, need=need)
        self.map = to_teacher
        """W [D, d]; None where the widths are equal."""
        self._teacher, self._distance = teacher, distance

    def forward(self, shown: Shown, targets: FeatureTargets) -> Tensor:
        """The sum over the positions of a pass that are compared."""
        theirs = targets.vectors[self._teacher][targets.compared]
        mine = shown.hidden[self.need[1]].flatten(0, 1)[targets.at[targets.compared]].float()
        if self.map is not None:
            mine = mine @ self.map.T  # s = W x
        return hidden_distance(theirs, mine, distance=self._distance).sum()

    def count(self, size: StepSize) -> int:
        """All that are compared."""
        return size.compared


def hidden_distance(teacher: Tensor, student: Tensor, *, distance: str) -> Tensor:
    """Per position: how far the student's state s is from the teacher's t, both of D numbers.

        mse         1/D sum_d (s_d - t_d)^2
        cosine      1 - s.t / (|s| |t|)
        smooth_l1   1/D sum_d h(s_d - t_d), h(x) = x^2 / 2 where |x| < 1, else |x| - 1/2

    Romero et al. 2015 (FitNets), arXiv 1412.6550, eq. 3, with s = W x a trained map of the
    student's own state; Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, eq. 7 (mse, W without a
    bias); Sanh et al. 2019 (DistilBERT), arXiv 1910.01108 (cosine). `smooth_l1` is of Huber 1964.

    It needs hidden states of one layer of the teacher. mse where the scale of the states is to be
    learnt too; a few channels that are far larger than the others (large models have such) decide
    it, and smooth_l1 bounds their pull. cosine where the direction alone counts.

    Args:
        teacher: [M, D]. A constant to the gradient.
        student: [M, D], after the map.
        distance: One of the three.

    Returns:
        [M] float32, 0 at equality. The caller divides by the positions of the whole step.
    """
    teacher, student = teacher.detach().float(), student.float()
    if distance == "cosine":
        return 1 - functional.cosine_similarity(student, teacher, dim=-1)
    if distance == "smooth_l1":
        return functional.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    return torch.square(student - teacher).mean(-1)
