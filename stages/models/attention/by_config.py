"""What a config says of a model's attention before any weight is read.

It says what heads there are, and whether queries and keys make the attention.

No torch: the plan asks. What a config does not say, `recorded.py` asks the model itself.
"""

from dataclasses import dataclass
from typing import Any

from ..fit.parts import text_config
from ..fit.uses import reads_one_way
from .cap import caps

SINKS = frozenset(
    "deepseek_v4 gpt_oss granite_swa granitemoe_swa hy_v4 openai_privacy_filter".split()
)
"""Model types whose attention has a score of its own for nothing."""
BIASES = frozenset(
    "bloom cpmant deberta deberta-v2 longt5 mpnet mpt mt5 pop2piano switch_transformers t5 udop "
    "umt5 xlnet".split()
)
"""Those whose scores have a bias that depends on the distance of two tokens."""

ONE_WINDOW = frozenset("ministral3 mistral mixtral olmoe phi3 qwen3_moe starcoder2".split())
"""Those whose layers all have the window, where there is one."""
INCLUSIVE = frozenset("embedding_gemma2 modernbert neomme".split())
"""Those whose config counts a window without the token itself."""

ATTENDING = {"full_attention", "sliding_attention"}
"""Types of layers whose attention is that of all tokens, or of those near by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionFacts:
    """What attention multiplies, as far as the config says it."""

    heads: int
    """H; 0: the config does not say."""
    key_heads: int
    """h, of keys and values; it divides H."""
    width: int
    """Numbers of a query, and of a key, of one head."""
    value_width: int
    beyond: str | None
    """What it is beside softmax(scale q k^T); None: nothing that the config names."""
    causal: bool
    """A token sees nothing behind itself."""
    windows: tuple[int | None, ...] = ()
    """Of each block: a token sees those less than this far away. None, or no such block here: it
    sees all."""

    def window(self, block: int) -> int | None:
        """Of one block."""
        return self.windows[block] if block < len(self.windows) else None

    def numbers(self, kind: str) -> int:
        """Numbers of a token's `queries`, `keys` or `values`."""
        heads = self.heads if kind == "queries" else self.key_heads
        return heads * (self.value_width if kind == "values" else self.width)


def attention_facts(config: Any) -> AttentionFacts:
    """What a config says.

    Args:
        config: Of transformers; without torch, only inside `light_transformers`.
    """
    text = text_config(config)
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    if getattr(text, "multi_query", False):
        key_heads = 1
    states = int(getattr(text, "hidden_size", None) or 0)
    usual = getattr(text, "head_dim", None) or (states // heads if heads else 0)
    width = int(getattr(text, "qk_head_dim", None) or usual)  # DeepSeek: with and without rotation
    return AttentionFacts(
        heads=heads,
        key_heads=key_heads,
        width=width,
        value_width=int(getattr(text, "v_head_dim", None) or width),
        beyond=_beyond(config, text),
        causal=reads_one_way(text) and getattr(text, "is_causal", None) is not False,
        windows=_windows(text),
    )


def _windows(text: Any) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None) or None
    if window is not None and text.model_type in INCLUSIVE:
        window += 1
    if types := getattr(text, "layer_types", None):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    blocks = int(getattr(text, "num_hidden_layers", None) or 0)
    return (window,) * blocks if text.model_type in ONE_WINDOW else ()


def _beyond(config: Any, text: Any) -> str | None:
    if text.model_type in SINKS:
        return "attention sinks"
    if caps(config):
        return "soft-capped scores"
    if text.model_type in BIASES or getattr(text, "alibi", False):
        return "position biases in its scores"
    others = sorted({*(getattr(text, "layer_types", None) or ())} - ATTENDING)
    return f"layers of {others[0]}" if others else None
