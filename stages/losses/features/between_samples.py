"""Losses between the samples of a group.

They compare distances, angles and similarities, and tell which vector is whose.

Each takes one vector a sample, teacher [G, D_t] and student [G, D_s], of the G samples of a group,
and returns a sum with the number of its terms. The group defines the loss, not the pass: a group is
never split, so how many of them share a pass changes nothing. The number of terms follows from G
alone; the caller divides by that of the whole step, if there is any.

The last group may be smaller. One sample has no other: all are 0. Distances, similarities and
InfoNCE need two samples, angles three; with fewer there are no terms.

Distances, angles, similarities and cosines are the same at any scale, so each side is divided by
its largest number first (a constant to the gradient): what float16 or bfloat16 can hold neither
overflows nor vanishes. After that, what is shorter than `LEAST` has no direction: its cosines are
0, and no gradient goes through it. All is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ....storage.errors import UsageError

LEAST = 1e-6
"""Lengths below this part of a group's largest number are rounding."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Summed:
    """A sum over terms, and how many there are."""

    total: Tensor
    """[] float32, with a gradient."""
    count: int


Measure = Callable[[Tensor, Tensor], Summed]
Terms = Callable[[int], int]
"""How many terms a group of so many samples has."""


def pairs(size: int) -> int:
    """G (G - 1) ordered pairs of different samples."""
    return size * (size - 1)


def triples(size: int) -> int:
    """G (G - 1) (G - 2) ordered triples of different samples."""
    return pairs(size) * max(size - 2, 0)


def cells(size: int) -> int:
    """G^2 of a matrix; none where there is one sample."""
    return size**2 if size > 1 else 0


def members(size: int) -> int:
    """G; none where there is one sample."""
    return size if size > 1 else 0


def terms_of(terms: Terms, samples: int, *, group: int) -> int:
    """How many terms so many samples have, in groups of `group` and one of what is left."""
    return samples // group * terms(group) + terms(samples % group)


def over_groups(measure: Measure, teacher: Tensor, student: Tensor, *, group: int) -> Summed:
    """A measure over the groups of a pass.

    Each group is `group` consecutive samples, and the last one is what is left.

    Args:
        measure: One of this file; with a parameter, as `functools.partial(infonce,
            temperature=0.1)`.
        teacher: [S, D_t]
        student: [S, D_s]
        group: G; a pass begins where a group begins.
    """
    pairs = zip(teacher.split(group), student.split(group), strict=True)
    found = [measure(of_teacher, of_student) for of_teacher, of_student in pairs]
    total = torch.stack([one.total for one in found]).sum()
    return Summed(total=total, count=sum(one.count for one in found))


def rkd_distance(teacher: Tensor, student: Tensor) -> Summed:
    """Sum over pairs i != j of huber(|s_i - s_j| / mu_s, |t_i - t_j| / mu_t).

    Here mu is the mean distance of all pairs.

    Park et al. 2019 (RKD), arXiv 1904.05068, eq. 3 to 5; huber(x, y) is (x - y)^2 / 2 up to 1 and
    |x - y| - 1/2 beyond. It is the same for a student that is rotated, moved or scaled. Terms: the
    G (G - 1) ordered pairs. The authors' code divides by G^2, and its mu leaves equal pairs out.

    It needs a pooled vector a text. It is to be used where the student is to keep what is near to
    what, at any width; with `rkd_angle`, at half of its weight.
    """
    with torch.autocast(student.device.type, enabled=False):
        right, found = _distances(_scaled(teacher.detach())), _distances(_scaled(student))
        total = functional.huber_loss(found, right, reduction="sum")
    return Summed(total=total, count=pairs(len(student)))


def rkd_angle(teacher: Tensor, student: Tensor) -> Summed:
    """Sum over triples of huber(cos at s_j between s_i and s_k, the same of t).

    A triple i, j, k has three different samples.

    Park et al. 2019 (RKD), arXiv 1904.05068, eq. 6. It is the same for a student that is rotated,
    moved or scaled. Terms: the G (G - 1) (G - 2) ordered triples; the authors' code divides by G^3.
    A triple in which the teacher has no angle, as two of its vectors are equal, adds 0.

    It needs a pooled vector a text, and takes a few times 4 G^2 D bytes. It is to be used as
    `rkd_distance` is: angles see more than distances, and are dearer.
    """
    with torch.autocast(student.device.type, enabled=False):
        (right, known), (found, _) = _angles(_scaled(teacher.detach())), _angles(_scaled(student))
        off = functional.huber_loss(found, right, reduction="none")
    return Summed(total=torch.where(known, off, 0.0).sum(), count=triples(len(student)))


def similarity(teacher: Tensor, student: Tensor) -> Summed:
    """Sum over i, j of (g^s_ij - g^t_ij)^2, g_i the row i of X X^T divided by its length.

    Tung & Mori 2019 (similarity-preserving), arXiv 1907.09682, eq. 1 to 3, which divide by G^2: the
    terms. It is the same for a student that is rotated or scaled. A group of one has no terms.

    It needs a pooled vector a text. It is to be used where the student's vectors are to be alike
    where the teacher's are; unlike distances it sees how long vectors are, and where the origin is.
    """
    with torch.autocast(student.device.type, enabled=False):
        right, found = (_scaled(side) for side in (teacher.detach(), student))
        off = _directions(found @ found.T) - _directions(right @ right.T)
    size = len(student)
    # In a group of one both sides are 1, or 0 where the vector is.
    return Summed(total=off.square().sum() * (size > 1), count=cells(size))


def infonce(teacher: Tensor, student: Tensor, *, temperature: float) -> Summed:
    """Sum over i of -log(exp(cos(s_i, t_i) / T) / sum_j exp(cos(s_i, t_j) / T)), T the temperature.

    van den Oord et al. 2018, arXiv 1807.03748, eq. 4; of teacher and student as in Tian et al. 2020
    (CRD), arXiv 1910.10699, with the other samples of the group as negatives in place of a memory.
    log G minus its mean is a lower bound of the mutual information. It is not 0 at equality, but
    between log(1 + (G - 1) exp(-2 / T)) and log G + 2 / T. Terms: the G samples, none in a group of
    one.

    It needs a pooled vector a text; the student's is mapped to the teacher's width. It is to be
    used where texts are to be told apart, with large groups; texts that are equal are each other's
    negatives all the same.

    Raises:
        UsageError: the widths differ, or the temperature is not above 0.
    """
    if teacher.shape != student.shape:
        raise UsageError(
            f"infonce: the teacher's vectors are {list(teacher.shape)}, the student's "
            f"{list(student.shape)}. Expected equal shapes: map the student's first."
        )
    if not temperature > 0:
        raise UsageError(f"infonce: temperature is {temperature}. Expected a number above 0.")
    with torch.autocast(student.device.type, enabled=False):
        right, found = (_directions(_scaled(side)) for side in (teacher.detach(), student))
        picked = (found @ right.T / temperature).log_softmax(-1).diagonal()
    return Summed(total=-picked.sum(), count=members(len(student)))


def _scaled(vectors: Tensor) -> Tensor:
    """Divided by the largest number of the group, float32; zeros stay zeros."""
    vectors = vectors.float()
    largest = vectors.detach().abs().max()
    return vectors / torch.where(largest > 0, largest, 1.0)


def _distances(vectors: Tensor) -> Tensor:
    """[G, G] between vectors, divided by their mean over pairs; 0 where all vectors are equal."""
    # These are lengths of differences, as |x|^2 + |y|^2 - 2 xy loses what is near. The gradient of
    # a length of 0 is 0.
    apart = torch.linalg.vector_norm(vectors[:, None] - vectors, dim=-1)
    mean = apart.sum() / max(len(vectors) * (len(vectors) - 1), 1)
    there = mean > LEAST
    return torch.where(there, apart / torch.where(there, mean, 1.0), 0.0)


def _angles(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines [j, i, k] at j between i and k, and whether there are three different vectors."""
    arms = _directions(vectors - vectors[:, None])
    known = arms.detach().abs().amax(-1) > 0
    others = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    return arms @ arms.transpose(1, 2), known[:, :, None] & known[:, None] & others


def _directions(vectors: Tensor) -> Tensor:
    """Vectors [..., D] of length 1.

    Those that are shorter than `LEAST` are 0, without a gradient.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    there = lengths > LEAST
    return torch.where(there, vectors / torch.where(there, lengths, 1.0), 0.0)
