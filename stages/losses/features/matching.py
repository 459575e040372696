"""All that a student matches of its teacher's features: pairs of layers, their maps, and the sums of their losses.

A map W [D, d] takes the student's states of d numbers to the teacher's D, where the two differ:
s = W x. It trains with the student, and is dropped when the student is saved. Its first values come
from `run.seed` and the pair's name alone, by a generator of its own: nothing else is drawn otherwise
for it.

Letters: M positions that are compared, D the teacher's width, d the student's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....storage.keys import content_key, row_seed
from ...recipe.features import FeatureLoss, FeatureRequest, layers_of
from ...targets.features.batch import FeatureTargets
from ...targets.features.capture import Name
from .hidden import hidden_distance


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A layer of the teacher, and the student's that is to match it."""

    asked: int
    """Which entry of `loss.features`."""
    match: str
    teacher: Name
    student: int
    distance: str

    @property
    def name(self) -> str:
        """In records: `hidden_3_to_1_mse`."""
        return f"{self.match}_{self.teacher[1]}_to_{self.student}_{self.distance}"


def pairs_of(
    losses: Sequence[FeatureLoss], requests: Sequence[FeatureRequest], *, student_blocks: int
) -> list[Pair]:
    """The pairs of all entries of `loss.features`, in their order."""
    return [
        Pair(
            asked=number,
            match=asked.match,
            teacher=(asked.kind, teacher),
            student=student,
            distance=asked.distance,
        )
        for number, asked in enumerate(losses)
        for teacher, student in asked.pairs(layers_of(requests, asked.kind), student_blocks)
    ]


class Matching(nn.Module):
    """The pairs of a training, and their maps."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        teacher_widths: Mapping[Name, int],
        student_width: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.pairs = list(pairs)
        self.maps = nn.ParameterDict()
        for number, pair in enumerate(self.pairs):
            width = teacher_widths[pair.teacher]
            if width != student_width:
                named = content_key("feature_map", seed=seed, pair=pair.name, number=pair.asked)
                self.maps[str(number)] = nn.Parameter(_drawn(width, student_width, named))

    @property
    def student_layers(self) -> list[int]:
        """Blocks of the student whose states are read, ascending."""
        return sorted({pair.student for pair in self.pairs})

    @property
    def names(self) -> list[str]:
        """Of the pairs; one that comes again gets its entry's number."""
        names = [pair.name for pair in self.pairs]
        return [
            name if names.count(name) == 1 else f"{name}_{pair.asked}"
            for name, pair in zip(names, self.pairs, strict=True)
        ]

    def forward(self, states: Mapping[int, Tensor], targets: FeatureTargets) -> Tensor:
        """[P] float32: of each pair the sum over the positions of a pass, not weighted.

        Args:
            states: Layer of the student -> [B, T, d].
            targets: Which positions are compared, and the teacher's states there.
        """
        sums = []
        with torch.autocast(targets.at.device.type, enabled=False):
            for number, pair in enumerate(self.pairs):
                mine = states[pair.student].flatten(0, 1)[targets.at].float()
                if str(number) in self.maps:
                    mine = mine @ self.maps[str(number)].T  # s = W x
                theirs = targets.states[pair.teacher]
                sums.append(hidden_distance(theirs, mine, distance=pair.distance).sum())
        return torch.stack(sums)

    def weights(self, of_entries: Sequence[float]) -> list[float]:
        """Of each pair: that of its entry of `loss.features`."""
        return [of_entries[pair.asked] for pair in self.pairs]


def _drawn(rows: int, columns: int, name: bytes) -> Tensor:
    """W uniform within 1 / sqrt(d), as a linear layer of torch begins."""
    generator = torch.Generator().manual_seed(row_seed(name))
    bound = columns**-0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
