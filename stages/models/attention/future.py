"""Whether a model sees the future: what its config says, and what the model does.

The model is asked by changing the last token.

What a causal language model says at a position is a function of the tokens up to it. One that reads
ahead has seen the token that it is to predict: its soft targets would be worthless, and a student
that reads ahead learns to copy.
"""

from typing import Any

import torch
from torch import Tensor

from ....storage.errors import UsageError, answered
from ..device import evaluating
from ..fit.uses import reads_ahead, refusal
from ..inputs.reads import context_of

TOKENS = 16
"""Of the text whose last token is changed, or as many as the model reads."""
CHANGES = (1, 2, 3)
"""The last token is moved on by so many ids."""


def check_causal(model: Any) -> None:
    """Refuse a language model whose logits at earlier positions move with the last token.

    One code at one shape gives equal bits, whatever the values. Where experts compute for the
    tokens that come to them, the last token changes their shapes, and so the last bits of others;
    and in bfloat16 a last bit may choose another expert. So logits may move by a rounding, and only
    a model that moves at each of several changes is refused.

    Raises:
        UsageError: it sees the future.
    """
    said = reads_ahead(model.config)
    name = f"{model.config.name_or_path or type(model).__name__} ({model.config.model_type})"
    if said is not None:
        raise UsageError(refusal(name, f"its config says {said}"))
    what = f"{name}: does not read a text of a few tokens"
    with evaluating(model), answered(what, "Use another model."):
        moved, largest = _moved(model)
    allowed = 1e-5 if model.dtype == torch.float32 else 2e-2
    if moved > allowed * largest:
        found = f"with another last token its earlier logits differ by up to {moved:.3g}"
        raise UsageError(refusal(name, found))


def _moved(model: Any) -> tuple[float, float]:
    """How far earlier logits move at each of several changes, and the largest of them all."""
    vocab_size = model.get_input_embeddings().num_embeddings
    most = context_of(model) or TOKENS
    ids = torch.arange(1, min(most, TOKENS) + 1, device=model.device)[None] % vocab_size
    with torch.no_grad():
        first = _earlier(model, ids)
        moved = []
        for step in CHANGES:
            changed = ids.clone()
            changed[0, -1] = (ids[0, -1] + step) % vocab_size
            moved.append(float((_earlier(model, changed) - first).abs().max()))
    return min(moved), float(first.abs().max())


def _earlier(model: Any, ids: Tensor) -> Tensor:
    """Logits [1, T - 1, V] at all positions but the last."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1].float()
