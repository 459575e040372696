"""Float64 definitions of the losses, one token at a time, straight from the mathematics.

Slow and obvious on purpose.

They share nothing with `stages/losses/definition.py`: probabilities instead of log-probabilities,
sums over ids instead of masks, and only terms with mass are ever written down.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Outcomes = Sequence[Tensor]

LEAST = 2.0**-126  # stands for a probability of 0 where its logarithm is asked for


def softmax(logits: Tensor) -> Tensor:
    """[V] probabilities of one token, float64."""
    weights = torch.exp(logits.double() - logits.double().max().detach())
    return weights / weights.sum()


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    """-log p(label)."""
    return -torch.log(softmax(logits)[label])


def outcomes(p: Tensor, ids: Sequence[int]) -> list[Tensor]:
    """P on each kept id, then the sum of p over every other id."""
    others = [p[j] for j in range(len(p)) if j not in set(ids)]
    return [p[i] for i in ids] + [
        torch.stack(others).sum() if others else torch.zeros((), dtype=p.dtype)
    ]


def compared(
    t: Tensor, p: Tensor, ids: Sequence[int], tail: str, label: int
) -> tuple[list[Tensor], list[Tensor]]:
    """What a tail policy compares of a teacher and a student, over the whole vocabulary.

    The bucket is the last.
    """
    nothing = torch.zeros((), dtype=torch.float64)
    if tail == "to_label" and label not in ids:
        ids = [*ids, label]
        t = torch.where(
            torch.arange(len(t)) == label, nothing, t
        )  # its own mass comes with the rest of the tail
    teacher, student = outcomes(t, ids), outcomes(p, ids)
    if tail == "to_label":
        rest = 1.0 - torch.stack(teacher[:-1]).sum()
        teacher = [x + rest if i == label else x for i, x in zip(ids, teacher, strict=False)] + [
            nothing
        ]
    if tail in ("drop", "renormalize"):
        teacher = [x / torch.stack(teacher[:-1]).sum() for x in teacher[:-1]] + [nothing]
    if tail == "renormalize":
        student = [x / torch.stack(student[:-1]).sum() for x in student[:-1]] + [nothing]
    return teacher, student


def kl(a: Outcomes, b: Outcomes) -> Tensor:
    """KL(a || b) over the same outcomes; an outcome without mass in `a` adds nothing."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        if x > 0:
            total = total + x * torch.log(
                x / (y if y > 0 else torch.tensor(LEAST, dtype=torch.float64))
            )
    return total


def reverse_kl(t: Outcomes, p: Outcomes) -> Tensor:
    """KL(p || t); a teacher without mass has the least normal float32."""
    return kl(p, [x.clamp_min(LEAST) for x in t])


def mixture(a: Outcomes, b: Outcomes, share: float) -> list[Tensor]:
    """Share * a + (1 - share) * b."""
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def skew_forward_kl(t: Outcomes, p: Outcomes, skew: float = 0.1) -> Tensor:
    """KL(t || skew t + (1 - skew) p)."""
    return kl(t, mixture(t, p, skew))


def skew_reverse_kl(t: Outcomes, p: Outcomes, skew: float = 0.1) -> Tensor:
    """KL(p || (1 - skew) t + skew p)."""
    return kl(p, mixture(p, t, skew))


def jsd(t: Outcomes, p: Outcomes, weight: float = 0.5) -> Tensor:
    """Weight * KL(t || m) + (1 - weight) * KL(p || m), m = weight * t + (1 - weight) * p."""
    middle = mixture(t, p, weight)
    return weight * kl(t, middle) + (1 - weight) * kl(p, middle)


def total_variation(t: Outcomes, p: Outcomes) -> Tensor:
    """Half the L1 distance."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(t, p, strict=True):
        total = total + torch.abs(x - y) / 2
    return total


def alpha_beta(t: Outcomes, p: Outcomes, a: float = 0.2, b: float = 0.7) -> Tensor:
    """Cichocki's alpha-beta divergence; where a, b or their sum is 0, its limit."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(t, p, strict=True):
        if x == 0 and y == 0:
            continue
        x, y = (z if z > 0 else torch.tensor(LEAST, dtype=torch.float64) for z in (x, y))
        if a == 0 and b == 0:
            total = total + 0.5 * (torch.log(x) - torch.log(y)) ** 2
        elif a == 0:
            total = total + (y**b * torch.log(y**b / x**b) - y**b + x**b) / b**2
        elif b == 0:
            total = total + (x**a * torch.log(x**a / y**a) - x**a + y**a) / a**2
        elif a + b == 0:
            total = total + (torch.log(y**a / x**a) + x**a / y**a - 1) / a**2
        else:
            total = total - (
                x**a * y**b - a / (a + b) * x ** (a + b) - b / (a + b) * y ** (a + b)
            ) / (a * b)
    return total


def adaptive_kl(t: Outcomes, p: Outcomes, head_mass: float = 0.5) -> Tensor:
    """Forward KL by the head's share of the gap, reverse KL by the tail's.

    The shares are numbers, not functions.
    """
    order = sorted(range(len(t) - 1), key=lambda i: -float(t[i]))
    head = set(order[:1])
    for count in range(2, len(order) + 1):
        if math.fsum(float(t[i]) for i in order[:count]) <= head_mass:
            head |= set(order[:count])
    gaps = [abs(float(x.detach()) - float(y.detach())) for x, y in zip(t, p, strict=True)]
    whole = math.fsum(gaps)
    share = math.fsum(gaps[i] for i in head) / whole if whole > 0 else 0.5
    return share * kl(t, p) + (1 - share) * reverse_kl(t, p)


DIVERGENCES: dict[str, Callable[[Outcomes, Outcomes], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": reverse_kl,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
}


def over_bucket(
    divergence: str, logits: Tensor, ids: Sequence[int], t: Sequence[float], tail: float
) -> Tensor:
    """A divergence over the kept ids and one bucket."""
    teacher = [torch.tensor(x, dtype=torch.float64) for x in [*t, tail]]
    return DIVERGENCES[divergence](teacher, outcomes(softmax(logits), ids))


def token_losses(
    logits: Tensor,
    t: Tensor,
    ids: Sequence[int],
    label: int,
    *,
    divergence: str,
    tail: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Divergence and cross-entropy of one token, of a student's logits [V] and a teacher [V].

    The teacher is at the temperature.

    `ids` are the entries; all ids where the target is full.
    """
    p = softmax(logits / temperature)
    soft = temperature**2 * DIVERGENCES[divergence](*compared(t, p, ids, tail, label))
    return soft, cross_entropy(logits, label)
