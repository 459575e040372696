"""Soft targets of text that is continued: the teacher's distribution at each position that predicts a scored token."""

from collections.abc import Callable

import numpy as np
import torch

from ...storage.keys import row_seed
from ...storage.tables.soft_targets import SoftTargets
from ..ledger.requests import TargetRequest
from ..models.attention.future import check_causal
from ..models.attention.longest import Company
from ..models.causal_lm import load_causal_lm
from ..models.head import check_head, hidden_states, split_head
from ..models.identity import Identity
from ..targets.alignment import predicting_positions, scored_tokens
from ..targets.draws import Span
from ..targets.entries_and_tail import Reducer, moved
from ..workers.job import Job
from .scorer import Batch, row_key


class Teacher:
    """A causal language model; see `scorer.Teacher`."""

    def __init__(self, job: Job, identity: Identity) -> None:
        model = load_causal_lm(identity, device_map=job.recipe.teacher.device_map)
        check_causal(model)
        check_head(model)
        self.device, self.company = model.device, Company(model)
        self._job, self._model = job, model
        self._reducer = Reducer(split_head(model), kernel=job.score.kernel)

    def begin(self, batch: Batch) -> Callable[[], list[SoftTargets]]:
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
            hidden = hidden_states(self._model, **inputs).flatten(0, 1)
            predicting = hidden[moved(torch.from_numpy(np.concatenate(places)), hidden.device)]
            next_ids = torch.from_numpy(np.concatenate(following, dtype=np.int64))
            return self._reducer.launch(
                predicting, moved(next_ids, hidden.device), kept=batch[0].kept, spans=spans
            ).rows

    def _moved(self, array: np.ndarray) -> torch.Tensor:
        return moved(torch.from_numpy(array), self.device)

    def _span(self, request: TargetRequest) -> Span:
        """Its draws, where there are some, have the seed of the row that it becomes."""
        drawn = request.kept.structure.drawn
        seed = row_seed(row_key(self._job, request)) if drawn else 0
        return Span(request.span_tokens, seed)
