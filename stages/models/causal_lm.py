"""Models of the task causal_lm: causal language models, a LoRA adapter on the teacher's weights included."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ...storage.errors import UsageError, answered
from .identity import Identity
from .loading import ModelKind, placed

KIND = ModelKind(auto=AutoModelForCausalLM, adapter="CAUSAL_LM")


def student_kind(teacher_dir: Path) -> ModelKind:
    """That of every student, whatever its teacher."""
    return KIND


def load_causal_lm(identity: Identity, *, device_map: str | None = None) -> PreTrainedModel:
    """The model as it was identified, in evaluation mode, on the GPU if there is one.

    Args:
        identity: Folder, dtype and adapter.
        device_map: `auto` spreads the layers over all GPUs (accelerate); None puts the model on one
            device.

    Raises:
        UsageError: the folder does not hold a causal language model that transformers can load.
    """
    model, missing = KIND.teacher(identity, device_map=device_map)
    if missing:
        raise UsageError(
            f"{identity.folder} lacks weights of a causal language model ({', '.join(missing[:3])}), "
            "which transformers would draw at random. Name a model that was saved whole."
        )
    if identity.adapter is not None:
        model = _with_adapter(model, identity)
    return placed(model, device_map)


def _with_adapter(model: Any, identity: Identity) -> Any:
    from peft import PeftModel

    what = f"teacher.adapter: {identity.adapter} does not fit {identity.folder}"
    with answered(what, "Name an adapter of this model, or the model of this adapter."):
        merged = PeftModel.from_pretrained(model, str(identity.adapter)).merge_and_unload()
    return merged
