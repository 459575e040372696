"""Forward passes over images that are classified.

They are those of classification, with an image in place of each text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..models.image_classification import Images
from ..workers.job import Job
from .classification import ClassBatch, ClassPasses
from .norms import fails_alone, refuse_alone
from .samples import Sample

IMAGES_PER_PASS = 256
"""Where the recipe does not say it, whose default counts tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePasses(ClassPasses):
    """Passes over images, which have one size; `tokens_per_pass` counts them."""

    def batches(
        self, samples: Sequence[Sample], temperature: float | None = 1.0
    ) -> Iterator[ClassBatch]:
        """The forward passes of a step, as few as hold it.

        They are as alike in size as can be, for norms are of a pass.
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


def training_passes(
    model: nn.Module, job: Job, *, teacher_dir: Path, lengths: Sequence[int], dtype: torch.dtype
) -> ImagePasses:
    """Images share passes."""
    train, per_pass = job.train, IMAGES_PER_PASS
    if "tokens_per_pass" in train.model_fields_set:
        per_pass = train.tokens_per_pass
    found = ImagePasses(tokens_per_pass=per_pass, inputs=Images(teacher_dir), vocab_size=1)
    if not fails_alone(model, found.example):
        return found
    refuse_alone(train, longest=1, per_pass=per_pass)
    return replace(found, never_alone=True)
