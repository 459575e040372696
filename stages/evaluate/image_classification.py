"""Measuring images that are classified: as texts that are, with an image in place of each."""

from functools import partial
from typing import Any

from torch import Tensor

from ...storage.joined import open_store
from ..models.image_classification import Images
from . import classification
from .measure import MeasureRow, Row


class Measuring(classification.Measuring):
    """The measures of images; see `measure.Measuring`."""

    def of_student(self, model: Any) -> MeasureRow:
        """An image at a time."""
        storage = self._job.recipe.storage
        store = open_store(storage.dir, storage.sources)
        images = Images(store.teacher_dir(self._job.teacher_id))
        return partial(self._measure, model, images)

    def _read(self, model: Any, inputs: Any, row: Row) -> dict[str, Tensor]:
        made: dict[str, Tensor] = inputs.tensors([row["image"]])
        return made
