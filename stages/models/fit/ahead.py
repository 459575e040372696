"""Whether a model sees the future, by its config: of what `attention/future.py` asks the model itself."""

from typing import Any

from .parts import text_config
from .uses import reads_one_way


def reads_ahead(config: Any) -> str | None:
    """The field of a config that makes its model see the future, as `name: value`; None: none is known to.

    Args:
        config: Of transformers, or anything with its attributes. No weights, no torch.
    """
    for part in (config, text_config(config)):
        found = {name: getattr(part, name, None) for name in ("is_causal", "causal", "is_decoder")}
        if found["is_causal"] is False:
            return "is_causal: false"
        if found["causal"] is False:
            return "causal: false"
        if found["is_decoder"] is False and not reads_one_way(part):
            return "is_decoder: false"
        # "vision": between the patches of an image, of which there are none here.
        if getattr(part, "use_bidirectional_attention", None) in (True, "all"):
            return "use_bidirectional_attention: true"
    return None


def refusal(name: str, found: str) -> str:
    """What is said of a model that sees the future, and what shows it."""
    return (
        f"{name}: sees the future ({found}), expected a causal language model, whose answer depends "
        "on the tokens so far alone. Use another model, or a config that makes this one causal if "
        "it was trained so."
    )
