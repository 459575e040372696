"""How much arithmetic a training step needs, and what share of the device's rate it got (MFU).

Model FLOPs are counted after Kaplan et al. (2020, arXiv 2001.08361, section 2.1) and PaLM
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B): a weight that takes part in a matrix product
costs 2 FLOPs a token forward, 2 for the gradient of its input and 2 for its own; attention costs 12
H d L n^2 for a sample of n tokens (H heads of d, L layers; no discount for the causal half). Only
what is needed counts: no padding, no recomputation by gradient checkpointing, no gradient of
weights that do not train (LoRA), of experts those that a token visits, the head at scored positions
alone, and nothing for looking up embeddings, norms, softmax, loss and optimizer.
"""

import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import nn

from ..loader.samples import Step
from ..models.device import evaluating

# Dense bfloat16 with float32 sums, as the vendors' data sheets have it. The first name that fits is
# taken.
_PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
_PRODUCT = 1024  # rows and columns of the matrices that are timed elsewhere
_PASSES = 3  # forward, and as much again for the gradients of input and weight each
_LONG = 1.0  # seconds: on a CPU without bfloat16 a product of it takes several


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """What training a model costs, forward and backward."""

    token: float
    """FLOPs of a token, in the body."""
    scored_token: float
    """FLOPs of a scored token, in the head."""
    layers: tuple[tuple[float, int | None], ...]
    """Of each attention layer: FLOPs of a pair of positions, and how many positions one sees at
    most (None: all)."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        head: torch.Tensor | None,
        example: dict[str, torch.Tensor] | None = None,
    ) -> Self:
        """Count a transformer's matrices, or what a pass over one image does.

        Args:
            model: The student.
            head: [V, D] the output layer's weight; None where there is none.
            example: What the model takes of one image; None: it reads text.
        """
        if example is not None:
            return cls(token=_PASSES * _counted(model, example), scored_token=0.0, layers=())
        named: Any = model
        config = named.config.get_text_config()
        looked_up = {
            id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        skipped = looked_up if head is None else looked_up | {id(head)}
        body = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in skipped]
        return cls(
            token=sum(_per_weight(p) * p.numel() * _visited(p, config) for p in body),
            scored_token=0.0 if head is None else _per_weight(head) * head.numel(),
            layers=_attention(config),
        )

    def step(self, step: Step) -> float:
        """FLOPs of an optimizer step."""
        lengths = [len(sample) for sample in step.samples]
        pairs = sum(cost * n * min(n, seen or n) for cost, seen in self.layers for n in lengths)
        return self.token * step.tokens + self.scored_token * step.scored_tokens + pairs


def _counted(model: nn.Module, example: dict[str, torch.Tensor]) -> int:
    """FLOPs of a forward pass, as torch counts convolutions, matrix products and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**{name: tensor.to(device) for name, tensor in example.items()})
    return int(counter.get_total_flops())


def _per_weight(weight: torch.Tensor) -> int:
    return 6 if weight.requires_grad else 4


def _visited(weight: torch.Tensor, config: Any) -> float:
    """Share of a stack of experts' weights [E, ...] that a token meets; 1 for any other matrix."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    per_token = getattr(config, "num_experts_per_tok", None)
    if not experts or not per_token or weight.ndim != 3 or weight.shape[0] != experts:
        return 1.0
    return float(per_token / experts)


def _attention(config: Any) -> tuple[tuple[float, int | None], ...]:
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return ()
    usual = getattr(config, "head_dim", None) or config.hidden_size // heads
    widths = (getattr(config, "qk_head_dim", None) or usual) + (
        getattr(config, "v_head_dim", None) or usual
    )
    window = getattr(config, "sliding_window", None)
    seen = {"full_attention": None, "sliding_attention": window}
    alike = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [alike] * config.num_hidden_layers
    return tuple((6.0 * heads * widths, seen[kind]) for kind in kinds if kind in seen)


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The rate that a device is measured against."""

    flops_per_second: float
    of: str
    """What it is the rate of."""
    vendor: bool
    """Whether the vendor states it; else it was measured here."""

    @classmethod
    def at(cls, device: torch.device, dtype: torch.dtype) -> Self:
        """The vendor's dense bfloat16 rate where the GPU is a known one.

        Else it is the rate of a matrix product in `dtype`.
        """
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        for known, rate in _PEAKS.items() if device.type == "cuda" else ():
            if re.search(rf"\b{known}\b", name):  # an A10G is no A10, an RTX A4000 no A40
                return cls(
                    flops_per_second=rate,
                    of=f"the vendor's dense bfloat16 rate of {name}",
                    vendor=True,
                )
        rate = _product_rate(device, dtype)
        kind = str(dtype).removeprefix("torch.")
        product = f"a {kind} matrix product's rate on this {name}, {_PRODUCT} x {_PRODUCT}"
        return cls(flops_per_second=rate, of=product, vendor=False)


@cache
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a square matrix product, the best of some.

    A product that takes long is timed once, and its rate is taken.
    """
    left, right = (torch.ones(_PRODUCT, _PRODUCT, device=device, dtype=dtype) for _ in range(2))
    best, first = float("inf"), time.perf_counter()
    for _ in range(4):
        began = time.perf_counter()
        made = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        best = min(best, ended - began)
        if ended - first > _LONG:
            break
    del made
    return 2 * _PRODUCT**3 / best
