"""The student's token embeddings against the teacher's: `match: embeddings`."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ....storage.errors import UsageError
from ....storage.keys import content_key
from ...targets.features.batch import FeatureTargets
from ...targets.features.shown import Shown
from .part import Part, StepSize, drawn_map


class EmbeddingsPart(Part):
    """The embeddings of all tokens of a step, after the map where the widths differ."""

    def __init__(self, teacher: np.ndarray, width: int, *, asked: int, seed: int) -> None:
        """Keep the teacher's matrix [V, D], and make the map from `width`, D' of the student.

        `asked` says which entry this is, and `seed` is `run.seed`.
        """
        super().__init__("embeddings_mse", asked=asked, need=("embeddings", 0))
        # Of the store, not of the student: in no checkpoint.
        self.register_buffer("teacher", torch.from_numpy(np.array(teacher)), persistent=False)
        self.map = None
        if width != teacher.shape[1]:
            named = content_key("feature_map", seed=seed, pair=self.name, number=asked)
            self.map = drawn_map(teacher.shape[1], width, named)

    def forward(self, shown: Shown, targets: FeatureTargets) -> Tensor:
        """The sum over the tokens of a pass."""
        if shown.embeddings is None:
            raise ValueError("the student's embeddings were not shown")
        to_teacher = None if self.map is None else self._mapped
        teacher = self.get_buffer("teacher")
        return embedding_mse(
            teacher, shown.embeddings, targets.token_ids, to_teacher=to_teacher
        ).sum()

    def count(self, size: StepSize) -> int:
        """All tokens."""
        return size.tokens

    def _mapped(self, rows: Tensor) -> Tensor:
        assert self.map is not None
        return rows @ self.map.T  # s = W x


def check_embeddings(student: Tensor) -> None:
    """See that a student's embeddings train.

    Raises:
        UsageError: they are frozen.
    """
    if not student.requires_grad:
        raise UsageError(
            "loss.features: match 'embeddings' moves the student's input embeddings, and they are "
            "frozen (student.lora). Leave it out, or train the whole student."
        )


def embedding_mse(
    teacher: Tensor,
    student: Tensor,
    token_ids: Tensor,
    *,
    to_teacher: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Per token n: 1/D |W e_n - t_n|^2, D the teacher's width.

    In it e_n and t_n are the rows of the token's id in the student's and the teacher's matrix.

    Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, eq. 8, which compares the embeddings of the
    tokens of a batch. So an id counts as often as it occurs and one that never occurs is left
    alone; the gradient reaches the rows of the batch, where that of the whole matrix would move all
    V rows at every step, mostly those of rare tokens. Position embeddings are not part of it.

    It needs the teacher's matrix, which the store keeps once: 0 bytes a token. It is to be used
    with a student of fresh weights and the teacher's tokenizer.

    Args:
        teacher: [V, D] any floating dtype; a constant to the gradient.
        student: [V', D'], the weight of the student's input embeddings.
        token_ids: [N] of the tokens of a pass; each below V and V'.
        to_teacher: The trained map W from D' to D; None where the widths are equal.

    Returns:
        [N] float32, 0 at equality. The caller divides by the tokens of the whole step.
    """
    ids, places = token_ids.unique(return_inverse=True)
    rows = student[ids].float()
    with torch.autocast(rows.device.type, enabled=False):  # which would map in bfloat16
        mapped = rows if to_teacher is None else to_teacher(rows)
    return (mapped - teacher[ids].detach().float()).square().mean(-1)[places]
