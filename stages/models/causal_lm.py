"""Models of the task causal_lm: causal language models.

A LoRA adapter on the teacher's weights is included.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from ...storage.errors import UsageError
from .identity import Identity
from .loading import ModelKind, adapter_on, placed, with_its_adapter

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
            f"{identity.folder} lacks weights of a causal language model "
            f"({', '.join(missing[:3])}), which transformers would draw at random. Name a model "
            "that was saved whole."
        )
    if identity.adapter is not None:
        with adapter_on(model, identity) as adapted:
            model = with_its_adapter(adapted)
    return placed(model, device_map)
