"""Forward passes over texts whose words are classified.

They are those of classification, with a target at each first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.tables.spans import positions
from ..models.classification import Inputs
from ..models.fit.classes import NO_LABEL
from ..models.token_classification import token_company
from ..workers.job import Job
from .classification import ClassPasses, passes_of
from .samples import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class WordPasses(ClassPasses):
    """Passes over texts with a class for each word."""

    def _labels(self, sample: Sample) -> np.ndarray:
        if sample.labels is None:
            return np.full(sample.scored_tokens, NO_LABEL, np.int64)
        return sample.labels.astype(np.int64)

    def _said_at(self, samples: Sequence[Sample], starts: Sequence[int]) -> Tensor:
        places = [start + positions(s.spans) for s, start in zip(samples, starts, strict=True)]
        return torch.from_numpy(np.concatenate(places))


def training_passes(
    model: nn.Module, job: Job, *, teacher_dir: Path, lengths: Sequence[int], dtype: torch.dtype
) -> ClassPasses:
    """Texts share passes, unless the model says of one something else beside others."""
    inputs = Inputs.of(model, teacher_dir)
    company = token_company(model, inputs)
    return passes_of(WordPasses, model, job, inputs=inputs, company=company, lengths=lengths)
