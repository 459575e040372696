"""Soft targets of labelled texts: the teacher's distribution over its classes, one a text."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...storage.tables.soft_targets import SoftTargets
from ..models.attention.longest import Company
from ..models.classification import Inputs, class_company, class_logits, load_teacher
from ..models.fit.classes import NO_LABEL
from ..models.identity import Identity
from ..recipe.features import captured
from ..targets.features.capture import Projections, capturing, check_capture
from ..workers.job import Job
from .scorer import Batch, Read, asked_of, reads


def class_targets(logits: Tensor, labels: Sequence[int | None]) -> list[SoftTargets]:
    """The teacher's distribution over the classes, a text at a time: [1, C] each.

    Args:
        logits: [B, C] float32.
        labels: [B] gold classes.
    """
    known = np.array([NO_LABEL if label is None else label for label in labels])
    whole = targets_over_classes(logits, known)
    return [whole.positions(slice(row, row + 1)) for row in range(len(labels))]


def targets_over_classes(logits: Tensor, labels: np.ndarray) -> SoftTargets:
    """The teacher's distribution over the classes at N places: all of it, at temperature 1.

    `token_logprob` is that of the gold label, of the best class where there is none.

    Args:
        logits: [N, C] float32.
        labels: [N] gold classes, or `NO_LABEL`.

    Returns:
        logprobs [N, C], tail_logprob [N] (-inf), token_logprob [N], entropy [N] (nats).
    """
    logprobs = logits.log_softmax(-1)
    # -sum p log p, where 0 log 0 = 0
    entropy = -torch.where(logprobs == -torch.inf, 0.0, logprobs.exp() * logprobs).sum(-1)
    there = np.where(labels == NO_LABEL, logprobs.argmax(-1).cpu().numpy(), labels)
    stated = logprobs.cpu().numpy()
    return SoftTargets(
        ids=None,
        logprobs=stated,
        tail_logprob=np.full(len(stated), -np.inf, np.float32),
        token_logprob=stated[np.arange(len(stated)), there],
        entropy=entropy.cpu().numpy(),
    )


class Teacher:
    """A model with a head over classes; see `scorer.Teacher`."""

    _load: Callable[..., PreTrainedModel] = staticmethod(load_teacher)
    _company: Callable[[Any, Inputs], Company] = staticmethod(class_company)

    def __init__(self, job: Job, identity: Identity) -> None:
        model = self._load(identity, device_map=job.recipe.teacher.device_map)
        check_capture(model, captured(job.score.features))
        self.device = model.device
        self._job, self.model = job, model
        self.projections: Projections = {}
        self._inputs = Inputs.of(model, identity.folder)
        self.company = self._company(model, self._inputs)

    def begin(self, batch: Batch) -> Callable[[], list[Read]]:
        """All texts in one pass."""
        inputs = self._inputs.tensors([request.token_ids for request in batch])
        with self._job.clock.span("model"):
            there = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            with capturing(self.model, asked_of(batch), self.projections) as taken:
                logits = class_logits(self.model, there)
        lengths = [len(request.token_ids) for request in batch]
        return lambda: reads(self._targets(logits, batch), taken, lengths)

    def _targets(self, logits: Tensor, batch: Batch) -> list[SoftTargets]:
        return class_targets(logits, [request.label for request in batch])
