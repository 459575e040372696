"""Soft targets of words: the teacher's distribution over its classes at the first token of each."""

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ...storage.tables.spans import positions
from ..ledger.requests import TargetRequest
from ..models.fit.classes import NO_LABEL
from ..models.token_classification import load_teacher, token_company
from . import classification
from .classification import targets_over_classes
from .scorer import Batch


class Teacher(classification.Teacher):
    """A model with a head over classes at each token; see `scorer.Teacher`."""

    _load = staticmethod(load_teacher)
    _company = staticmethod(token_company)

    def _targets(self, logits: Tensor, batch: Batch) -> list[SoftTargets]:
        return [word_targets(row, request) for row, request in zip(logits, batch, strict=True)]


def word_targets(logits: Tensor, request: TargetRequest) -> SoftTargets:
    """Targets of a text's N words, each said at its first token: [N, C].

    `logits`: [T, C] float32 of all its tokens, and of padding after them.
    """
    labels = np.full(request.span_tokens, NO_LABEL) if request.labels is None else request.labels
    first = torch.from_numpy(positions(request.spans)).to(logits.device)
    return targets_over_classes(logits[first], labels)
