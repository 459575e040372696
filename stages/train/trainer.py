"""One optimizer step and one validation pass: the student, its head inside the loss, gradients, memory.

The gradient of a step is that of sum(loss of each scored token) / (scored tokens of the whole
step), however many forward passes it takes. Weights and optimizer state are float32; the passes
compute in bfloat16 (autocast) where asked.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ...storage.errors import StillroomError
from ..loader.passes import Passes
from ..loader.prefetch import Prefetch
from ..loader.samples import Sample, Step
from ..losses.definition import Distilled
from ..losses.objective import Aim, aim_at
from ..models.device import out_of_memory
from ..recipe.fields import Schedule, value_at
from ..recipe.sections import Loss, Train
from ..workers.clock import Clock
from .optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state
from .shards import Stored

SCHEDULED = ("soft_weight", "hard_weight", "temperature")


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Means per scored token, nats."""

    loss: float
    """soft_weight * divergence + hard_weight * cross-entropy, over all: without a label the second is
    0. And what of the features is matched, weighted."""
    soft: float | None
    """Divergence from the teacher; None where it was not computed."""
    hard: float | None
    """Cross-entropy, over the texts that have a label; None where none has."""
    features: dict[str, float] = field(default_factory=dict)
    """Of each part that is matched, not weighted: its mean over the terms that it has."""

    def parts(self) -> dict[str, Any]:
        """By name; the features where there are some."""
        found: dict[str, Any] = {"loss": self.loss, "soft": self.soft, "hard": self.hard}
        return found | ({"features": self.features} if self.features else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What an optimizer step did."""

    losses: Losses
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    scheduled: dict[str, float]
    """The loss's settings that follow a schedule, as they were at this step."""
    positions: int
    """Computed, padding included."""


class Trainer:
    """A student under training."""

    def __init__(
        self,
        model: nn.Module,
        *,
        packing: Passes,
        loss: Loss,
        train: Train,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`model` is on its device already, in float32; `dtype` is what the passes compute in."""
        self.model = model
        self._matching = packing.matching
        # The maps train as the student does; what the student was without them, it is with them.
        self._trained = model if self._matching is None else nn.ModuleList([model, self._matching])
        self.optimizer = make_optimizer(self._trained, train)
        self._device = next(model.parameters()).device
        self._packing, self._loss, self._train, self._dtype = packing, loss, train, dtype

    @property
    def never_alone(self) -> bool:
        """Whether a step needs two samples at least."""
        return self._packing.never_alone

    @property
    def tokens_per_pass(self) -> int:
        """Positions of a forward pass: the setting, or less once memory ran out."""
        return self._packing.tokens_per_pass

    def passes(self, step: Step, *, done: float) -> Iterator[Any]:
        """The forward passes of a step that ends at the share `done` of all tokens, on the device."""
        aim = aim_at(self._loss, done)
        temperature = aim.objective.temperature if aim.objective else None
        for batch in self._packing.at(done).batches(step.samples, temperature):
            yield batch.to(self._device)

    def step(
        self,
        step: Step,
        *,
        done: float,
        passes: Callable[[], Iterable[Any]] | None = None,
        between_passes: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Take one optimizer step; nothing has changed if it raises.

        Args:
            step: Its samples.
            done: Share of all tokens at the end of this step; decides the learning rate and what is
                scheduled.
            passes: The step's `passes`, made ahead; called again where memory runs out. None: they
                are made here.
            between_passes: Called before each forward pass; may raise to stop.

        Raises:
            StillroomError: the loss or its gradient is not finite, or one sample alone does not fit
                in memory.
        """
        self.model.train()
        positions = 0

        def passes_now() -> Iterator[Any]:
            nonlocal positions
            positions = 0
            for batch in passes() if passes else self.passes(step, done=done):
                between_passes()
                positions += batch.positions
                yield batch

        losses = self._gradients(step, self._aim(done), passes_now)
        trained = [p for p in self._trained.parameters() if p.requires_grad]
        norm = float(nn.utils.clip_grad_norm_(trained, self._train.clip_norm))
        if not (math.isfinite(losses.loss) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise StillroomError(
                f"train: at step {step.after.step} the loss is {losses.loss} and its gradient's "
                f"norm {norm}, expected finite numbers. Nothing was changed by this step, and the "
                "last checkpoint is kept. Lower train.learning_rate or raise "
                "train.warmup_fraction, and run again."
            )
        rate = learning_rate(done, self._train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(
            losses=losses,
            learning_rate=rate,
            grad_norm=norm,
            scheduled=self._scheduled(done),
            positions=positions,
        )

    def _scheduled(self, done: float) -> dict[str, float]:
        """The loss's settings that follow a schedule, by name."""
        settings = {name: getattr(self._loss, name) for name in SCHEDULED}
        return {name: value_at(v, done) for name, v in settings.items() if isinstance(v, Schedule)}

    def validate(
        self,
        steps: Iterable[Step],
        *,
        between_passes: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> Losses:
        """Mean losses over all scored tokens of some steps; weights and gradients stay as they are.

        What is scheduled has its value at the end of the training, so that validations compare with
        one another.

        Raises:
            StillroomError: one sample alone does not fit in memory.
        """
        self.model.eval()
        aim = self._aim(1.0)
        sums, scored, counts = self._zeros(), 0, self._counts([])
        with torch.no_grad():
            with Prefetch(steps, partial(self.passes, done=1.0), clock=clock) as feed:

                def passes_now() -> Iterator[Any]:
                    for batch in feed.passes():
                        between_passes()
                        yield batch

                for step in feed:
                    scored += step.scored_tokens
                    counts = counts + self._counts(step.samples)
                    sums += self._summed(step, aim, passes_now)
        return self._means(sums, scored, counts, aim=aim)

    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters that train; of sharded ones this rank's shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what a pass without a gradient gathered may lie there yet
        return {name: p.detach() for name, p in self._parameters().items() if p.requires_grad}

    def averages(self) -> dict[str, torch.Tensor]:
        """The buffers, such as the running means of batch norms: they change as weights do, without a gradient."""
        return _buffers(self.model)

    def load_weights(self, stored: Stored) -> None:
        """Give the student the weights and averages of a checkpoint; all ranks call it."""
        stored.read(self._of_student(stored))

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors to go on from, by name; the names are the same however the student is sharded."""
        maps = {} if self._matching is None else self._matching.state_dict()
        return {
            **_under("weights", self.weights()),
            **_under("averages", self.averages()),
            **_under("maps", maps),
            **_under("optimizer", optimizer_state(self.optimizer, self._trained_by_name())),
        }

    def load_state(self, stored: Stored) -> None:
        """Go on from a checkpoint of `state`; all ranks call it."""
        maps = {} if self._matching is None else self._matching.state_dict()
        stored.read(self._of_student(stored) | _under("maps", maps))
        load_optimizer_state(self.optimizer, self._trained_by_name(), stored)

    def _of_student(self, stored: Stored) -> dict[str, torch.Tensor]:
        """Weights and averages; checkpoints of before have no averages."""
        averages = self.averages() if stored.names("averages/") else {}
        return _under("weights", self.weights()) | _under("averages", averages)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def _trained_by_name(self) -> dict[str, nn.Parameter]:
        """What the optimizer has, of the student and of the maps."""
        maps = {} if self._matching is None else dict(self._matching.named_parameters())
        named = _under("weights", self._parameters()) | _under("maps", maps)
        return {name: p for name, p in named.items() if p.requires_grad}

    def _gradients(self, step: Step, aim: Aim, passes: Callable[[], Iterable[Any]]) -> Losses:
        """Accumulate the step's gradients."""
        scored = max(step.scored_tokens, 1)
        counts = self._counts(step.samples)
        shared = replace(
            aim,
            soft_weight=aim.soft_weight / scored,
            hard_weight=aim.hard_weight / scored,
            features=tuple(np.array(aim.features) / np.maximum(counts, 1)),
        )
        sums = self._summed(step, shared, passes)
        return self._means(sums, step.scored_tokens, counts, aim=aim)

    def _aim(self, done: float) -> Aim:
        """What is minimised at a point of the training, with a weight for each part that is matched."""
        aim = aim_at(self._loss, done)
        if self._matching is None:
            return aim
        return replace(aim, features=self._matching.weights(aim.features))

    def _counts(self, samples: Sequence[Sample]) -> np.ndarray:
        """[P] terms of each part that is matched."""
        return np.array(self._packing.counts(samples), np.int64)

    def _zeros(self) -> torch.Tensor:
        """[3 + P] float64, as `_sums` has them."""
        parts = 0 if self._matching is None else len(self._matching.parts)
        return torch.zeros(3 + parts, dtype=torch.float64, device=self._device)

    def _means(self, sums: torch.Tensor, scored: int, counts: np.ndarray, *, aim: Aim) -> Losses:
        found = _means(sums[:3], scored, aim)
        if self._matching is None:
            return found
        means = (sums[3:].cpu().numpy() / np.maximum(counts, 1)).tolist()
        weighted = zip(aim.features, means, strict=True)
        # One that weighs nothing is left out, as above.
        total = sum((weight * mean for weight, mean in weighted if weight), found.loss)
        named = dict(zip(self._matching.names, means, strict=True))
        return replace(found, loss=total, features=named)

    def _summed(self, step: Step, aim: Aim, passes: Callable[[], Iterable[Any]]) -> torch.Tensor:
        """`_sums` of a step, gradients accumulated where they are recorded.

        Out of memory is answered by smaller passes, from the start of the step.
        """
        before = {name: average.clone() for name, average in self.averages().items()}
        while True:
            # Dropout is a function of the step's number, so a resumed run draws what an undisturbed
            # one would.
            torch.manual_seed(step.after.step)
            try:
                sums = self._zeros()
                for batch in passes():
                    found = self._pass(batch, aim)
                    if torch.is_grad_enabled():
                        found.total.backward()
                    sums += _sums(found)
                return sums
            except torch.OutOfMemoryError as error:
                message = str(error)
            except BaseException:
                self.optimizer.zero_grad()
                self._put_back(before)
                raise
            # Only here, outside the handler, are the tensors of the failed pass free.
            self._put_back(before)
            self._shrink(step, message)

    def _put_back(self, before: dict[str, torch.Tensor]) -> None:
        for name, average in self.averages().items():
            average.copy_(before[name])

    def _shrink(self, step: Step, message: str) -> None:
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        tokens = self._packing.tokens_per_pass
        least = step.longest * (3 if self._packing.never_alone else 1)  # as `refuse_alone` has it
        if tokens <= least:
            raise out_of_memory(step.longest, message, group=self._packing.group)
        self._packing = replace(self._packing, tokens_per_pass=max(tokens // 2, least))

    def _pass(self, batch: Any, aim: Aim) -> Distilled:
        return self._packing.losses(self.model, batch, aim=aim, dtype=self._dtype)


def _under(group: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """By the names that they have in a checkpoint."""
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are saved with a model, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _means(sums: torch.Tensor, scored: int, aim: Aim) -> Losses:
    soft, hard, labelled = sums.tolist()
    scored = max(scored, 1)
    parts = ((aim.soft_weight, soft / scored), (aim.hard_weight, hard / scored))
    # One that weighs nothing may be infinite: left out, as 0 * inf is no number.
    total = sum((weight * mean for weight, mean in parts if weight), 0.0)
    return Losses(
        loss=total,
        soft=soft / scored if aim.objective else None,
        hard=hard / labelled if labelled else None,
    )


def _sums(found: Distilled) -> torch.Tensor:
    """[3 + P] float64 sums of soft and hard, how many have a hard one, and of each part that is matched."""
    hard = found.hard.double().sum()
    soft = torch.zeros_like(hard) if found.soft is None else found.soft.double().sum()
    sums = torch.stack([soft, hard, torch.full_like(hard, len(found.hard))])
    return sums if found.features is None else torch.cat([sums, found.features.double()])
