"""Soft targets of labelled texts: the teacher's distribution over its classes, one a text."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..models.classification import Inputs, class_company, class_logits, load_teacher
from ..models.identity import Identity
from ..recipe.features import captured
from ..targets.features.capture import Projections, capturing, check_capture
from ..workers.job import Job
from .scorer import Batch, Read, asked_of, reads


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
    # -sum p log p, where 0 log 0 = 0
    entropy = -torch.where(logprobs == -torch.inf, 0.0, logprobs.exp() * logprobs).sum(-1)
    best = logprobs.argmax(-1).tolist()
    found = []
    for row, label in enumerate(labels):
        one = logprobs[row : row + 1].cpu().numpy()
        targets = SoftTargets(
            ids=None,
            logprobs=one,
            tail_logprob=np.full(1, -np.inf, np.float32),
            token_logprob=one[:, best[row] if label is None else label],
            entropy=entropy[row : row + 1].cpu().numpy(),
        )
        found.append(targets)
    return found


class Teacher:
    """A model with a head over classes; see `scorer.Teacher`."""

    def __init__(self, job: Job, identity: Identity) -> None:
        model = load_teacher(identity, device_map=job.recipe.teacher.device_map)
        check_capture(model, captured(job.score.features))
        self.device = model.device
        self._job, self.model = job, model
        self.projections: Projections = {}
        self._inputs = Inputs.of(model, identity.folder)
        self.company = class_company(model, self._inputs)

    def begin(self, batch: Batch) -> Callable[[], list[Read]]:
        """All texts in one pass."""
        inputs = self._inputs.tensors([request.token_ids for request in batch])
        labels = [request.label for request in batch]
        with self._job.clock.span("model"):
            there = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            with capturing(self.model, asked_of(batch), self.projections) as taken:
                logits = class_logits(self.model, there)
        lengths = [len(request.token_ids) for request in batch]
        return lambda: reads(class_targets(logits, labels), taken, lengths)
