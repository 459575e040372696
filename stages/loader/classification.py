"""Forward passes over texts that are classified.

It says which texts go together, and what their loss over classes is.
"""

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
from ..models.attention.longest import Company
from ..models.classification import Inputs, class_company, class_logits
from ..models.fit.classes import NO_LABEL
from ..models.inputs.reads import check_ids
from ..targets.batch import MoreTargets, TargetBatch, weighed
from ..targets.features.batch import FeatureTargets
from ..targets.features.shown import showing
from ..workers.job import Job
from .norms import fails_alone, refuse_alone
from .passes import Passes, whole_groups
from .samples import Sample


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassBatch:
    """One forward pass: B texts and what they are asked for."""

    inputs: dict[str, Tensor]
    """What the model takes, each [B, T]."""
    targets: TargetBatch
    """N targets over C classes, one a text or more; a label of `NO_LABEL` is none."""
    more: MoreTargets | None = None
    """What further teachers say of some of these targets; None: nobody says more."""
    said_at: Tensor | None = None
    """[N] int64 indices into the flattened [B * T] of the positions that say the targets. None:
    each text says one."""
    features: FeatureTargets | None = None
    """The teacher's features of the texts; None: nothing is matched."""

    @property
    def positions(self) -> int:
        """Positions that are computed, padding included; of images, how many there are."""
        ids = self.inputs.get("input_ids")
        return len(self.targets.labels) if ids is None else ids.numel()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        beside = (
            part.nbytes for part in (self.more, self.said_at, self.features) if part is not None
        )
        return sum(t.nbytes for t in self.inputs.values()) + self.targets.nbytes + sum(beside)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        features = None if self.features is None else self.features.to(device)
        more = None if self.more is None else self.more.to(device)
        places = None if self.said_at is None else self.said_at.to(device)
        return replace(
            self,
            inputs=inputs,
            targets=self.targets.to(device),
            more=more,
            said_at=places,
            features=features,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassPasses(Passes):
    """Passes over labelled texts: those of like length together, for little padding."""

    inputs: Any
    """`Inputs`, or what a task that reads no text has in its place."""

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
        parts: list[list[Sample]] = [[]]
        for sample in sorted(samples, key=len, reverse=True):
            part = parts[-1]
            if part and (self.alone or (len(part) + 1) * len(part[0]) > self.tokens_per_pass):
                parts.append([])
            parts[-1].append(sample)
        if self.never_alone and len(parts[-1]) == 1 and len(parts) > 1:
            parts[-1].insert(0, parts[-2].pop())  # as short as the one that is left, or nearly
        for part in parts:
            yield self._batch(part, temperature)

    def _fits(self, samples: Sequence[Sample]) -> bool:
        """Whether a pass over these texts, padded, has no more than `tokens_per_pass`."""
        return len(samples) * max(map(len, samples)) <= self.tokens_per_pass

    def _batch(self, samples: Sequence[Sample], temperature: float | None) -> ClassBatch:
        labels = [torch.from_numpy(self._labels(sample)) for sample in samples]
        targets, more = TargetBatch(labels=torch.cat(labels)), None
        if temperature is not None and all(sample.targets is not None for sample in samples):
            said = [self.asked_of(sample) for sample in samples]
            targets = _soft([own for own, *_ in said], targets.labels, temperature)
            more = _of_others([others for _, *others in said], labels, temperature)
        inputs, width = self._read(samples)
        starts = [row * width for row in range(len(samples))]
        return ClassBatch(
            inputs=inputs,
            targets=targets,
            more=more,
            said_at=self._said_at(samples, starts),
            features=self.targets_of(samples, starts),
        )

    def _read(self, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], int]:
        """What the model takes of these texts, and the positions of each, padding included."""
        highest = max(int(sample.token_ids.max()) for sample in samples)
        check_ids(highest, self.vocab_size, "a text has")
        inputs: dict[str, Tensor] = self.inputs.tensors([sample.token_ids for sample in samples])
        return inputs, inputs["input_ids"].shape[1]

    def _labels(self, sample: Sample) -> np.ndarray:
        """[N] int64 gold classes of a text's targets, or `NO_LABEL`."""
        return np.array([NO_LABEL if sample.label is None else sample.label], np.int64)

    def _said_at(self, samples: Sequence[Sample], starts: Sequence[int]) -> Tensor | None:
        """`ClassBatch.said_at` of texts that begin at these indices."""

    def positions(self, sample: Sample) -> np.ndarray:
        """All."""
        return np.arange(len(sample))

    def losses(
        self, model: nn.Module, batch: ClassBatch, *, aim: Aim, dtype: torch.dtype
    ) -> Distilled:
        """Summed loss of the targets, weighted as `aim` says.

        A target without a gold label has no cross-entropy.
        """
        labels = batch.targets.labels
        half = dtype == torch.bfloat16
        with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=half):
            with showing(model, self.needs) as shown:
                logits = class_logits(model, batch.inputs)
        if batch.said_at is not None:
            logits = logits.flatten(0, 1)[batch.said_at]
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


_Asked = tuple[SoftTargets, np.ndarray | None]
"""What a teacher says of a text, and its weight at each target; None: 1."""


def _of_others(
    said: Sequence[Sequence[_Asked]], labels: Sequence[Tensor], temperature: float
) -> MoreTargets | None:
    """What further teachers say of each text; None: nobody says more."""
    starts = np.cumsum([0, *map(len, labels)]).tolist()
    texts = [text for text, others in enumerate(said) for _ in others]
    if not texts:
        return None
    asked = [one for others in said for one in others]
    at = torch.cat([torch.arange(starts[text], starts[text + 1]) for text in texts])
    return MoreTargets(at=at, targets=_soft(asked, torch.cat(list(labels))[at], temperature))


def _soft(said: Sequence[_Asked], labels: Tensor, temperature: float) -> TargetBatch:
    """Targets of texts, one after the other; with the weight of each, of several teachers."""
    stored = torch.from_numpy(np.concatenate([targets.logprobs for targets, _ in said]))
    # All classes are stored, so any temperature is exact: softmax(log t / T) = softmax(z / T).
    found = TargetBatch(
        labels=labels,
        logprobs=(stored / temperature).log_softmax(-1),
        tail_logprob=torch.full((len(stored),), -torch.inf),
    )
    weights = [weight for _, weight in said if weight is not None]
    return weighed(found, np.concatenate(weights) if weights else None)


def training_passes(
    model: nn.Module, job: Job, *, teacher_dir: Path, lengths: Sequence[int], dtype: torch.dtype
) -> ClassPasses:
    """Texts share passes, unless the model says of one something else beside others."""
    inputs = Inputs.of(model, teacher_dir)
    company = class_company(model, inputs)
    found = passes_of(ClassPasses, model, job, inputs=inputs, company=company, lengths=lengths)
    if not fails_alone(model, inputs.tensors([np.zeros(1, np.int64)])):
        return found
    per_pass = 0 if found.alone else found.tokens_per_pass
    refuse_alone(job.train, longest=max(lengths), per_pass=per_pass)
    return replace(found, never_alone=True)


def passes_of(
    kind: type[ClassPasses],
    model: nn.Module,
    job: Job,
    *,
    inputs: Inputs,
    company: Company,
    lengths: Sequence[int],
) -> ClassPasses:
    """Passes of some kind over texts of these lengths.

    `company` has the say of which texts share a pass.
    """
    embeddings: Any = model
    alone = not company.may_share(lengths)
    if alone:
        job.progress.say(f"each text gets a pass of its own in this student: {company.apart}")
    return kind(
        tokens_per_pass=job.train.tokens_per_pass,
        alone=alone,
        inputs=inputs,
        vocab_size=embeddings.get_input_embeddings().num_embeddings,
    )
