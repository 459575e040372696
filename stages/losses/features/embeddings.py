"""The student's token embeddings against the teacher's."""

from collections.abc import Callable

import torch
from torch import Tensor


def embedding_mse(
    teacher: Tensor,
    student: Tensor,
    token_ids: Tensor,
    *,
    to_teacher: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Per token n: 1/D |W e_n - t_n|^2, e and t the rows of its id in the two matrices, D the teacher's width.

    Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, eq. 8, which compares the embeddings of the tokens
    of a batch. So an id counts as often as it occurs and one that never occurs is left alone; the
    gradient reaches the rows of the batch, where that of the whole matrix would move all V rows at
    every step, mostly those of rare tokens. Position embeddings are not part of it.

    Needs the teacher's matrix, which the store keeps once: 0 bytes a token. To be used with a student
    of fresh weights and the teacher's tokenizer.

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
