"""Maps softmax(scale x y^T) over the tokens of a sample, and KL between those of teacher and student.

Attention and relations are both such maps. Samples follow one another in a pass; each is cut out,
so none sees another and none is padded. Every token sees itself, so no row of a map is empty.

The maps of a pass are never held: rows of one sample are made for a block of its tokens at a time,
and made again in the backward pass. So memory is that of x and y, and of `LARGEST` numbers a side.

Letters: A maps, T tokens of a pass, t of a sample, d width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LARGEST = 2**24
"""Numbers that a block of rows holds of one side (64 MB in float32), or those of one row of all maps."""
_UNSEEN = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """What maps are made of: row i of map a is the softmax over the tokens j that i sees of scale x_ai . y_aj."""

    x: Tensor
    """[A, T, d], of attention the queries."""
    y: Tensor
    """[B, T, d], of attention the keys. B divides A: each serves A / B maps that follow one another."""
    scale: float
    causal: bool = False
    """A token sees nothing behind itself."""
    window: int | None = None
    """A token sees those less than this far away; None: however far."""


def maps(scores: Scores, lengths: Sequence[int]) -> Iterator[Tensor]:
    """The maps [A, t, t] float32 of one sample after another, whole: to look at, or to compare with a model's own."""
    for own in _samples(scores, lengths):
        yield _log_rows(own, 0, own.x.shape[1]).exp()


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
        _samples(teacher, lengths), _samples(student, lengths), strict=True
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


def _samples(scores: Scores, lengths: Sequence[int]) -> Iterator[Scores]:
    """The same of each sample alone."""
    sizes = list(lengths)
    for x, y in zip(scores.x.split(sizes, dim=1), scores.y.split(sizes, dim=1), strict=True):
        yield replace(scores, x=x, y=y)


def _kl_of_rows(teacher: Scores, student: Scores, start: int, stop: int, average: bool) -> Tensor:
    """[stop - start] of the rows of one sample."""
    log_t, log_s = _log_rows(teacher, start, stop), _log_rows(student, start, stop)
    if average:
        log_t, log_s = _log_mean(log_t), _log_mean(log_s)
    # What is not seen is a log of -3.4e38, not of -inf: t is 0 there, and 0 times it is 0.
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean(0)


def _log_mean(log_rows: Tensor) -> Tensor:
    """Logs of the mean over the maps, [1, rows, t]."""
    return log_rows.logsumexp(0, keepdim=True) - math.log(len(log_rows))


def _log_rows(own: Scores, start: int, stop: int) -> Tensor:
    """Log-probabilities [A, stop - start, t] of rows of one sample's maps, float32."""
    served, tokens, width = own.y.shape
    # Autocast would multiply in bfloat16.
    with torch.autocast(own.x.device.type, enabled=False):
        rows = own.scale * own.x[:, start:stop].float()
        # The maps that share a y stand below one another, so that y is never repeated.
        products = rows.reshape(served, -1, width) @ own.y.float().transpose(1, 2)
    products = products.reshape(len(own.x), stop - start, tokens)
    return products.masked_fill(_unseen(own, start, stop), _UNSEEN).log_softmax(-1)


def _unseen(own: Scores, start: int, stop: int) -> Tensor:
    """[stop - start, t] bool: what each of these tokens does not see of its sample."""
    here = torch.arange(own.y.shape[1], device=own.y.device)
    ahead = here - here[start:stop, None]
    unseen = ahead > 0 if own.causal else torch.zeros_like(ahead, dtype=torch.bool)
    return unseen if own.window is None else unseen | (ahead.abs() >= own.window)
