"""KL between maps softmax(scale x y^T) of teacher and student: of attention, and of relations.

The maps of a pass are never held: rows of one sample are made for a block of its tokens at a time,
and made again in the backward pass. So memory is that of x and y, and of `LARGEST` numbers a side.

Letters: A maps, T tokens of a pass, t of a sample.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...models.attention.maps import Scores, log_rows, samples

LARGEST = 2**24
"""Numbers that a block of rows of one side holds (64 MB in float32), or one row of all maps."""


def kl_of_maps(
    teacher: Scores, student: Scores, lengths: Sequence[int], *, average: bool = False
) -> Tensor:
    """Per token i: 1/A sum_a KL(t_ai || s_ai), nats, t and s the rows of teacher and student.

    Args:
        teacher: A constant to the gradient.
        student: Of the same tokens, with as many maps; it sees at least what the teacher sees.
        lengths: Tokens of each sample of the pass; their sum is T.
        average: KL of the mean over maps instead, KL(1/A sum_a t_ai || 1/A' sum_a s_ai).

    Returns:
        [T] float32, 0 where the rows are equal.
    """
    teacher = replace(teacher, x=teacher.x.detach(), y=teacher.y.detach())
    found = [student.x.new_zeros(0, dtype=torch.float32)]
    for of_teacher, of_student in zip(
        samples(teacher, lengths), samples(student, lengths), strict=True
    ):
        tokens = of_student.x.shape[1]
        most_maps = max(of_teacher.x.shape[0], of_student.x.shape[0])
        step = max(1, LARGEST // max(1, most_maps * tokens))
        for start in range(0, tokens, step):
            block = (of_teacher, of_student, start, min(start + step, tokens), average)
            # Nothing of a block is kept for the backward pass but what it is made of.
            kl = checkpoint(_kl_of_rows, *block, use_reentrant=False, preserve_rng_state=False)
            found.append(kl)
    return torch.cat(found)


def _kl_of_rows(teacher: Scores, student: Scores, start: int, stop: int, average: bool) -> Tensor:
    """[stop - start] of the rows of one sample."""
    log_t, log_s = log_rows(teacher, start, stop), log_rows(student, start, stop)
    if average:
        log_t, log_s = _log_mean(log_t), _log_mean(log_s)
    # What is not seen is a log of -3.4e38, not of -inf: t is 0 there, and 0 times it is 0.
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean(0)


def _log_mean(rows: Tensor) -> Tensor:
    """Logs of the mean over the maps, [1, rows, t]."""
    return rows.logsumexp(0, keepdim=True) - math.log(len(rows))
