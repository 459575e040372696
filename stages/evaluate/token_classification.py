"""Measuring words that are classified.

It measures the distribution over classes at each word, and the entities that these mark.
"""

import numpy as np
import torch
from torch import Tensor

from ...storage.joined import open_store
from ...storage.tables.spans import positions
from ..models.fit.classes import NO_LABEL, names_in
from ..workers.job import Job
from . import classification
from .by_class.entities import Entities
from .held_out import HeldOut
from .measure import Row
from .metrics import Tally


class Measuring(classification.Measuring):
    """The measures of words; see `measure.Measuring`."""

    def __init__(self, job: Job, held_out: HeldOut) -> None:
        super().__init__(job, held_out)
        store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
        self._names = names_in(store.teacher_dir(job.teacher_id))

    def tally(self) -> Tally:
        """A tally that has the confusion of classes, and entities where the classes mark some."""
        return Tally(classes=True, entities=Entities.of(self._names))

    def outcomes(self, row: Row) -> np.ndarray | None:
        """[N] the gold classes, -1 where a word has none.

        It is None where no word of the text has one.
        """
        labels = row["labels"]
        if labels is None or (labels == NO_LABEL).all():
            return None
        return np.asarray(labels, np.int64)

    def _said(self, logits: Tensor, row: Row) -> Tensor:
        """The logits at the first token of each word."""
        return logits[0][torch.from_numpy(positions(row["spans"])).to(logits.device)]
