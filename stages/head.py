"""The seam between hidden states and logits of a causal language model, so that logits can be made a chunk at a time.

    z = softcap( scale * (h W^T + b) )        softcap(x) = c * tanh(x / c), or x where the model has none

Scoring, training and evaluation all make logits here and nowhere else. `check_head` compares this with the model's own
logits once, before any work: an architecture with a head of another form is refused instead of being silently wrong.

Letters: B rows, T tokens per row, N tokens, V vocabulary, D hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..storage.errors import UsageError


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
    """Granite divides its logits, Cohere multiplies them."""

    @property
    def vocab_size(self) -> int:
        """V, padding included."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] in float32 of states [N, D].

        The matrix product runs in the dtype of `hidden` (autocast has no say, the weights are cast to it), what follows
        in float32.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(hidden.dtype)
            logits = functional.linear(hidden, self.weight.to(hidden.dtype), bias).float()
            if self.scale != 1.0:
                logits = logits * self.scale
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def split_head(model: nn.Module) -> Head:
    """The head of a Hugging Face causal language model (or of a PEFT model around one).

    Raises:
        UsageError: the model's output layer is no plain linear layer.
    """
    plain = _plain(model)
    layer = plain.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UsageError(
            f"{_name(plain)}: the output layer is {type(layer).__name__}, expected a plain linear layer. "
            "Leave the output layer out of lora.target_modules; quantised heads are not supported."
        )
    config = plain.config.get_text_config()
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        softcap=getattr(config, "final_logit_softcapping", None) or None,
        scale=(factor or 1.0) / (divisor or 1.0),
    )


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states [B, T, D] after the final norm: what the head is applied to. No logits are made.

    Args:
        model: A causal language model, or a PEFT model around one.
        inputs: `input_ids` [B, T] and what else the model takes; a cache is never used, because transformers only
            looks for packed samples in `position_ids` where there is none.
    """
    return _plain(model).base_model(**inputs, use_cache=False).last_hidden_state


def check_head(model: nn.Module) -> None:
    """Compare `split_head` and `hidden_states` with the model's own logits on eight tokens.

    Raises:
        UsageError: they differ, so this architecture does something between hidden states and logits that `Head` does
            not know.
    """
    head, inner = split_head(model), _plain(model)
    if inner.base_model is inner:
        raise UsageError(f"{_name(inner)}: has no backbone apart from its head. Use a causal language model.")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        ids = (torch.arange(8, device=head.weight.device) % head.vocab_size)[None]
        expected = inner(input_ids=ids, use_cache=False).logits[0].float()
        found = head.logits(hidden_states(model, input_ids=ids)[0])
    model.train(was_training)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2
    same_shape = found.shape == expected.shape
    if not same_shape or not torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    ):
        worst = f"by up to {float((found - expected).abs().max()):.3g}" if same_shape else "in shape"
        raise UsageError(
            f"{_name(inner)}: its logits are not softcap(scale * (hidden W^T + b)); they differ {worst}. "
            "This architecture's output head is not supported; use another model."
        )


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name(model: Any) -> str:
    return model.config.name_or_path or type(model).__name__
