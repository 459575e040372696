"""The seam between hidden states and logits of a language model.

Through it logits can be made a chunk at a time.

    z = softcap( scale * (h W^T + b + u B^T) )
    softcap(x) = c * tanh(x / c), or x where the model has none

with u = s * dropout(h) A^T where the output layer has a LoRA. Scoring, training and evaluation all
make logits of this form and no other. `check_head` compares it with the model's own logits once,
before any work: an architecture with a head of another form is refused instead of being silently
wrong.

Letters: B rows, T tokens per row, N tokens, V vocabulary, D hidden, r rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...storage.errors import UsageError, answered
from .device import evaluating

# Fields of a config, by what they are to the logits: architectures name one thing in several ways.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

NOT_SUPPORTED = "This architecture's output head is not supported; use another model."


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LowRank:
    """What a LoRA adds to the head's weight; its tensors are the adapter's own parameters."""

    down: Tensor
    """[r, D] A"""
    up: Tensor
    """[V, r] B"""
    scale: float
    """s"""
    dropout: nn.Module

    def narrow(self, hidden: Tensor) -> Tensor:
        """The u [N, r] of states [N, D], in their dtype; autograd goes through it."""
        return self.scale * functional.linear(
            self.dropout(hidden), whole(self.down).to(hidden.dtype)
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """Output head of a model; its tensors are the model's own parameters, not copies."""

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None = None
    """[V]"""
    softcap: float | None = None
    """Gemma's final logit soft-capping."""
    scale: float = 1.0
    """Granite divides its logits, Cohere and Falcon-H1 multiply them."""
    low_rank: LowRank | None = None
    """A LoRA on the output layer."""

    @property
    def vocab_size(self) -> int:
        """V, padding included."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] in float32 of states [N, D].

        The matrix product runs in the dtype of `hidden` (autocast has no say, the weights are cast
        to it), what follows in float32.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return self.finished(self._product(hidden))

    def finished(self, product: Tensor) -> Tensor:
        """Logits [N, V] in float32 of what the matrix product made.

        They are `product` itself where nothing is to be done.
        """
        logits = product.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """`logits` in the dtype that holds them.

        That is the product's, where neither scale nor soft-capping follows.
        """
        if self.scale != 1.0 or self.softcap is not None:
            return self.logits(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._product(hidden)

    def _product(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else whole(self.bias).to(hidden.dtype)
        product = functional.linear(hidden, whole(self.weight).to(hidden.dtype), bias)
        if self.low_rank is None:
            return product
        return product + functional.linear(
            self.low_rank.narrow(hidden), whole(self.low_rank.up).to(hidden.dtype)
        )


def split_head(model: nn.Module) -> Head:
    """The head of a Hugging Face causal language model (or of a PEFT model around one).

    Raises:
        UsageError: the model's output layer is neither a plain linear layer nor one with a single
            plain LoRA.
    """
    plain = _plain(model)
    layer = plain.get_output_embeddings()
    low_rank = None
    if hasattr(layer, "get_base_layer"):
        layer, low_rank = layer.get_base_layer(), _low_rank(layer, _name(plain))
    if not isinstance(layer, nn.Linear) or layer.weight.dtype not in _FLOATS:
        raise UsageError(
            f"{_name(plain)}: the output layer is {_kind(layer)}, expected a plain linear "
            "layer, or one with a LoRA. Quantised heads are not supported, nor are output layers "
            "of other adapters: leave the output layer out of what they change."
        )
    config = plain.config.get_text_config()
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        softcap=_setting(config, SOFTCAPS),
        scale=(_setting(config, FACTORS) or 1.0) / (_setting(config, DIVISORS) or 1.0),
        low_rank=low_rank,
    )


def _kind(layer: Any) -> str:
    """The class of a layer, and the type of its weights where they have one."""
    dtype = getattr(getattr(layer, "weight", None), "dtype", None)
    return type(layer).__name__ + ("" if dtype is None else f" ({dtype})")


def _setting(config: Any, names: Sequence[str]) -> float | None:
    """The first of these fields that a config has, and that is not 0."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _low_rank(layer: Any, name: str) -> LowRank | None:
    """What PEFT's layer adds to its base layer now.

    It adds nothing where the adapter is off, or merged into the weight.
    """
    if not hasattr(layer, "lora_A"):
        raise UsageError(
            f"{name}: the output layer is {type(layer).__name__}, expected a plain linear layer, "
            "or one with a LoRA. Leave the output layer out of what this adapter changes."
        )
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active:
        return None
    if len(active) > 1:
        raise UsageError(
            f"{name}: the output layer has {len(active)} active adapters ({', '.join(active)}), "
            "expected one. Activate one of them, or merge the others first."
        )
    (adapter,) = active
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
        raise UsageError(
            f"{name}: the adapter {adapter!r} of the output layer is more than a low-rank product "
            "(DoRA, a bias, ...), expected a plain LoRA there. Leave the output layer out of its "
            "target_modules."
        )
    return LowRank(
        down=layer.lora_A[adapter].weight,
        up=layer.lora_B[adapter].weight,
        scale=layer.scaling[adapter],
        dropout=layer.lora_dropout[adapter],
    )


def whole(tensor: Tensor) -> Tensor:
    """A parameter as every rank needs it: itself, or all of it where FSDP2 has sharded it.

    The head is used outside its module's own forward, whose hooks would gather it and reduce its
    gradient. So both is done here, and as there: the gradient of a shard is the mean over the
    ranks.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    gathered: Tensor = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if gathered.requires_grad:  # summed, then divided: gloo knows no mean
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states [B, T, D] after the final norm: what the head is applied to.

    No logits are made.

    Args:
        model: A causal language model, or a PEFT model around one.
        inputs: `input_ids` [B, T] and what else the model takes; a cache is never used, because
            transformers only looks for packed samples in `position_ids` where there is none.
    """
    hidden: Tensor = backbone(_plain(model))(**inputs, use_cache=False).last_hidden_state
    return hidden


def backbone(model: Any) -> nn.Module:
    """What makes the hidden states of a language model.

    Raises:
        UsageError: it is not apart from the head.
    """
    found: nn.Module = model.base_model
    if found is not model:
        return found
    # Llama 4 names its body as it is named inside of the model for images.
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module):
        return inner
    raise UsageError(
        f"{_name(model)}: has no backbone apart from its head. Use another causal language model."
    )


def check_head(model: nn.Module) -> None:
    """Compare `split_head` and `hidden_states` with the model's own logits on eight tokens.

    Raises:
        UsageError: they differ, so this architecture does something between hidden states and
            logits that `Head` does not know; or it cannot read a plain text at all.
    """
    backbone(_plain(model))
    compare_head(model, hidden_states, use_cache=False)


def compare_head(model: nn.Module, states: Callable[..., Tensor], **also: Any) -> None:
    """Compare `split_head` of these states [B, T, D] with the model's own logits on eight tokens.

    `also`: what the model takes besides.

    Raises:
        UsageError: as of `check_head`.
    """
    head, inner = split_head(model), _plain(model)
    ids = (torch.arange(8, device=head.weight.device) % head.vocab_size)[None]
    what = f"{_name(inner)}: its logits cannot be made of its hidden states and its output layer"
    with evaluating(model), torch.no_grad(), answered(what, NOT_SUPPORTED):
        expected = inner(input_ids=ids, **also).logits[0].float()
        found = head.logits(states(model, input_ids=ids)[0])
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2
    same_shape = found.shape == expected.shape
    if not same_shape or not torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    ):
        worst = (
            f"by up to {float((found - expected).abs().max()):.3g}" if same_shape else "in shape"
        )
        raise UsageError(
            f"{_name(inner)}: its logits are not softcap(scale * (hidden W^T + b)); they differ "
            f"{worst}. {NOT_SUPPORTED}"
        )


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name(model: Any) -> str:
    """Where it comes from if that is known, and its architecture."""
    kind = type(model).__name__
    path = model.config.name_or_path
    return f"{path} ({kind})" if path else kind
