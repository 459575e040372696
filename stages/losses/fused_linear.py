"""Hidden states and output head in, loss out, at the cost of cross-entropy.

It takes three matrix products, and no logits are kept.

    raw = h W^T (+ b + u B^T)    dh = G W    dW = G^T h    G = d loss / d raw, in raw's own memory

Logits exist for one chunk of tokens at a time. Of each chunk the loss sees a few numbers
(`vocabulary.py`); its derivatives with respect to those come from autograd over [n, K] tensors, and
one pass over the vocabulary turns the logits into G. So all gradients are made in the forward pass
and the backward pass only scales them; nothing of size [N, V] is stored. This holds for every
divergence, of targets that have entries. Full targets have none to single out: there autograd goes
through the logits themselves, a few rows of the chunk at a time.

dW is summed over the chunks in float32, whatever the products run in. Where the head does not train
it is not made.

Letters: N scored tokens, n of a chunk, K entries, V vocabulary, D hidden, r rank of a LoRA on the
head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.device import uses_triton
from ..models.head import Head, whole
from ..recipe.fields import Kernel
from ..targets.batch import TargetBatch
from . import vocabulary as passes
from .definition import Distilled, LossParts, compared, logits_distillation, losses_of
from .objective import Aim
from .vocabulary import Asked, Seen, Slopes

CHUNK_BYTES = 64 * 2**20  # logits of a chunk on a CPU
DEVICE_CHUNK_BYTES = 1280 * 2**20  # on a GPU: 4,096 tokens of the largest vocabularies in bfloat16
TILE_TOKENS = 256  # chunks on a GPU are multiples of it
SLICE_BYTES = 16 * 2**20  # bfloat16 products that wait to be added in float32


def linear_distillation(
    hidden: Tensor,
    head: Head,
    targets: TargetBatch,
    *,
    aim: Aim,
    kernel: Kernel | None = None,
    chunk_tokens: int | None = None,
) -> Distilled:
    """Sum of the weighted divergence and cross-entropy of all tokens.

    Both are as `losses.losses_of` defines them.

    The gradient is made here, of the total, and scaled by one number in the backward pass: what is
    done to single tokens afterwards has no gradient. Weights that are divided by the scored tokens
    of the step already leave that number at 1, which spares a pass over dW on a CPU. The gradient
    can be taken once.

    Args:
        hidden: [N, D] states at the predicting positions, in the dtype the matrix products shall
            run in: float32 or bfloat16; others become float32.
        head: Output head of the student.
        targets: N targets, already passed through `fit_vocabulary`.
        aim: Divergence and weights; without an objective, cross-entropy alone.
        kernel: Who makes the passes over the vocabulary; None: Triton on an NVIDIA GPU that has it,
            else torch.
        chunk_tokens: None: as many as fill `CHUNK_BYTES`.

    Raises:
        UsageError: the targets are sampled, which serve forward KL only; or the kernel cannot run
            here.
    """
    if aim.objective is None or not targets.soft:
        targets = TargetBatch(labels=targets.labels)
        aim = replace(aim, objective=None)
    run = _Run(
        targets=targets,
        aim=aim,
        head=head,
        kernel=_kernel(kernel, hidden.device),
        chunk_tokens=chunk_tokens,
        backward=torch.is_grad_enabled(),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.dtype not in (torch.float32, torch.bfloat16):
            hidden = hidden.float()
        sides = [hidden, whole(head.weight)]
        if head.low_rank is not None:
            sides += [head.low_rank.narrow(hidden), whole(head.low_rank.up)]
        total, hard, divergence = _Loss.apply(  # type: ignore[no-untyped-call]  # torch's
            run, None if head.bias is None else whole(head.bias), *sides
        )
    return Distilled(total=total, hard=hard, soft=divergence)


def _kernel(asked: Kernel | None, device: torch.device) -> ModuleType:
    """The module whose `look` and `spread` are used."""
    if not uses_triton(asked, device, setting="train.kernel"):
        return passes
    from . import vocabulary_triton as passes_triton

    return passes_triton


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Run:
    """One call of the loss, but for the tensors that may have gradients."""

    targets: TargetBatch
    aim: Aim
    head: Head
    kernel: ModuleType
    """Whose `look` and `spread` are used."""
    chunk_tokens: int | None
    backward: bool
    """Whether gradients are recorded where this was called; `_Loss` does not see that."""

    @property
    def dense(self) -> bool:
        """Whether the soft targets have no entries to single out."""
        return self.aim.objective is not None and self.targets.ids is None

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Rows that are done together, nearly equally many each time."""
        size = self.chunk_tokens or self._fitting(hidden)
        for start in range(0, len(hidden), size):
            yield slice(start, min(start + size, len(hidden)))

    def _fitting(self, hidden: Tensor) -> int:
        on_cpu = hidden.device.type == "cpu"
        row = hidden.element_size() * self.head.vocab_size
        most = max(1, (CHUNK_BYTES if on_cpu else DEVICE_CHUNK_BYTES) // row)
        tile = 1 if on_cpu or most < TILE_TOKENS else TILE_TOKENS
        chunks = max(1, _ceiling(len(hidden), most // tile * tile))
        return max(1, _ceiling(len(hidden), chunks * tile)) * tile

    def losses(self, raw: Tensor, rows: slice, *, backward: bool) -> LossParts:
        """Losses of some tokens; with `backward`, `raw` [n, V] becomes d total / d raw."""
        targets, objective = self.targets.rows(rows.start, rows.stop), self.aim.objective
        if objective is not None:
            targets = compared(targets, objective)
        if self.dense:
            return self._dense_losses(raw, targets, backward=backward)
        asked = Asked(
            ids=targets.labels.new_empty(len(raw), 0) if targets.ids is None else targets.ids,
            labels=targets.labels,
            temperature=1.0 if objective is None else objective.temperature,
            scale=self.head.scale,
            softcap=self.head.softcap,
        )
        seen = self.kernel.look(raw, asked)
        if not backward:
            return losses_of(seen, targets, objective=objective)
        names = [field.name for field in fields(Seen)]
        leaves = {name: getattr(seen, name).detach().requires_grad_() for name in names}
        with torch.enable_grad():
            parts = losses_of(Seen(**leaves), targets, objective=objective)
        slopes = dict(zip(names, self._derivatives(parts, list(leaves.values())), strict=True))
        slopes["entries"] = slopes["entries"].masked_fill(asked.ids < 0, 0.0)
        self.kernel.spread(raw, asked, seen, Slopes(**slopes))
        return parts

    def _dense_losses(self, raw: Tensor, targets: TargetBatch, *, backward: bool) -> LossParts:
        """Losses as of `losses`, where each id is an entry.

        Autograd goes through the logits, a few rows at a time.
        """
        found, size = [], passes.block_rows(raw)
        for start in range(0, len(raw), size):
            rows = raw[start : start + size]
            leaf = rows.detach().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                here = targets.rows(start, start + size)
                parts = logits_distillation(
                    self.head.finished(leaf), here, objective=self.aim.objective
                )
            if backward:
                (gradient,) = self._derivatives(parts, [leaf])
                rows.copy_(gradient)
            found.append(parts)
        soft = [parts.soft for parts in found if parts.soft is not None]
        return LossParts(
            hard=torch.cat([parts.hard.detach() for parts in found]), soft=torch.cat(soft).detach()
        )

    def _derivatives(self, parts: LossParts, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            total = parts.weighted(self.aim.soft_weight, self.aim.hard_weight).sum()
        return torch.autograd.grad(total, leaves, materialize_grads=True)


class _Loss(torch.autograd.Function):
    """The loss of the bias [V] and of pairs, left [N, d] and right [V, d].

    A pair is states and weight, or U and B of a LoRA.
    """

    @staticmethod
    def forward(
        ctx: Any, run: _Run, bias: Tensor | None, *sides: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.dtypes = [None if side is None else side.dtype for side in (bias, *sides)]
        needed = ctx.needs_input_grad[1:] if run.backward else [False] * len(ctx.dtypes)
        lefts, rights = sides[::2], [right.to(sides[0].dtype) for right in sides[1::2]]
        bias = None if bias is None else bias.to(sides[0].dtype)
        hidden, weight = sides[0], rights[0]
        # What belongs to a token is written once, what all tokens share is summed over the chunks.
        d_bias = (
            bias.new_zeros(bias.shape, dtype=torch.float32)
            if bias is not None and needed[0]
            else None
        )
        d_lefts = [
            torch.empty_like(t) if need else None
            for t, need in zip(lefts, needed[1::2], strict=True)
        ]
        d_rights = [
            torch.zeros_like(t, dtype=torch.float32) if need else None
            for t, need in zip(rights, needed[2::2], strict=True)
        ]
        hard = hidden.new_empty(len(hidden), dtype=torch.float32)
        soft = torch.empty_like(hard) if run.aim.objective else None
        room = None
        for rows in run.chunks(hidden):
            room = _room(hidden[rows], weight) if room is None else room
            raw = room[: rows.stop - rows.start]
            _multiply([left[rows] for left in lefts], rights, bias=bias, out=raw)
            parts = run.losses(raw, rows, backward=any(needed))
            hard[rows] = parts.hard.detach()
            if soft is not None and parts.soft is not None:
                soft[rows] = parts.soft.detach()
            for left, right, d_left, d_right in zip(lefts, rights, d_lefts, d_rights, strict=True):
                if d_left is not None:
                    torch.mm(raw, right, out=d_left[rows])
                if d_right is not None:
                    _add_product(d_right, raw, left[rows])
            if d_bias is not None:
                d_bias += raw.sum(0, dtype=torch.float32)
        ctx.gradients = [d_bias, *(d for pair in zip(d_lefts, d_rights, strict=True) for d in pair)]
        ctx.mark_non_differentiable(*(hard,) if soft is None else (hard, soft))
        parts = LossParts(hard=hard, soft=soft)
        return parts.weighted(run.aim.soft_weight, run.aim.hard_weight).sum(), hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of this loss was taken before and is gone; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # To look at the number would be to wait for a GPU, so there it is multiplied in any case.
        one = upstream.device.type == "cpu" and float(upstream) == 1.0
        return None, *(
            None if gradient is None else _scaled(gradient, None if one else upstream, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )


def _room(hidden: Tensor, weight: Tensor) -> Tensor:
    """Memory for the logits of a chunk.

    On a GPU rows begin at multiples of 16 bytes, which kernels move at once.
    """
    vocab_size, width = weight.shape[0], weight.shape[0]
    if hidden.device.type != "cpu":
        width = _ceiling(width, 8) * 8
    return hidden.new_empty(len(hidden), width)[:, :vocab_size]


def _multiply(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], *, bias: Tensor | None, out: Tensor
) -> None:
    """Sum of the products left right^T, and the bias, into `out` [n, V]."""
    if bias is None:
        torch.mm(lefts[0], rights[0].T, out=out)
    else:
        torch.addmm(bias, lefts[0], rights[0].T, out=out)
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        out.addmm_(left, right.T)


def _add_product(total: Tensor, raw: Tensor, left: Tensor) -> None:
    """Total [V, d] += raw^T left, the sum in float32."""
    if raw.dtype == torch.float32:
        total.addmm_(raw.T, left)
    elif raw.is_cuda and torch.version.hip is None:
        # cuBLAS takes bfloat16 factors and adds to float32 in place; torch has this for CUDA alone.
        torch.addmm(total, raw.T, left, out_dtype=torch.float32, out=total)
    else:
        # Elsewhere each chunk's product is rounded to bfloat16 before it is added, a few ids at a
        # time.
        size = max(1, SLICE_BYTES // (left.shape[1] * left.element_size()))
        for start in range(0, len(total), size):
            total[start : start + size] += raw[:, start : start + size].T @ left


def _scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    if factor is None:
        return gradient.to(dtype)
    into = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=into)


def _ceiling(number: int, divisor: int) -> int:
    return -(-number // divisor)
