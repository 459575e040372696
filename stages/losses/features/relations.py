"""Relations between the tokens of a sample.

They are how alike its queries are, or its keys, or its values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ....storage.errors import UsageError
from ....storage.tables.features import Layout, what_and_how
from ...models.attention.maps import Scores
from ...recipe.features import Name
from ...targets.features.batch import FeatureTargets
from ...targets.features.shown import Need, Shown
from .kl_of_maps import kl_of_maps
from .part import Part, StepSize, in_heads


class RelationPart(Part):
    """Relations of one kind of vectors of one block, at all tokens."""

    def __init__(
        self,
        name: str,
        *,
        asked: int,
        need: Need,
        teacher: Name,
        layout: Layout,
        relation_heads: int,
    ) -> None:
        super().__init__(name, asked=asked, need=need)
        self._teacher, self._heads, self._parts = teacher, layout.heads or 1, relation_heads
        self._width, self._projected_from = layout.width, layout.projected_from

    def forward(self, shown: Shown, targets: FeatureTargets) -> Tensor:
        """The sum over all tokens of a pass."""
        theirs = in_heads(targets.vectors[self._teacher], self._heads)
        mine = shown.attention(self.need[1]).vectors(self._what, targets.at)
        each = relation_kl(
            theirs,
            mine,
            targets.lengths,
            heads=self._parts,
            projected_from=self._projected_from,
        )
        return each.sum()

    @property
    def _what(self) -> str:
        """What is compared of the student: it is whole, whatever the teacher's were made into."""
        return what_and_how(self._teacher[0])[0]

    def check(self, shown: Shown, longest: int) -> None:
        """Widths that can be cut."""
        nowhere = torch.zeros(0, dtype=torch.long)
        mine = shown.attention(self.need[1]).vectors(self._what, nowhere)
        _parts(mine, self._parts, "student")
        _parts(in_heads(torch.zeros(0, self._width), self._heads), self._parts, "teacher")

    def count(self, size: StepSize) -> int:
        """All tokens."""
        return size.tokens


def relation_kl(
    teacher: Tensor,
    student: Tensor,
    lengths: Sequence[int],
    *,
    heads: int,
    projected_from: int | None = None,
) -> Tensor:
    """1/A sum_a KL(softmax_j(t_ai . t_aj / sqrt(d_t)) || softmax_j(s_ai . s_aj / sqrt(d_s))).

    It is in nats, per token i.

    Wang et al. 2021 (MiniLMv2), arXiv 2012.15828, eq. 5 and 6, for one kind of vectors. Eq. 4 is
    the weighted sum over queries, keys and values: three calls.

    Vectors of all heads are joined in their order and cut into A = `heads` parts anew, so teacher
    and student may have other widths and other numbers of heads; more parts tell more. Grouped keys
    and values are not repeated, as that would only repeat relations. Every token is related to
    every token of its sample, in causal models too: that is no attention, nothing is predicted from
    it.

    It needs one kind of vectors of one layer, h d numbers a token. It is to be used where heads or
    widths differ. Scores grow with the vectors: where the teacher's rows are all uniform or all
    one-hot there is nothing to learn.

    Projected vectors of the teacher stand for whole ones: x_i P P^T x_j is x_i . x_j in the mean
    over P. So their products are divided by sqrt(D), of the numbers before, and they are one part,
    as parts of them are no parts of the vectors.

    Args:
        teacher: [h, T, d], of any floating dtype; a constant to the gradient.
        student: [h', T, d'], of the same tokens.
        lengths: Tokens of each sample; they follow one another, and none is related to another's.
        heads: A, parts; it divides h d and h' d'.
        projected_from: D, numbers that the teacher's vectors had before projection; None: they are
            whole.

    Returns:
        [T] float32, 0 at equality. The caller divides by the tokens of the whole step.

    Raises:
        UsageError: a width cannot be cut into so many parts.
    """
    theirs, mine = _parts(teacher, heads, "teacher"), _parts(student, heads, "student")
    of_teacher = Scores(x=theirs, y=theirs, scale=(projected_from or theirs.shape[-1]) ** -0.5)
    of_student = Scores(x=mine, y=mine, scale=mine.shape[-1] ** -0.5)
    return kl_of_maps(of_teacher, of_student, lengths)


def _parts(vectors: Tensor, parts: int, whose: str) -> Tensor:
    """[A, T, h d / A]."""
    heads, tokens, width = vectors.shape
    if parts < 1 or heads * width % parts:
        raise UsageError(
            f"relations: {heads} x {width} numbers of the {whose}'s heads cannot be cut into "
            f"{parts} parts. Choose heads that divide {heads * width}."
        )
    return vectors.transpose(0, 1).reshape(tokens, parts, heads * width // parts).transpose(0, 1)
