"""What a task makes of the samples of a step: forward passes, and the loss of each.

The module that bears a task's name has its passes of a training: `training_passes(...)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.errors import UsageError
from ...storage.tables.soft_targets import SoftTargets
from ..losses.definition import Distilled
from ..losses.features.matching import Matching
from ..losses.features.part import StepSize
from ..losses.objective import Aim
from ..recipe.tasks import module_of
from ..targets.features.batch import FeatureTargets
from ..targets.features.shown import Need, Shown
from ..targets.teaching import Teaching
from ..workers.job import Job
from .samples import Sample


class PassBatch(Protocol):
    """One forward pass: what the model takes, and what it is asked for."""

    @property
    def positions(self) -> int:
        """Positions that are computed, padding included."""

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""

    def to(self, device: torch.device) -> Self:
        """The same on another device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes(ABC):
    """How the samples of a step become forward passes."""

    tokens_per_pass: int
    """Positions of a pass at most, padding included; the tokens of the longest sample where that
    has more."""
    vocab_size: int
    """V of the student."""
    alone: bool = False
    """One sample a pass, for a model whose numbers depend on the longest sample of a pass."""
    never_alone: bool = False
    """Two samples a pass at least, for a student whose batch norms cannot be had of one."""
    matching: Matching | None = None
    """What of the teacher's features is matched; None: nothing."""
    group: int | None = None
    """Samples of a group, of losses between samples: a pass holds whole groups, at least one; None:
    there are no groups."""
    teaching: Teaching | None = None
    """How several teachers are weighed; None: there is one."""

    def __post_init__(self) -> None:
        """Refuse groups where each sample has a pass of its own.

        Raises:
            UsageError: it does.
        """
        if self.group is not None and self.alone:
            raise UsageError(
                f"loss.features: losses between samples need a group of {self.group} in one pass, "
                "and each sample gets a pass of its own in this student: its numbers depend on the "
                "longest sample of a pass. Leave these losses out, or use another student."
            )

    @abstractmethod
    def positions(self, sample: Sample) -> np.ndarray:
        """Which tokens of a sample the losses of single positions compare, ascending."""

    def counts(self, samples: Sequence[Sample]) -> list[int]:
        """What each part of what is matched is divided by, over a step of these samples."""
        if self.matching is None:
            return []
        size = StepSize(
            compared=sum(len(self.positions(sample)) for sample in samples),
            tokens=sum(map(len, samples)),
            samples=len(samples),
        )
        return self.matching.counts(size)

    def targets_of(self, samples: Sequence[Sample], starts: Sequence[int]) -> FeatureTargets | None:
        """The teacher's features of the samples of a pass, which begin at `starts`.

        It is None where nothing is matched.
        """
        if self.matching is None:
            return None
        return FeatureTargets.of(
            [sample.states() for sample in samples],
            lengths=[len(sample) for sample in samples],
            starts=starts,
            compared=[self.positions(sample) for sample in samples],
            token_ids=[sample.token_ids for sample in samples],
        )

    def at(self, done: float) -> Self:
        """The passes of a step that ends at this share of all tokens.

        Weights of teachers may follow a schedule.
        """
        return self if self.teaching is None else replace(self, teaching=self.teaching.at(done))

    def asked_of(self, sample: Sample) -> list[tuple[SoftTargets, np.ndarray | None]]:
        """What a sample's teachers say, and the weight of each at each position; None: 1."""
        if self.teaching is None:
            return [(targets, None) for _, targets in sample.of_teachers()[:1]]
        return self.teaching.of_text(sample.of_teachers())

    @property
    def example(self) -> "dict[str, Tensor] | None":
        """What the model takes of one sample, where samples are all of one size.

        It is None where they are texts.
        """
        return None

    @property
    def needs(self) -> list[Need]:
        """What the student is to show for the loss."""
        return [] if self.matching is None else self.matching.needs

    def with_features(
        self, found: Distilled, shown: Shown, targets: FeatureTargets | None, *, aim: Aim
    ) -> Distilled:
        """The loss of a pass, with what of the features is matched.

        `aim` has a weight for each part.
        """
        if self.matching is None or targets is None:
            return found
        sums = self.matching(shown, targets)
        total = found.total + sums.new_tensor(aim.features) @ sums
        return replace(found, total=total, features=sums.detach())

    @abstractmethod
    def batches(
        self, samples: Sequence[Sample], temperature: float | None = 1.0
    ) -> Iterator[PassBatch]:
        """The forward passes of a step, soft targets at `temperature`; None leaves them out.

        Raises:
            UsageError: the student cannot read a sample, or its targets cannot be had at this
                temperature.
        """

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any, *, aim: Aim, dtype: torch.dtype) -> Distilled:
        """Summed loss of the targets of one pass, computed in `dtype`, weighted as `aim` says."""

    @abstractmethod
    def head_weight(self, model: nn.Module) -> Tensor | None:
        """The output layer's weight [V, D] where it runs at scored positions alone.

        It is None where the body has it all.
        """


def whole_groups(
    samples: Sequence[Sample], group: int, *, fits: Callable[[Sequence[Sample]], bool]
) -> Iterator[list[Sample]]:
    """The samples of each pass, in their order: whole groups, as many as fit, at least one.

    Which samples are a group follows from the step alone: `group` consecutive ones each, the last
    one what is left.

    Args:
        samples: The step's.
        group: Samples of a group.
        fits: Whether some samples may share a pass.
    """
    held: list[Sample] = []
    for start in range(0, len(samples), group):
        following = samples[start : start + group]
        if held and not fits([*held, *following]):
            yield held
            held = []
        held += following
    yield held


def training_passes(
    model: nn.Module, job: Job, *, teacher_dir: Path, lengths: Sequence[int], dtype: torch.dtype
) -> Passes:
    """Those of the job's task.

    Args:
        model: The student, on its device.
        job: Its recipe, and where to say what this student cannot do.
        teacher_dir: With the tokenizer that made the token ids.
        lengths: Tokens of the shortest and of the longest sample.
        dtype: What passes compute in.

    Raises:
        UsageError: the student is none that this task can train.
    """
    room = module_of(job.recipe.run.task, __package__)
    found: Passes = room.training_passes(
        model, job, teacher_dir=teacher_dir, lengths=lengths, dtype=dtype
    )
    return found
