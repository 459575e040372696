"""All that a student matches of its teacher's features.

There is one part for each pair of layers that `loss.features` names.

A map W [D, d] takes the student's vectors of d numbers to the teacher's D, where a loss compares
numbers and the two differ: s = W x. It trains with the student, and is dropped when the student is
saved. Its first values come from `run.seed`, the pair's name and its entry's number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....storage.keys import content_key
from ....storage.tables.features import Layout
from ...recipe.features import FeatureLoss, FeatureRequest, Name, layers_for
from ...targets.features.batch import FeatureTargets
from ...targets.features.shown import Need, Shown
from .attention import AttentionPart
from .groups import GroupPart, betweens
from .hidden import HiddenPart
from .part import Part, StepSize, drawn_map
from .relations import RelationPart


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A layer of the teacher, and the student's that is to match it."""

    asked: int
    """Which entry of `loss.features`."""
    loss: FeatureLoss
    teacher: int
    student: int

    @property
    def name(self) -> str:
        """The pair's name, as in `hidden_3_to_1_mse`."""
        return f"{self.loss.match}_{self.teacher}_to_{self.student}"


def pairs_of(
    losses: Sequence[FeatureLoss], requests: Sequence[FeatureRequest], *, student_blocks: int
) -> list[Pair]:
    """The pairs of all entries of `loss.features`, in their order."""
    return [
        Pair(asked=number, loss=asked, teacher=teacher, student=student)
        for number, asked in enumerate(losses)
        for teacher, student in asked.pairs(layers_for(asked, requests), student_blocks)
    ]


def _between(
    pair: Pair, *, layouts: Mapping[Name, Layout], student_width: int, seed: int
) -> list[Part]:
    """Losses between samples; a map where numbers are compared and the widths differ."""
    teacher = (pair.loss.needs[0], pair.teacher)
    width = layouts[teacher].width
    mapped = pair.loss.match == "infonce" and width != student_width
    named = content_key("feature_map", seed=seed, pair=pair.name, number=pair.asked)
    return [
        GroupPart(
            f"{pair.name}{of.ending}",
            asked=pair.asked,
            need=("hidden", pair.student),
            teacher=teacher,
            of=of,
            group=pair.loss.group,
            to_teacher=drawn_map(width, student_width, named) if mapped else None,
        )
        for of in betweens(pair.loss)
    ]


def parts_of(
    pair: Pair, *, layouts: Mapping[Name, Layout], student_width: int, seed: int
) -> list[Part]:
    """What is compared of a pair.

    Args:
        pair: Of `pairs_of`.
        layouts: Of the teacher's features.
        student_width: Numbers of a state of the student.
        seed: `run.seed`.
    """
    if "group" in pair.loss.kind.settings:
        return _between(pair, layouts=layouts, student_width=student_width, seed=seed)
    if pair.loss.match == "attention":
        return [_attention(pair, layouts)]
    if pair.loss.match == "relations":
        return [_relations(pair, kind, layouts) for kind in pair.loss.needs]
    teacher = ("hidden", pair.teacher)
    name, width = f"{pair.name}_{pair.loss.distance}", layouts[teacher].width
    to_teacher = None
    if width != student_width:
        named = content_key("feature_map", seed=seed, pair=name, number=pair.asked)
        to_teacher = drawn_map(width, student_width, named)
    found = HiddenPart(
        name,
        asked=pair.asked,
        need=("hidden", pair.student),
        teacher=teacher,
        distance=pair.loss.distance,
        to_teacher=to_teacher,
    )
    return [found]


def _attention(pair: Pair, layouts: Mapping[Name, Layout]) -> Part:
    return AttentionPart(
        pair.name if pair.loss.heads == "each" else f"{pair.name}_{pair.loss.heads}",
        asked=pair.asked,
        need=("attention", pair.student),
        teacher=pair.teacher,
        layouts=layouts,
        heads=pair.loss.heads,
    )


def _relations(pair: Pair, kind: str, layouts: Mapping[Name, Layout]) -> Part:
    assert pair.loss.relation_heads is not None
    return RelationPart(
        f"{pair.name}_{kind}",
        asked=pair.asked,
        need=("attention", pair.student),
        teacher=(kind, pair.teacher),
        layout=layouts[kind, pair.teacher],
        relation_heads=pair.loss.relation_heads,
    )


class Matching(nn.Module):
    """The parts of a training, with their maps."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self._parts = nn.ModuleList(parts)

    @property
    def parts(self) -> list[Part]:
        """The parts, in the order in which they are summed and recorded."""
        return [part for part in self._parts if isinstance(part, Part)]

    @property
    def needs(self) -> list[Need]:
        """What the student is to show."""
        return [part.need for part in self.parts]

    @property
    def names(self) -> list[str]:
        """The names of the parts, where one that comes again gets its entry's number."""
        names = [part.name for part in self.parts]
        return [
            name if names.count(name) == 1 else f"{name}_{part.asked}"
            for name, part in zip(names, self.parts, strict=True)
        ]

    def forward(self, shown: Shown, targets: FeatureTargets) -> Tensor:
        """[P] float32: of each part the sum over a pass, not weighted."""
        with torch.autocast(targets.at.device.type, enabled=False):
            return torch.stack([part(shown, targets) for part in self.parts])

    def check(self, shown: Shown, longest: int) -> None:
        """See that the student can be compared in samples of up to `longest` tokens.

        Raises:
            UsageError: it cannot.
        """
        for part in self.parts:
            part.check(shown, longest)

    def counts(self, size: StepSize) -> list[int]:
        """[P] what the sums over a step of this size are divided by."""
        return [part.count(size) for part in self.parts]

    def weights(self, of_entries: Sequence[float]) -> tuple[float, ...]:
        """[P] of each part: that of its entry of `loss.features`, times its own."""
        return tuple(part.times * of_entries[part.asked] for part in self.parts)

    @property
    def group(self) -> int | None:
        """Samples of a group, of losses between samples; None: there are none."""
        return next((part.group for part in self.parts if isinstance(part, GroupPart)), None)
