"""Soft targets of masked texts.

They are the teacher's distribution over the vocabulary at each token that is hidden.
"""

from collections.abc import Callable

import numpy as np
import torch

from ...storage.tables.spans import positions
from ..ledger.requests import TargetRequest
from ..models.classification import Inputs
from ..models.head import split_head
from ..models.identity import Identity
from ..models.masked_lm import load_teacher, masked_company, masked_states
from ..targets.draws import Span
from ..targets.entries_and_tail import Reducer, moved
from ..targets.features.capture import Projections, capturing
from ..workers.job import Job
from .scorer import Batch, Read, asked_of, reads, target_seed


class Teacher:
    """A masked language model; see `scorer.Teacher`."""

    def __init__(self, job: Job, identity: Identity) -> None:
        model = load_teacher(identity, device_map=job.recipe.teacher.device_map)
        self.device, self.model, self._job = model.device, model, job
        self.projections: Projections = {}
        self._inputs = Inputs.of(model, identity.folder)
        self.company = masked_company(model, self._inputs)
        self._reducer = Reducer(split_head(model), kernel=job.score.kernel)

    def begin(self, batch: Batch) -> Callable[[], list[Read]]:
        """Only what is hidden goes through the output layer, that of all rows together."""
        inputs = self._inputs.tensors([request.token_ids for request in batch])
        width = inputs["input_ids"].shape[1]
        places = [row * width + positions(request.spans) for row, request in enumerate(batch)]
        with self._job.clock.span("model"):
            there = {name: moved(tensor, self.device) for name, tensor in inputs.items()}
            with capturing(self.model, asked_of(batch), self.projections) as taken:
                states = masked_states(self.model, **there).flatten(0, 1)
            launched = self._reducer.launch(
                states[moved(torch.from_numpy(np.concatenate(places)), states.device)],
                moved(torch.from_numpy(_hidden(batch)), states.device),
                kept=batch[0].kept,
                spans=[self._span(request) for request in batch],
            )
        lengths = [len(request.token_ids) for request in batch]
        return lambda: reads(launched.rows(), taken, lengths)

    def _span(self, request: TargetRequest) -> Span:
        return Span(request.span_tokens, target_seed(self._job, request))


def _hidden(batch: Batch) -> np.ndarray:
    """[N] int64 the tokens that are hidden from all rows."""
    return np.concatenate([r.labels for r in batch if r.labels is not None], dtype=np.int64)
