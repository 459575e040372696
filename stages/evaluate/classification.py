"""Measuring texts that are classified.

It measures the distribution over classes, and whether the best one is the gold one.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...storage.joined import open_store
from ...storage.tables.soft_targets import SoftTargets
from ..models.classification import Inputs, class_logits
from ..models.fit.classes import NO_LABEL
from ..models.inputs.reads import check_ids, check_length
from ..workers.job import Job
from .held_out import HeldOut
from .measure import MeasureRow, Row
from .metrics import Tally, measure
from .views import ArmViews


class Measuring:
    """The measures of texts; see `measure.Measuring`."""

    def __init__(self, job: Job, held_out: HeldOut) -> None:
        self._job, self._held_out = job, held_out

    def tally(self) -> Tally:
        """A tally that has the confusion of classes too."""
        return Tally(classes=True)

    def outcomes(self, row: Row) -> np.ndarray | None:
        """[1] the gold class; None where a text has no label."""
        return None if row["label"] is None else np.array([row["label"]], np.int64)

    def named(self, measures: dict[str, Tensor]) -> dict[str, Tensor]:
        """The measures with accuracy added: how often the best class is the gold one."""
        return measures | {"accuracy": measures["correct"]}

    def of_student(self, model: Any) -> MeasureRow:
        """A text at a time."""
        storage = self._job.recipe.storage
        store = open_store(storage.dir, storage.sources)
        inputs = Inputs.of(model, store.teacher_dir(self._job.teacher_id))
        return partial(self._measure, model, inputs)

    def _read(self, model: Any, inputs: Any, row: Row) -> dict[str, Tensor]:
        """What a model takes of a row."""
        ids = row["token_ids"]
        check_length(len(ids), model, "a held-out row has")
        vocab_size = model.get_input_embeddings().num_embeddings
        check_ids(int(ids.max()), vocab_size, "a held-out row contains")
        made: dict[str, Tensor] = inputs.tensors([ids])
        return made

    def _measure(self, model: Any, inputs: Any, row: Row, tally: Tally, view: ArmViews) -> None:
        """Nothing goes into `view`: a text has no positions to show."""
        made = self._read(model, inputs, row)
        with self._job.clock.span("model"), torch.inference_mode():
            targets = SoftTargets.from_row(row).normalised()
            there = {name: tensor.to(model.device) for name, tensor in made.items()}
            logits = self._said(class_logits(model, there), row)
            gold = self.outcomes(row)

            def measured(reference: SoftTargets) -> dict[str, Tensor]:
                found = measure(logits, None, reference)
                return found if gold is None else found | self._of_known(logits, gold)

            said, unit = self._held_out.said(row, targets), row["prompt_key"]
            if said is None:
                measures = measured(targets)
            else:
                measures = said.count(unit, tally, measured, outcomes=gold)
        tally.add(unit, measures)

    def _of_known(self, logits: Tensor, gold: np.ndarray) -> dict[str, Tensor]:
        """The measures that need a label, of the targets that have one."""
        known = np.flatnonzero(gold != NO_LABEL)
        label = torch.as_tensor(gold[known]).to(logits.device)
        return self.named(measure(logits[torch.as_tensor(known)], label))

    def _said(self, logits: Tensor, row: Row) -> Tensor:
        """[N, C] of a row's targets, of the logits of a pass over it."""
        return logits

    def gradient(self, model: Any, arm: str) -> None:
        """None: all classes are stored, so there is no choice of targets."""
