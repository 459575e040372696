"""Queries, keys and values as a model multiplies them.

They are taken after rotation, and after any norm of their own.

transformers' models hand them to a function by name. While `recording`, another one stands under
the same name: it keeps them, and then calls what was there. So mask, dropout and kernel stay the
model's own. (A name of its own would need a mask function of its own too: without one transformers
makes no mask, and says nothing.) Gradients flow through what is kept.

Attention can be rebuilt from queries and keys where it is softmax(scale q k^T) over the tokens that
are seen, and nothing else. `attention_layers` asks the model itself, against its eager attention.
"""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....storage.errors import UsageError, answered
from ..device import evaluating
from ..inputs.reads import context_of
from .maps import Scores, maps

TOKENS = 64
"""Of the text on which attention is rebuilt, or as many as the model reads."""
ALLOWED = 1e-4
"""Between numbers of two maps: scores of several hundred are rounded so in float32, those of a few
to 1e-6."""
BEYOND = {
    "s_aux": "attention sinks",
    "softcap": "soft-capped scores",
    "position_bias": "position biases in its scores",
}
"""What a layer hands over where its attention is more, and what that is."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recorded:
    """What one attention layer multiplied in one pass of B rows of T tokens."""

    queries: Tensor
    """[B, H, T, d]"""
    keys: Tensor
    """[B, h, T, d], h divides H."""
    values: Tensor
    """[B, h, T, d']"""
    scale: float
    causal: bool
    window: int | None
    """A token sees those less than this far away; None: however far."""

    def vectors(self, kind: str, at: Tensor) -> Tensor:
        """Of `queries`, `keys` or `values` those [h, N, d] of some tokens.

        Args:
            kind: Which.
            at: Of the flattened [B * T], [N] indices or a mask [B * T]: without padding.
        """
        part: Tensor = getattr(self, kind)
        return part.transpose(1, 2).flatten(0, 1)[at].transpose(0, 1)

    def scores(self, at: Tensor) -> Scores:
        """What the maps of the pass are made of, of some tokens as above."""
        return Scores(
            x=self.vectors("queries", at),
            y=self.vectors("keys", at),
            scale=self.scale,
            causal=self.causal,
            window=self.window,
        )


@contextmanager
def recording(
    model: nn.Module, within: Collection[nn.Module] | None = None
) -> Iterator[dict[nn.Module, Recorded]]:
    """What each attention layer multiplies first within the block, by layer.

    Layers are in the order of their passes. A layer that is computed again, for gradient
    checkpointing, is kept once. It is for one forward pass of a model that `attention_layers` has
    accepted.

    Args:
        model: Whose.
        within: Modules, all others are left out; None: none is.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _plain(model).config.get_text_config()._attn_implementation
    own = ALL_ATTENTION_FUNCTIONS[name]
    layers = set(model.modules()) if within is None else set(within)
    kept: dict[nn.Module, Recorded] = {}

    def keep(module: nn.Module, *given: Any, **asked: Any) -> Any:
        if module in layers and module not in kept:
            kept[module] = _recorded(module, given, asked)
        return own(module, *given, **asked)

    AttentionInterface.register(name, keep)
    try:
        yield kept
    finally:
        AttentionInterface.register(name, own)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The attention layers of a model, in order, if queries and keys of each make its attention.

    Maps that are rebuilt are compared with those that the model's eager attention makes of the same
    queries and keys in float32, on one text.

    Raises:
        UsageError: an architecture whose attention is more than softmax(scale q k^T), by name and
            cause.
    """
    plain = _plain(model)
    name = f"{plain.config.name_or_path or type(plain).__name__} ({plain.config.model_type})"
    compared = _compared(plain, name)
    expected = plain.config.get_text_config().num_hidden_layers
    if len(compared) != expected:
        raise _refused(
            name,
            f"{len(compared)} of its {expected} layers use transformers' attention functions "
            "(recurrent layers do not, nor do many with position biases)",
        )
    for number, (beyond, off) in enumerate(compared.values()):
        if beyond:
            raise _refused(name, f"layer {number} has {beyond}")
        if not off <= ALLOWED:
            raise _refused(name, f"rebuilt, that of layer {number} is off by {off:.3g}")
    if plain.config.get_text_config()._attn_implementation == "eager":
        raise _refused(name, "it is loaded with eager attention, which is not recorded")
    return list(compared)


Compared = dict[nn.Module, tuple[str | None, float]]


def _compared(plain: Any, name: str) -> Compared:
    """Of each layer that attends by transformers' functions: how far maps are off.

    It also holds what there is beyond the softmax.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: Compared = {}

    def compare(module: nn.Module, *given: Any, **asked: Any) -> Any:
        eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        query, key, value, *more = given
        # In float32 whatever the model is in, so that what is off is no rounding of scores.
        given = (query.float(), key.float(), value.float(), *more)
        output, weights = eager(module, *given, **asked)
        found[module] = (_beyond(asked), _off(_recorded(module, given, asked), weights))
        return output.to(query.dtype), weights

    count = min(context_of(plain) or TOKENS, TOKENS)
    ids = torch.arange(count, device=plain.device)[None] + 1
    ids = ids % plain.get_input_embeddings().num_embeddings
    own = plain.config._attn_implementation
    what, remedy = f"{name}: its attention cannot be compared with its eager one", _REMEDY
    with evaluating(plain), torch.no_grad(), answered(what, remedy):
        plain.set_attn_implementation("eager")
        ALL_ATTENTION_FUNCTIONS["eager"] = compare
        try:
            plain(input_ids=ids)
        finally:
            del ALL_ATTENTION_FUNCTIONS["eager"]
            plain.set_attn_implementation(own)
    return found


def _recorded(module: nn.Module, given: tuple[Any, ...], asked: dict[str, Any]) -> Recorded:
    """Given: query, key, value and mask, as transformers' attention functions are called."""
    query, key, value = given[:3]
    scale, causal = asked.get("scaling"), asked.get("is_causal")
    return Recorded(
        queries=query,
        keys=key,
        values=value,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        window=asked.get("sliding_window"),
    )


def _beyond(asked: dict[str, Any]) -> str | None:
    return next((what for name, what in BEYOND.items() if asked.get(name) is not None), None)


def _off(recorded: Recorded, weights: Tensor | None) -> float:
    """The largest difference between rebuilt maps and weights [1, H, T, T].

    It is infinite where these are other maps.
    """
    tokens = recorded.queries.shape[2]
    every = torch.arange(tokens, device=recorded.queries.device)
    (rebuilt,) = maps(recorded.scores(every), [tokens])
    if weights is None or weights.shape[1:] != rebuilt.shape:
        return float("inf")
    return float((rebuilt - weights[0].float()).abs().max())


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_REMEDY = "Use other features (hidden, pooled), or a model whose attention is that alone."


def _refused(name: str, cause: str) -> UsageError:
    return UsageError(
        f"{name}: its attention is not softmax(scale q k^T) alone: {cause}. Queries and keys would "
        f"not say where it looks. {_REMEDY}"
    )
