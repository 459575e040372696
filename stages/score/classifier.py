"""Scoring with a teacher that classifies: one target a text, over its classes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..models.identity import Identity
from .scorer import Batch, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def class_targets(logits: Tensor, labels: Sequence[int | None]) -> list[SoftTargets]:
    """The teacher's distribution over the classes, a text at a time: all of it, at temperature 1.

    `token_logprob` is that of the gold label, of the best class where there is none.

    Args:
        logits: [B, C] float32.
        labels: [B] gold classes.

    Returns:
        B targets of one position each: logprobs [1, C], tail_logprob [1] (-inf), token_logprob [1],
        entropy [1] (nats).
    """
    logprobs = logits.log_softmax(-1)
    entropy = -torch.where(logprobs == -torch.inf, 0.0, logprobs.exp() * logprobs).sum(-1)
    best = logprobs.argmax(-1).tolist()
    found = []
    for row, label in enumerate(labels):
        one = logprobs[row : row + 1].cpu().numpy()
        found.append(
            SoftTargets(
                ids=None,
                logprobs=one,
                tail_logprob=np.full(1, -np.inf, np.float32),
                token_logprob=one[:, best[row] if label is None else label],
                entropy=entropy[row : row + 1].cpu().numpy(),
            )
        )
    return found


class ClassScorer(Scorer):
    """The same for a teacher that classifies: one target a text, over its classes."""

    def _load(self, teacher: Identity, device_map: str | None) -> "PreTrainedModel":
        from ..models.classifier import Inputs, load_teacher

        model = load_teacher(teacher, device_map=device_map)
        self._inputs = Inputs.of(model, teacher.folder)
        return model

    def _launch(self, batch: Batch) -> Callable[[], list[SoftTargets]]:
        from ..models.classifier import class_logits

        inputs = self._inputs.tensors([request.token_ids for request in batch])
        with self._job.clock.span("model"):
            there = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
            logits = class_logits(self._model, there)
        return lambda: class_targets(logits, [request.label for request in batch])
