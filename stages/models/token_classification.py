"""Models of the task token_classification: a head over classes at each token.

A row is one text, logits are [B, T, C].

Texts become inputs as for classification: padded at their end, nothing packed, nothing shifted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForTokenClassification, PreTrainedModel

from .attention.longest import Company
from .classification import Inputs, class_company, of_each, trained
from .fit.classes import names_in
from .identity import Identity
from .loading import ModelKind


def student_kind(teacher_dir: Path) -> ModelKind:
    """A student has its teacher's classes."""
    return of_classes(names_in(teacher_dir))


def of_classes(names: Sequence[str]) -> ModelKind:
    """Models with a head over these classes at each token."""
    return ModelKind(auto=AutoModelForTokenClassification, adapter="TOKEN_CLS", classes=names)


def load_teacher(identity: Identity, *, device_map: str | None = None) -> PreTrainedModel:
    """A model with a trained head, in evaluation mode, on the GPU if there is one.

    Raises:
        UsageError: the folder does not hold one.
    """
    return trained(of_classes(()), identity, device_map=device_map)


def token_company(model: Any, inputs: Inputs) -> Company:
    """Which texts may share a pass, asked of the logits of all their tokens."""
    return class_company(model, inputs, of_each)
