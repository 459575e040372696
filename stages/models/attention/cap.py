"""Attention scores that are capped, where a config asks for it.

The model gets an attention that does it.

    score = cap * tanh(q k / cap)        Gemma 2, VaultGemma

transformers' usual attention (torch's fused one) leaves the cap out without a word; its eager one
applies it. Elsewhere the usual one stays: eager is slower, and not right for every architecture
(Falcon's adds ALiBi twice).
"""

from typing import Any

FIELD = "attn_logit_softcapping"


def caps(config: Any) -> bool:
    """Whether a config, or one inside of it, caps attention scores. No weights, no torch."""
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return bool(getattr(config, FIELD, None)) or any(caps(part) for part in inner if part)


def attend_capped(model: Any) -> None:
    """Let a model of transformers apply its cap; one without a cap is left as it is."""
    if caps(model.config):
        model.set_attn_implementation("eager")
