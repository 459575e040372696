"""Float64 definitions of the losses, one token at a time, straight from the mathematics. Slow and obvious on purpose.

They share nothing with `stages/losses.py`: probabilities instead of log-probabilities, sums over ids instead of masks,
and only terms with mass are ever written down.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
    return [p[i] for i in ids] + [torch.stack(others).sum() if others else torch.zeros((), dtype=p.dtype)]


def kl(a: Sequence[Tensor | float], b: Sequence[Tensor | float]) -> Tensor:
    """KL(a || b) over the same outcomes; an outcome without mass in `a` adds nothing."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        if x > 0:
            total = total + x * torch.log(torch.as_tensor(x) / torch.as_tensor(y))
    return total


def bucket_forward_kl(logits: Tensor, ids: Sequence[int], t: Sequence[float], tail: float) -> Tensor:
    """KL(teacher || student) over the kept ids and one bucket."""
    teacher = [torch.tensor(x, dtype=torch.float64) for x in [*t, tail]]
    return kl(teacher, outcomes(softmax(logits), ids))


def bucket_reverse_kl(logits: Tensor, ids: Sequence[int], t: Sequence[float], tail: float) -> Tensor:
    """KL(student || teacher) over the kept ids and one bucket; a teacher without mass has the least normal float32."""
    least = 2.0**-126
    teacher = [torch.tensor(max(x, least), dtype=torch.float64) for x in [*t, tail]]
    return kl(outcomes(softmax(logits), ids), teacher)


DIVERGENCES: dict[str, Callable[[Tensor, Sequence[int], Sequence[float], float], Tensor]] = {
    "forward_kl": bucket_forward_kl,
    "reverse_kl": bucket_reverse_kl,
}
