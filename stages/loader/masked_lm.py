"""Forward passes over masked texts, in training.

Each text is a row, with padding, and has targets where tokens are hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.tables.spans import positions
from ..models.classification import Inputs
from ..models.device import uses_triton
from ..models.head import split_head
from ..models.inputs.reads import check_ids
from ..models.masked_lm import check_masked, masked_company, masked_states
from ..targets.spec import wanted
from ..workers.job import Job
from .packing import Batch, Packing
from .samples import Sample


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskedBatch(Batch):
    """One forward pass of a model that sees ahead: it is told where the padding is."""

    attention_mask: Tensor
    """[B, T] int64, 1 at tokens and 0 in the padding."""
    token_type_ids: Tensor | None = None
    """[B, T] int64 segments; None: the model knows none."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model takes."""
        found = {"input_ids": self.token_ids, "attention_mask": self.attention_mask}
        kinds = self.token_type_ids
        return found if kinds is None else found | {"token_type_ids": kinds}


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedPacking(Packing):
    """Passes over masked texts: texts of like length together, for little padding."""

    padded: Inputs
    """How texts become the student's inputs."""

    def positions(self, sample: Sample) -> np.ndarray:
        """Those where a token is hidden."""
        return positions(sample.spans)

    def _states(self, model: nn.Module, batch: Batch) -> Tensor:
        return masked_states(model, **batch.inputs)

    def _batch(self, rows: Sequence[Sequence[Sample]], temperature: float | None) -> MaskedBatch:
        samples = [sample for row in rows for sample in row]
        made = self.padded.tensors([sample.token_ids for sample in samples])
        token_ids = made["input_ids"]
        check_ids(int(token_ids.max()), self.vocab_size, "the text has")
        texts, width = token_ids.shape
        starts = [row * width for row in range(texts)]
        places = [start + self.positions(s) for s, start in zip(samples, starts, strict=True)]
        hidden = [torch.from_numpy(np.array(s.labels, np.int64)) for s in samples]
        targets, more = self._targets(hidden, samples, temperature)
        return MaskedBatch(
            token_ids=token_ids,
            position_ids=torch.arange(width).repeat(texts, 1),
            attention_mask=made["attention_mask"],
            token_type_ids=made.get("token_type_ids"),
            predicting=torch.from_numpy(np.concatenate(places)),
            targets=targets,
            more=more,
            features=self.targets_of(samples, starts),
        )


def training_passes(
    model: nn.Module, job: Job, *, teacher_dir: Path, lengths: Sequence[int], dtype: torch.dtype
) -> MaskedPacking:
    """Texts share passes, unless the model says of one something else beside others."""
    recipe, train = job.recipe, job.train
    check_masked(model)
    head, inputs = split_head(model), Inputs.of(model, teacher_dir)
    uses_triton(train.kernel, head.weight.device, setting="train.kernel")
    company = masked_company(model, inputs)
    alone = not company.may_share(lengths)
    if alone:
        job.progress.say(f"each text gets a pass of its own in this student: {company.apart}")
    return MaskedPacking(
        tokens_per_pass=train.tokens_per_pass,
        alone=alone,
        shared_rows=False,
        padded=inputs,
        kept=wanted(recipe.score, head.vocab_size) if recipe.score is not None else None,
        unstored_temperature=recipe.loss.unstored_temperature,
        vocab_size=head.vocab_size,
        kernel=train.kernel,
    )
