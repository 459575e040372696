"""Divergences of a student from a teacher over the same outcomes, per token, in float32.

They are pure functions and know no vocabulary.

Each takes log-probabilities `teacher` and `student` [N, K + 1]: K entries and, last, the bucket for
all other ids (-inf where there is none), and returns [N]: nats, but for total variation and
alpha-beta. Each is 0 where the two are equal and never negative. An outcome that neither has adds
nothing, to the value or to the gradient. Where a divergence asks for the logarithm of a probability
of 0, the least normal float32 stands for it (log: -87.3), so that all are finite.

Only `student` has a gradient. t and p are the two distributions, m a mixture of them.
"""

import math

import torch
from torch import Tensor

_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)
_SERIES = 10
"""Last power of the exponential's series: at |x| = 1 the next term is 1 / 11!, below eps / 2."""


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(t || p) = sum_i t_i (log t_i - log p_i).

    Hinton et al. 2015, arXiv 1503.02531 (cross-entropy with soft targets, which has the same
    gradient). Gradient with respect to the student's logits over the whole vocabulary: p_j - t_j
    for an entry, p_j (1 - t_B / p_B) for an id in the bucket B.
    """
    return _kl(teacher, student)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p || t) = sum_i p_i (log p_i - log t_i).

    Gu et al. 2024 (MiniLLM), arXiv 2306.08543, on given text.
    """
    return _kl(student, teacher.clamp_min(_LOG_TINY))


def skew_forward_kl(teacher: Tensor, student: Tensor, *, skew: float) -> Tensor:
    """KL(t || m), m = skew t + (1 - skew) p.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898. It is at most -log(skew).
    """
    return _kl(teacher, _mixture(teacher, student, skew))


def skew_reverse_kl(teacher: Tensor, student: Tensor, *, skew: float) -> Tensor:
    """KL(p || m), m = (1 - skew) t + skew p.

    The source is that of `skew_forward_kl`. The gradient goes through p in the mixture too.
    """
    return _kl(
        student, _mixture(student, teacher.clamp_min(_LOG_TINY) if skew == 0 else teacher, skew)
    )


def jsd(teacher: Tensor, student: Tensor, *, jsd_weight: float) -> Tensor:
    """Generalised Jensen-Shannon divergence.

    w KL(t || m) + (1 - w) KL(p || m), m = w t + (1 - w) p, w = jsd_weight

    Agarwal et al. 2024 (GKD), arXiv 2306.13649; 0 < w < 1. At w = 1/2 it is symmetric and
    at most log 2.
    """
    middle = _mixture(teacher, student, jsd_weight)
    from_teacher, from_student = _kl(teacher, middle), _kl(student, middle)
    return jsd_weight * from_teacher + (1 - jsd_weight) * from_student


def total_variation(teacher: Tensor, student: Tensor) -> Tensor:
    """1/2 sum_i |t_i - p_i|, a share from 0 to 1.

    One minus it is how often speculative decoding accepts the student.

    Wen et al. 2023 (f-divergence distillation), arXiv 2307.15190.
    """
    return (teacher.exp() - student.exp()).abs().sum(-1) / 2


def alpha_beta(teacher: Tensor, student: Tensor, *, alpha_beta: tuple[float, float]) -> Tensor:
    """-1/(ab) sum_i [t_i^a p_i^b - a/(a+b) t_i^(a+b) - b/(a+b) p_i^(a+b)].

    In it (a, b) = alpha_beta.

    Wang et al. 2025 (ABKD), arXiv 2505.04560; the divergence is Cichocki et al. 2011's. With
    d = log t - log p and g(x) = (e^x - 1 - x) / x^2, which is 1/2 at x = 0, it is

        sum_i t_i^a p_i^b d_i^2 [b/(a+b) g(b d_i) + a/(a+b) g(-a d_i)]

    which has its limits at a = 0 and at b = 0 in it, and no difference of large numbers close by.
    forward_kl at (1, 0), reverse_kl at (0, 1). A lower bound of the value over all ids only where a
    + b = 1.
    """
    nothing = (teacher == -torch.inf) & (student == -torch.inf)
    t = teacher.masked_fill(nothing, 0.0).clamp_min(_LOG_TINY)
    p = _above_zero(student.masked_fill(nothing, 0.0))
    alpha, beta = alpha_beta
    total, gap = alpha + beta, t - p
    both = alpha * t + beta * p
    by_beta = beta / total * _second_order(both, beta * gap, total * t)
    by_alpha = alpha / total * _second_order(both, -alpha * gap, total * p)
    return (gap.square() * (by_beta + by_alpha)).masked_fill(nothing, 0.0).sum(-1)


def adaptive_kl(teacher: Tensor, student: Tensor, *, head_mass: float) -> Tensor:
    """Forward KL where the head is off, reverse KL where the tail is.

    g_h / (g_h + g_t) KL(t || p) + g_t / (g_h + g_t) KL(p || t),
    with g = sum_i |t_i - p_i| over head and tail

    The head is the teacher's best entries as long as their mass together is at most `head_mass`,
    the best one always; the tail is all else, the bucket included. As in the authors' code the two
    shares are constants: no gradient goes through them. Wu et al. 2024 (AKL), arXiv 2404.02657.
    """
    gap = (teacher.exp() - student.exp()).abs().detach()
    best, order = teacher[:, :-1].sort(-1, descending=True)
    ranked = best.exp().cumsum(-1) <= head_mass
    ranked[:, :1] = True
    # `ranked` is in the order of the teacher's probabilities, the gaps are in the order of the
    # entries.
    head = torch.zeros_like(gap, dtype=torch.bool).scatter_(-1, order, ranked)
    whole = gap.sum(-1)
    share = torch.where(whole > 0, gap.masked_fill(~head, 0.0).sum(-1) / whole, 0.5)
    return share * forward_kl(teacher, student) + (1 - share) * reverse_kl(teacher, student)


def _second_order(start: Tensor, x: Tensor, end: Tensor) -> Tensor:
    """e^start (e^x - 1 - x) / x^2, where end = start + x; close to x = 0 its series."""
    near = x.abs() <= 1
    # Each branch is given what it can take. Where it is not chosen, its gradient is 0 times a
    # number.
    small, large = torch.where(near, x, 0.0), torch.where(near, 2.0, x)
    series = torch.zeros_like(x)
    for power in range(_SERIES, 1, -1):
        series = series * small + 1 / math.factorial(power)
    far = (end.exp() - start.exp() * (1 + large)) / large.square()
    return torch.where(near, start.exp() * series, far)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """sum_i a_i (log a_i - log b_i) of log-probabilities; 0 log 0 is 0, in value and gradient."""
    nothing = a == -torch.inf
    a, b = a.masked_fill(nothing, 0.0), b.masked_fill(nothing, 0.0)
    return (a.exp() * (a - _above_zero(b))).masked_fill(nothing, 0.0).sum(-1)


def _above_zero(log_p: Tensor) -> Tensor:
    """Log-probabilities, with the least normal float32 in place of no probability at all.

    What is merely tiny stays, for its gradient.
    """
    return log_p.masked_fill(log_p == -torch.inf, _LOG_TINY)


def _mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b) of log-probabilities.

    It is -inf, without a gradient, where both are.
    """
    if share == 0:
        return b
    nothing = (a == -torch.inf) & (b == -torch.inf)
    a, b = a.masked_fill(nothing, 0.0), b.masked_fill(nothing, 0.0)
    return torch.logaddexp(a + math.log(share), b + math.log1p(-share)).masked_fill(
        nothing, -torch.inf
    )
