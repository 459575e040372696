"""Models of the task masked_lm: masked language models, one text a row.

This module also makes the states that their logits are made of.

Between such a model's body and its output layer stands a transform (BERT, RoBERTa: dense,
activation, norm; others others). So the seam is behind it: the states are what the output layer
itself is handed, and `head.py` makes logits of them as of a causal model's. Nothing is packed and
nothing is shifted.

Letters: B texts, T tokens of the longest, D what the output layer takes, V vocabulary.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from ...storage.errors import UsageError
from .attention.longest import Company
from .classification import Inputs, class_company, of_each
from .head import NOT_SUPPORTED, compare_head
from .identity import Identity
from .loading import ModelKind, placed

KIND = ModelKind(auto=AutoModelForMaskedLM, adapter="")


def student_kind(teacher_dir: Path) -> ModelKind:
    """That of every student, whatever its teacher."""
    return KIND


def load_teacher(identity: Identity, *, device_map: str | None = None) -> PreTrainedModel:
    """A model with a trained head, in evaluation mode, on the GPU if there is one.

    Raises:
        UsageError: the folder does not hold one, or its logits cannot be made of its states.
    """
    model, missing = KIND.teacher(identity, device_map=device_map)
    if missing:
        raise UsageError(
            f"teacher.model: {identity.folder} lacks weights of a masked language model "
            f"({', '.join(missing[:3])}), which transformers would draw at random. Name a model "
            "that was trained with its head, and saved whole."
        )
    check_masked(model)
    return placed(model, device_map)


def check_masked(model: nn.Module) -> None:
    """Refuse a model whose logits are not made of its states by its output layer alone.

    Raises:
        UsageError: it is one.
    """
    compare_head(model, masked_states)


def masked_states(model: nn.Module, **inputs: Tensor) -> Tensor:
    """What the output layer is handed [B, T, D]: the body's states behind the transform.

    No logits are made.

    Args:
        model: A masked language model.
        inputs: As `Inputs.tensors` makes them.

    Raises:
        UsageError: its output layer is not handed states of all tokens.
    """
    whole: Any = model
    layer, handed = whole.get_output_embeddings(), []

    def take(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        handed.append(given[0])
        return (given[0][:, :0],)  # of no token, so that the layer has nothing to do

    hook = layer.register_forward_pre_hook(take)
    try:
        model(**inputs)
    finally:
        hook.remove()
    if [states.shape[:-1] for states in handed] != [inputs["input_ids"].shape]:
        raise UsageError(
            f"{type(model).__name__}: its output layer is not handed the states of all tokens. "
            f"{NOT_SUPPORTED}"
        )
    return handed[0]


def masked_company(model: Any, inputs: Inputs) -> Company:
    """Which texts may share a pass, asked of the states of all their tokens."""
    return class_company(model, inputs, of_each, lambda model, there: masked_states(model, **there))
