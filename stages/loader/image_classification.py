"""Forward passes over images that are classified: those of classification, an image in place of each text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.errors import UsageError
from ..losses.definition import Distilled
from ..losses.objective import Aim
from ..models.image_classification import Images
from ..workers.job import Job
from .classification import ClassBatch, ClassPasses
from .samples import Sample

_TOO_FEW = "more than 1 value per channel"
"""What torch says of a batch norm that has one number to take a mean and a variance of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePasses(ClassPasses):
    """Passes over images, which have one size; `tokens_per_pass` counts them."""

    def batches(
        self, samples: Sequence[Sample], temperature: float | None = 1.0
    ) -> Iterator[ClassBatch]:
        """The forward passes of a step: as few as hold it, as alike in size as can be.

        The norms of a pass are of its images, and of one image alone they may be of nothing.
        """
        passes = -(-len(samples) // self.tokens_per_pass)
        for part in np.array_split(np.arange(len(samples)), passes):
            yield self._batch([samples[index] for index in part], temperature)

    @property
    def example(self) -> dict[str, Tensor]:
        """An image of zeros."""
        return {"pixel_values": torch.zeros(1, *self.inputs.shape)}

    def _read(self, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], int]:
        inputs: dict[str, Tensor] = self.inputs.tensors([sample.image for sample in samples])
        return inputs, 1

    def losses(self, model: nn.Module, batch: Any, *, aim: Aim, dtype: torch.dtype) -> Distilled:
        """As of texts.

        Raises:
            UsageError: the norms of the student cannot be had of a pass of one image.
        """
        try:
            return super(ImagePasses, self).losses(model, batch, aim=aim, dtype=dtype)
        except ValueError as error:
            if _TOO_FEW not in str(error):
                raise
            raise UsageError(
                "train.tokens_per_step: a pass of one image leaves the student's batch norms a single "
                "number to normalise by. Use steps and passes (train.tokens_per_pass) of more images, "
                "and so many in all that none is left for the last step."
            ) from error


def training_passes(
    model: nn.Module, job: Job, *, teacher_dir: Path, lengths: Sequence[int], dtype: torch.dtype
) -> ImagePasses:
    """Images share passes."""
    per_pass = job.train.tokens_per_pass
    return ImagePasses(tokens_per_pass=per_pass, inputs=Images(teacher_dir), vocab_size=1)
