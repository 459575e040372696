"""The losses that `loss.py` times.

Each goes forward and backward on the same states, head and targets.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from objectives import objective_of

from stillroom.stages.losses.fused_linear import linear_distillation
from stillroom.stages.losses.objective import Aim, Objective
from stillroom.stages.models.head import Head
from stillroom.stages.targets.batch import TargetBatch

SOFT, HARD = 1.0, 0.1


@dataclass(frozen=True, kw_only=True)
class Size:
    """Letters as everywhere: N tokens, D hidden, V vocabulary, K entries."""

    n: int
    d: int
    v: int
    k: int
    device: str
    dtype: torch.dtype

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of the states and of the head, in their own dtype."""
        return (self.n * self.d + self.v * self.d) * self.dtype.itemsize


class Problem:
    """States and head that want gradients, and sparse targets with a tail."""

    def __init__(self, size: Size) -> None:
        self.size, self._generator = size, torch.Generator(size.device).manual_seed(0)
        self.hidden = self._normal(size.n, size.d).to(size.dtype).requires_grad_()
        self.weight = (
            (self._normal(size.v, size.d) / math.sqrt(size.d)).to(size.dtype).requires_grad_()
        )
        first = torch.randint(size.v, (size.n, 1), generator=self._generator, device=size.device)
        logprobs = (2 * self._normal(size.n, size.k + 1)).log_softmax(-1)
        self.targets = TargetBatch(
            labels=torch.randint(size.v, (size.n,), generator=self._generator, device=size.device),
            ids=(first + torch.arange(size.k, device=size.device) * (size.v // size.k)) % size.v,
            logprobs=logprobs[:, :-1].contiguous(),
            tail_logprob=logprobs[:, -1].contiguous(),
        )

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.size.device)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients as they are now; they are taken away."""
        found = self.hidden.grad, self.weight.grad
        self.hidden.grad = self.weight.grad = None
        assert found[0] is not None
        assert found[1] is not None
        return found[0], found[1]


def ours(problem: Problem, objective: Objective | None = objective_of()) -> Tensor:  # noqa: B008
    """Forward KL with the tail, and cross-entropy; mean over the tokens."""
    n = problem.size.n
    return linear_distillation(
        problem.hidden,
        Head(weight=problem.weight),
        problem.targets,
        aim=Aim(objective=objective, soft_weight=SOFT / n, hard_weight=HARD / n),
    ).total


def ours_hard(problem: Problem) -> Tensor:
    """The same function with soft targets switched off."""
    return ours(problem, None)


def ours_torch(problem: Problem) -> Tensor:
    """The portable version by name, where Triton would be taken."""
    n = problem.size.n
    aim = Aim(objective=objective_of(), soft_weight=SOFT / n, hard_weight=HARD / n)
    return linear_distillation(
        problem.hidden, Head(weight=problem.weight), problem.targets, aim=aim, kernel="torch"
    ).total


def plain_cross_entropy(problem: Problem) -> Tensor:
    """`F.cross_entropy(F.linear(x))`."""
    return functional.cross_entropy(
        functional.linear(problem.hidden, problem.weight), problem.targets.labels
    )


def plain(problem: Problem) -> Tensor:
    """Log-softmax of all tokens in float32, gathered.

    The tail by a logsumexp over what is not gathered.
    """
    return naive(problem.hidden, problem.weight, problem.targets, torch.float32)


def naive(hidden: Tensor, weight: Tensor, targets: TargetBatch, dtype: torch.dtype) -> Tensor:
    """The loss as it is usually written, what follows the product in `dtype`."""
    assert targets.ids is not None
    assert targets.logprobs is not None
    assert targets.tail_logprob is not None
    log_p = functional.linear(hidden, weight).to(dtype).log_softmax(-1)
    tail = log_p.scatter(-1, targets.ids, -math.inf).logsumexp(-1)
    p = torch.cat([log_p.gather(-1, targets.ids), tail[:, None]], -1)
    t = torch.cat([targets.logprobs, targets.tail_logprob[:, None]], -1).to(dtype)
    soft = (t.exp() * (t - p)).sum(-1)
    hard = -log_p.gather(-1, targets.labels[:, None])[:, 0]
    return (SOFT * soft + HARD * hard).mean()


def torch_linear_cross_entropy(problem: Problem) -> Tensor:
    """The chunked linear cross-entropy that torch has."""
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(
        problem.hidden, problem.weight, problem.targets.labels, options=options
    )


def three_products(problem: Problem) -> None:
    """Logits, and both gradients from them, in chunks and in place; nothing in between."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    chunks = hidden.split(4096 if hidden.is_cuda else 512)
    raw, d_hidden = hidden.new_empty(len(chunks[0]), len(weight)), torch.empty_like(hidden)
    total = torch.zeros_like(weight, dtype=torch.float32)
    for rows, d_rows in zip(chunks, d_hidden.split(len(chunks[0])), strict=True):
        logits = raw[: len(rows)]
        torch.mm(rows, weight.T, out=logits)
        torch.mm(logits, weight, out=d_rows)
        if hidden.dtype == torch.float32:
            total.addmm_(logits.T, rows)
        else:
            torch.addmm(total, logits.T, rows, out_dtype=torch.float32, out=total)


def peers(problem: Problem) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Name, loss and what it computes, of the peers that are installed and run here."""
    hidden, weight, labels, size = (
        problem.hidden,
        problem.weight,
        problem.targets.labels,
        problem.size,
    )
    on_gpu = size.device == "cuda"
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        yield (
            "torch linear_cross_entropy",
            lambda: torch_linear_cross_entropy(problem),
            "CE, chunked",
        )
    teacher = torch.randn_like(hidden)
    with suppress(ImportError):
        if on_gpu:
            from cut_cross_entropy import linear_cross_entropy

            yield "cut-cross-entropy", lambda: linear_cross_entropy(hidden, weight, labels), "CE"
    with suppress(ImportError):
        if on_gpu:
            from liger_kernel.transformers import (
                LigerFusedLinearCrossEntropyLoss,
                LigerFusedLinearJSD,
            )

            exact, usual = (
                LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32),
                LigerFusedLinearCrossEntropyLoss(),
            )
            live = LigerFusedLinearJSD()
            yield (
                "liger fused linear CE",
                lambda: exact(weight, hidden, labels),
                "CE, dW summed in float32",
            )
            yield (
                "liger fused linear CE, default",
                lambda: usual(weight, hidden, labels),
                "CE, dW summed in bfloat16",
            )
            head = weight.detach()
            yield (
                "liger fused linear JSD",
                lambda: live(hidden, weight, teacher, head, labels),
                "JSD, live teacher's head",
            )
        else:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            chunked, head = LigerFusedLinearJSDLoss(compiled=False), weight.detach()
            yield (
                "liger chunked JSD",
                lambda: chunked(hidden, weight, teacher, head, labels),
                "JSD + CE, live teacher's head",
            )
    with suppress(ImportError):
        from trl.experimental.gkd import GKDTrainer

        with torch.no_grad():
            known = functional.linear(teacher, weight)
        jsd = GKDTrainer.generalized_jsd_loss
        yield (
            "TRL GKD",
            lambda: jsd(functional.linear(hidden, weight), known, labels),
            "JSD, given the teacher's logits",
        )
