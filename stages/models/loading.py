"""Loading a causal language model as it was identified: dtype, device map, LoRA adapter."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...storage.errors import UsageError
from .identity import Identity


def load_causal_lm(identity: Identity, *, device_map: str | None = None) -> PreTrainedModel:
    """The model, in evaluation mode, on the GPU if there is one.

    Args:
        identity: Folder, dtype and adapter.
        device_map: `auto` spreads the layers over all GPUs (accelerate); None puts the model on one
            device.

    Raises:
        UsageError: the folder does not hold a causal language model that transformers can load.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            identity.folder, dtype=getattr(torch, identity.dtype), device_map=device_map
        )
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # what transformers and safetensors raise for a bad folder has no common type
        raise UsageError(
            f"{identity.folder}: the model does not load ({error}). Check the folder."
        ) from error
    if identity.adapter is not None:
        model = _with_adapter(model, identity)
    if device_map is None and torch.cuda.is_available():
        model = model.to("cuda")
    model.eval()
    return model


def _with_adapter(model: Any, identity: Identity) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(identity.adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"teacher.adapter: {identity.adapter} does not fit {identity.folder} ({error})."
        ) from error
