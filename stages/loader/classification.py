"""Forward passes over labelled texts: which texts together, and their loss over classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.tables.soft_targets import SoftTargets
from ..losses.definition import Distilled, logits_distillation
from ..losses.objective import Aim
from ..models.classes import NO_LABEL
from ..models.classification import Inputs, class_company, class_logits
from ..models.reads import check_ids
from ..targets.batch import MoreTargets, TargetBatch, weighed
from ..targets.features.batch import FeatureTargets
from ..targets.features.shown import showing
from ..workers.job import Job
from .passes import Passes, whole_groups
from .samples import Sample


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassBatch:
    """One forward pass: B texts and what they are asked for."""

    inputs: dict[str, Tensor]
    """What the model takes, each [B, T]."""
    targets: TargetBatch
    """B targets over C classes; a label of `NO_LABEL` is none."""
    more: MoreTargets | None = None
    """What further teachers say of some of the texts; None: nobody says more."""
    features: FeatureTargets | None = None
    """The teacher's features of the texts; None: nothing is matched."""

    @property
    def positions(self) -> int:
        """Positions that are computed, padding included."""
        return self.inputs["input_ids"].numel()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        beside = (part.nbytes for part in (self.more, self.features) if part is not None)
        return sum(t.nbytes for t in self.inputs.values()) + self.targets.nbytes + sum(beside)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        features = None if self.features is None else self.features.to(device)
        more = None if self.more is None else self.more.to(device)
        targets = self.targets.to(device)
        return replace(self, inputs=inputs, targets=targets, more=more, features=features)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassPasses(Passes):
    """Passes over labelled texts: those of like length together, for little padding."""

    inputs: Inputs

    def batches(
        self, samples: Sequence[Sample], temperature: float | None = 1.0
    ) -> Iterator[ClassBatch]:
        """The forward passes of a step, targets at `temperature`; None leaves them out.

        Raises:
            UsageError: a text has a token that the student does not know.
        """
        if self.group is not None:
            for part in whole_groups(samples, self.group, fits=self._fits):
                yield self._batch(part, temperature)
            return
        group: list[Sample] = []
        for sample in sorted(samples, key=len, reverse=True):
            full = (
                self.alone
                or (len(group) + 1) * len(group[0] if group else sample) > self.tokens_per_pass
            )
            if group and full:
                yield self._batch(group, temperature)
                group = []
            group.append(sample)
        yield self._batch(group, temperature)

    def _fits(self, samples: Sequence[Sample]) -> bool:
        """Whether a pass over these texts, padded, has no more than `tokens_per_pass`."""
        return len(samples) * max(map(len, samples)) <= self.tokens_per_pass

    def _batch(self, samples: Sequence[Sample], temperature: float | None) -> ClassBatch:
        highest = max(int(sample.token_ids.max()) for sample in samples)
        check_ids(highest, self.vocab_size, "a text has")
        labels = [NO_LABEL if sample.label is None else sample.label for sample in samples]
        targets, more = TargetBatch(labels=torch.tensor(labels)), None
        if temperature is not None and all(sample.targets is not None for sample in samples):
            said = [self.asked_of(sample) for sample in samples]
            targets = _soft([own for own, *_ in said], targets.labels, temperature)
            of_others = [(row, one) for row, (_, *rest) in enumerate(said) for one in rest]
            if of_others:
                at = torch.tensor([row for row, _ in of_others])
                asked = [one for _, one in of_others]
                more = MoreTargets(at=at, targets=_soft(asked, targets.labels[at], temperature))
        inputs = self.inputs.tensors([sample.token_ids for sample in samples])
        width = inputs["input_ids"].shape[1]
        features = self.targets_of(samples, [row * width for row in range(len(samples))])
        return ClassBatch(inputs=inputs, targets=targets, more=more, features=features)

    def positions(self, sample: Sample) -> np.ndarray:
        """All."""
        return np.arange(len(sample))

    def losses(
        self, model: nn.Module, batch: ClassBatch, *, aim: Aim, dtype: torch.dtype
    ) -> Distilled:
        """Summed loss of the texts, weighted as `aim` says; one without a gold label has no cross-entropy."""
        labels = batch.targets.labels
        half = dtype == torch.bfloat16
        with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=half):
            with showing(model, self.needs) as shown:
                logits = class_logits(model, batch.inputs)
        # Where there is no label, class 0 stands in, and its cross-entropy is not counted.
        asked = replace(batch.targets, labels=labels.clamp_min(0))
        parts = logits_distillation(logits, asked, objective=aim.objective)
        labelled = labels != NO_LABEL
        found = replace(parts, hard=parts.hard.masked_fill(~labelled, 0.0)).summed(aim)
        if (more := batch.more) is not None:
            others = replace(more.targets, labels=more.targets.labels.clamp_min(0))
            said = logits_distillation(logits[more.at], others, objective=aim.objective)
            found = found.plus(said.summed(replace(aim, hard_weight=0.0)), more.at)
        found = replace(found, hard=found.hard[labelled])
        return self.with_features(found, shown, batch.features, aim=aim)

    def head_weight(self, model: nn.Module) -> None:
        """The body has it all: the head is a small layer over one position a text."""


def _soft(
    said: Sequence[tuple[SoftTargets, np.ndarray | None]], labels: Tensor, temperature: float
) -> TargetBatch:
    """Targets of texts, a row each; with the weight of each, of several teachers."""
    stored = torch.from_numpy(np.concatenate([targets.logprobs for targets, _ in said]))
    # All classes are stored, so any temperature is exact: softmax(log t / T) = softmax(z / T).
    found = TargetBatch(
        labels=labels,
        logprobs=(stored / temperature).log_softmax(-1),
        tail_logprob=torch.full((len(said),), -torch.inf),
    )
    weights = [weight for _, weight in said if weight is not None]
    return weighed(found, np.concatenate(weights) if weights else None)


def training_passes(
    model: nn.Module, job: Job, *, teacher_dir: Path, lengths: Sequence[int], dtype: torch.dtype
) -> ClassPasses:
    """Texts share passes, unless the model says of one something else beside others."""
    embeddings: Any = model
    inputs = Inputs.of(model, teacher_dir)
    company = class_company(model, inputs)
    alone = not company.may_share(lengths)
    if alone:
        job.progress.say(f"each text gets a pass of its own in this student: {company.apart}")
    return ClassPasses(
        tokens_per_pass=job.train.tokens_per_pass,
        alone=alone,
        inputs=inputs,
        vocab_size=embeddings.get_input_embeddings().num_embeddings,
    )
