"""One optimizer step and one validation pass.

Here are the student, its head inside the loss, gradients and memory. The gradient of a step is that
of sum(loss of each scored token) / (scored tokens of the whole step), however many forward passes
it takes, and however many ranks share it. Weights and optimizer state are float32; the passes
compute in bfloat16 (autocast) where asked.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ...storage.errors import StillroomError
from ..loader.parts import part_of
from ..loader.passes import Passes
from ..loader.prefetch import Prefetch
from ..loader.samples import Sample, Step
from ..losses.definition import Distilled
from ..losses.objective import Aim, aim_at
from ..models.device import out_of_memory
from ..recipe.fields import Schedule, value_at
from ..recipe.sections import Loss, Train
from ..workers.clock import Clock
from ..workers.ranks import Ranks
from .optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state
from .shards import Stored
from .together.dealt import Dealt
from .together.gradients import clipped, make_alike, refuse_changed, sum_gradients
from .together.means import Losses, StepResult, means_of, sums_of
from .together.root import Root, loss_of, reshard, synchronise
from .together.rounds import rounds
from .together.smaller import OutOfMemory

SCHEDULED = ("soft_weight", "hard_weight", "temperature")


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
        ranks: Ranks | None = None,
        root: Root | None = None,
    ) -> None:
        """Begin with no step done.

        Args:
            model: On its device already, in float32.
            packing: How samples become passes.
            loss: What is minimised.
            train: How.
            dtype: What the passes compute in.
            ranks: Who shares each step; None: nobody does.
            root: Around the model where it is sharded.
        """
        self.model, self._ranks, self._root = model, ranks or Ranks(), root
        self._matching = packing.matching
        # The maps train as the student does; what the student was without them, it is with them.
        self._trained = model if self._matching is None else nn.ModuleList([model, self._matching])
        make_alike(self._trained, self._ranks)
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
        """This rank's passes, on the device, of a step that ends at the share `done` of tokens."""
        part = part_of(step.samples, self._ranks, group=self._packing.group)
        yield from self._passes(part, done=done)

    def _passes(self, samples: Sequence[Sample], *, done: float) -> Iterator[Any]:
        aim = aim_at(self._loss, done)
        temperature = aim.objective.temperature if aim.objective else None
        if samples:
            for batch in self._packing.at(done).batches(samples, temperature):
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
            between_passes: Called before each forward pass, where this rank is alone; may raise to
                stop.

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
                if self._ranks.count == 1:
                    between_passes()
                positions += batch.positions
                yield batch

        losses = self._gradients(step, self._aim(done), passes_now)
        norm = clipped(list(self._trained.parameters()), self._train.clip_norm)
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
            positions=int(self._ranks.sum(torch.tensor(positions))),
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
        aim, ranks = self._aim(1.0), self._ranks
        dealt = Dealt(steps, ranks, counts=self._counts)

        def passes_of(step: Step) -> Iterator[Any]:
            return self._passes(step.samples, done=1.0)

        with torch.no_grad(), Prefetch(dealt.mine(), passes_of, clock=clock) as feed:
            judge = self._judged if self._root is None else self._judged_sharded
            sums = ranks.sum(judge(feed, aim, dealt, between_passes))
        # Steps of a validation are as large as passes: all ranks have to agree on that.
        tokens = min(ranks.all(self.tokens_per_pass))
        self._packing = replace(self._packing, tokens_per_pass=tokens)
        return self._means(sums, dealt.scored, dealt.terms, aim=aim)

    def _judged(
        self, feed: Prefetch, aim: Aim, dealt: Dealt, between: Callable[[], None]
    ) -> torch.Tensor:
        """`sums_of` of this rank's steps; the ranks call `between` equally often."""
        alone, sums, taken = self._ranks.count == 1, self._zeros(), 0

        def passes_now() -> Iterator[Any]:
            for batch in feed.passes():
                if alone:
                    between()
                yield batch

        for step in feed:
            if not alone:
                between()
            sums += self._summed(step, aim, passes_now)
            taken += 1
        if not alone and taken < -(-dealt.number // self._ranks.count):
            between()
        return sums

    def _judged_sharded(
        self, feed: Prefetch, aim: Aim, dealt: Dealt, between: Callable[[], None]
    ) -> torch.Tensor:
        """`_judged` where each pass is one of all ranks."""
        passes = (batch for _ in feed for batch in feed.passes())
        try:
            return self._passed(passes, aim, lambda: dealt.spare, between)
        except torch.OutOfMemoryError as error:
            message = str(error)
        finally:
            reshard(self._root)
        self._shrink(dealt.longest, message)
        raise AssertionError("a rank of a sharded student dies of it")

    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters that train; of sharded ones this rank's shards."""
        reshard(self._root)  # what a pass without a gradient gathered may lie there yet
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def averages(self) -> dict[str, torch.Tensor]:
        """The buffers, such as batch norms' running means: they change without a gradient."""
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

    @property
    def sharded(self) -> bool:
        """Whether each rank has a part of every weight."""
        return self._root is not None

    def load_state(self, stored: Stored) -> None:
        """Go on from a checkpoint of `state`; all ranks call it."""
        maps = {} if self._matching is None else self._matching.state_dict()
        stored.read(self._of_student(stored) | _under("maps", maps))
        load_optimizer_state(self.optimizer, self._trained_by_name(), stored)

    def _of_student(self, stored: Stored) -> dict[str, torch.Tensor]:
        """Weights and averages; checkpoints of before have no averages."""
        averages = self.averages() if stored.names("averages/") else {}
        return _under("weights", self.weights()) | _under("averages", averages)

    def _trained_by_name(self) -> dict[str, nn.Parameter]:
        """What the optimizer has, of the student and of the maps."""
        maps = {} if self._matching is None else dict(self._matching.named_parameters())
        named = _under("weights", dict(self.model.named_parameters())) | _under("maps", maps)
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
        sums = self._ranks.sum(self._summed(step, shared, passes))
        sum_gradients(self._trained.parameters(), self._ranks)
        return self._means(sums, step.scored_tokens, counts, aim=aim)

    def _aim(self, done: float) -> Aim:
        """What is minimised at a point of the training, with a weight for each matched part."""
        aim = aim_at(self._loss, done)
        if self._matching is None:
            return aim
        return replace(aim, features=self._matching.weights(aim.features))

    def _counts(self, samples: Sequence[Sample]) -> np.ndarray:
        """[P] terms of each part that is matched."""
        return np.array(self._packing.counts(samples), np.int64)

    def _zeros(self) -> torch.Tensor:
        """[3 + P] float64, as `sums_of` has them."""
        parts = 0 if self._matching is None else len(self._matching.parts)
        return torch.zeros(3 + parts, dtype=torch.float64, device=self._device)

    def _means(self, sums: torch.Tensor, scored: int, counts: np.ndarray, *, aim: Aim) -> Losses:
        found = means_of(sums[:3], scored, aim)
        if self._matching is None:
            return found
        means = (sums[3:].cpu().numpy() / np.maximum(counts, 1)).tolist()
        weighted = zip(aim.features, means, strict=True)
        # One that weighs nothing is left out, as above.
        total = sum((weight * mean for weight, mean in weighted if weight), found.loss)
        named = dict(zip(self._matching.names, means, strict=True))
        return replace(found, loss=total, features=named)

    def _summed(self, step: Step, aim: Aim, passes: Callable[[], Iterable[Any]]) -> torch.Tensor:
        """`sums_of` of this rank's passes of a step, gradients accumulated where they are recorded.

        Out of memory is answered by smaller passes, from the start of the step: by all ranks, where
        one has it.
        """
        before, ranks = {name: a.clone() for name, a in self.averages().items()}, self._ranks
        while True:
            # Dropout is a function of the step's number, so a resumed run draws what an undisturbed
            # one would; ranks draw otherwise than one another.
            torch.manual_seed(step.after.step * ranks.count + ranks.rank)
            message = ""
            try:
                sums = self._passed(passes(), aim, lambda: min(step.samples, key=len))
            except torch.OutOfMemoryError as error:
                message = str(error)
            except BaseException:
                self.optimizer.zero_grad()
                self._put_back(before)
                raise
            # A step of a training is all ranks' at once, one of a validation is not.
            shared = self._root is None and torch.is_grad_enabled()
            if not (ranks.any(bool(message)) if shared else message):
                if torch.is_grad_enabled():
                    refuse_changed(before, self.averages(), ranks)
                return sums
            # Only here, outside the handler, are the tensors of the failed pass free.
            self._put_back(before)
            self._shrink(step.longest, message or "another rank")

    def _put_back(self, before: dict[str, torch.Tensor]) -> None:
        for name, average in self.averages().items():
            average.copy_(before[name])

    def _passed(
        self,
        passes: Iterable[Any],
        aim: Aim,
        spare: Callable[[], Sample],
        between: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """`sums_of` of passes; a sharded student's rank without one takes a `spare` sample."""
        sums, root = self._zeros(), self._root
        nothing = replace(
            aim, soft_weight=0.0, hard_weight=0.0, features=(0.0,) * len(aim.features)
        )
        in_step = rounds(passes, self._ranks) if root else ((batch, True) for batch in passes)
        for batch, last in in_step:
            between()
            if root is not None:
                synchronise(root, last)
            if batch is not None:
                found = self._pass(batch, aim)
                sums += sums_of(found)
            else:
                (batch,) = self._packing.batches([spare()], None)
                found = self._pass(batch.to(self._device), nothing)
            if torch.is_grad_enabled():
                found.total.backward()
        return sums

    def _shrink(self, longest: int, message: str) -> None:
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        least = longest * (3 if self._packing.never_alone else 1)  # as `refuse_alone` has it
        if self.tokens_per_pass <= least:
            raise out_of_memory(longest, message, group=self._packing.group)
        tokens = max(self.tokens_per_pass // 2, least)
        if self._root is not None:  # the others wait for this rank, inside of a pass
            raise OutOfMemory(tokens, message, self._ranks)
        self._packing = replace(self._packing, tokens_per_pass=tokens)

    def _pass(self, batch: Any, aim: Aim) -> Distilled:
        def work(model: nn.Module) -> Distilled:
            return self._packing.losses(model, batch, aim=aim, dtype=self._dtype)

        return loss_of(self._root, self.model, work)


def _under(group: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """By the names that they have in a checkpoint."""
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are saved with a model, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
