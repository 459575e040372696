"""Soft targets of text that is continued.

They are the teacher's distribution at each position that predicts a scored token.
"""

from collections.abc import Callable

import numpy as np
import torch

from ..ledger.requests import TargetRequest
from ..models.attention.future import check_causal
from ..models.attention.longest import Company
from ..models.causal_lm import load_causal_lm
from ..models.head import check_head, hidden_states, split_head
from ..models.identity import Identity
from ..recipe.features import captured
from ..targets.alignment import predicting_positions, scored_tokens
from ..targets.draws import Span
from ..targets.entries_and_tail import Reducer, moved
from ..targets.features.capture import Projections, capturing, check_capture
from ..workers.job import Job
from .scorer import Batch, Read, asked_of, reads, target_seed


class Teacher:
    """A causal language model; see `scorer.Teacher`."""

    def __init__(self, job: Job, identity: Identity) -> None:
        model = load_causal_lm(identity, device_map=job.recipe.teacher.device_map)
        check_causal(model)
        check_head(model)
        check_capture(model, captured(job.score.features))
        self.device, self.company = model.device, Company(model)
        self._job, self.model = job, model
        self.projections: Projections = {}
        self._reducer = Reducer(split_head(model), kernel=job.score.kernel)

    def begin(self, batch: Batch) -> Callable[[], list[Read]]:
        """Only scored positions go through the head, those of all rows together."""
        width = max(len(request.token_ids) for request in batch)
        ids, mask = np.zeros((2, len(batch), width), np.int64)
        positions = np.arange(len(batch) * width).reshape(len(batch), width)
        places, following = [], []
        for row, request in enumerate(batch):
            there = slice(0, len(request.token_ids))
            ids[row, there] = request.token_ids
            mask[row, there] = 1
            places.append(positions[row, predicting_positions(request.spans)])
            following.append(scored_tokens(request.token_ids, request.spans))
        spans = [self._span(request) for request in batch]
        with self._job.clock.span("model"):
            inputs = {"input_ids": self._moved(ids), "attention_mask": self._moved(mask)}
            with capturing(self.model, asked_of(batch), self.projections) as taken:
                hidden = hidden_states(self.model, **inputs).flatten(0, 1)
            predicting = hidden[moved(torch.from_numpy(np.concatenate(places)), hidden.device)]
            next_ids = torch.from_numpy(np.concatenate(following, dtype=np.int64))
            launched = self._reducer.launch(
                predicting, moved(next_ids, hidden.device), kept=batch[0].kept, spans=spans
            )
        lengths = [len(request.token_ids) for request in batch]
        return lambda: reads(launched.rows(), taken, lengths)

    def _moved(self, array: np.ndarray) -> torch.Tensor:
        return moved(torch.from_numpy(array), self.device)

    def _span(self, request: TargetRequest) -> Span:
        return Span(request.span_tokens, target_seed(self._job, request))
