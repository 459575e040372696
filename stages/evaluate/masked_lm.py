"""Measuring masked texts.

It measures the hidden tokens, and how often the best guess is the one that was there.
"""

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.joined import open_store
from ...storage.tables.spans import positions
from ..models.classification import Inputs
from ..models.masked_lm import masked_states
from ..workers.job import Job
from . import causal_lm
from .held_out import HeldOut
from .measure import MeasureRow, Row


class Measuring(causal_lm.Measuring):
    """The measures of hidden tokens, see `measure.Measuring`.

    The masks are those of the stored rows.
    """

    _inputs: Inputs

    def __init__(self, job: Job, held_out: HeldOut) -> None:
        super().__init__(job, held_out)
        store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
        self._teacher_dir = store.teacher_dir(job.teacher_id)

    def outcomes(self, row: Row) -> np.ndarray:
        """[N] the tokens that are hidden."""
        return np.asarray(row["labels"], np.int64)

    def named(self, measures: dict[str, Tensor]) -> dict[str, Tensor]:
        """The measures and accuracy: how often the best guess is the token that was there."""
        return measures | {"accuracy": measures["correct"]}

    def of_student(self, model: nn.Module) -> MeasureRow:
        """A text at a time."""
        self._inputs = Inputs.of(model, self._teacher_dir)
        return super().of_student(model)

    def _predicting(self, model: nn.Module, row: Row) -> Tensor:
        device = next(model.parameters()).device
        made = self._inputs.tensors([row["token_ids"]])
        states = masked_states(model, **{name: one.to(device) for name, one in made.items()})[0]
        return states[torch.from_numpy(positions(row["spans"])).to(device)]

    def gradient(self, model: nn.Module, arm: str) -> None:
        """None: it is not compared for this task."""
