"""Forward passes over texts that are classified: which texts together, and their loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.errors import UsageError
from ..losses.definition import Distilled, logits_distillation
from ..losses.objective import Aim
from ..models.classes import NO_LABEL
from ..models.classifier import Inputs, class_logits
from ..targets.batch import TargetBatch
from .samples import Sample


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassBatch:
    """One forward pass: B texts and what they are asked for."""

    inputs: dict[str, Tensor]
    """What the model takes, each [B, T]."""
    targets: TargetBatch
    """B targets over C classes; a label of `NO_LABEL` is none."""

    @property
    def positions(self) -> int:
        """Positions that are computed, padding included."""
        return self.inputs["input_ids"].numel()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.inputs.values()) + self.targets.nbytes

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, targets=self.targets.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassPasses:
    """How the texts of a step become forward passes: those of like length together, for little padding."""

    tokens_per_pass: int
    """Positions of a pass, padding included; a longer text is a pass of its own."""
    inputs: Inputs
    vocab_size: int
    """Of the student."""

    def batches(
        self, samples: Sequence[Sample], temperature: float | None = 1.0
    ) -> Iterator[ClassBatch]:
        """The forward passes of a step, targets at `temperature`; None leaves them out.

        Raises:
            UsageError: a text has a token that the student does not know.
        """
        group: list[Sample] = []
        for sample in sorted(samples, key=len, reverse=True):
            if group and (len(group) + 1) * len(group[0]) > self.tokens_per_pass:
                yield self._batch(group, temperature)
                group = []
            group.append(sample)
        yield self._batch(group, temperature)

    def _batch(self, samples: Sequence[Sample], temperature: float | None) -> ClassBatch:
        highest = max(int(sample.token_ids.max()) for sample in samples)
        if highest >= self.vocab_size:
            raise UsageError(
                f"student: its vocabulary has {self.vocab_size} ids, but a text has token "
                f"{highest}. Choose a student with the teacher's tokenizer and at least its "
                "vocabulary."
            )
        labels = torch.tensor(
            [NO_LABEL if sample.label is None else sample.label for sample in samples]
        )
        targets = TargetBatch(labels=labels)
        known = [sample.targets for sample in samples if sample.targets is not None]
        if known and temperature is not None:
            # All of the distribution is there, so any temperature is exact: softmax(log t / T) =
            # softmax(z / T).
            stored = torch.from_numpy(np.concatenate([one.logprobs for one in known]))
            tempered = (stored / temperature).log_softmax(-1)
            nothing = torch.full((len(known),), -torch.inf)
            targets = replace(targets, logprobs=tempered, tail_logprob=nothing)
        return ClassBatch(
            inputs=self.inputs.tensors([sample.token_ids for sample in samples]), targets=targets
        )

    def losses(
        self, model: nn.Module, batch: ClassBatch, *, aim: Aim, dtype: torch.dtype
    ) -> Distilled:
        """Summed loss of the texts, weighted as `aim` says; a text without a gold label has cross-entropy 0."""
        labels = batch.targets.labels
        with torch.autocast(
            labels.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16
        ):
            logits = class_logits(model, batch.inputs)
        asked = replace(batch.targets, labels=labels.clamp_min(0))
        parts = logits_distillation(logits, asked, objective=aim.objective)
        return replace(parts, hard=parts.hard.masked_fill(labels == NO_LABEL, 0.0)).summed(aim)
