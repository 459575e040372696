"""Measuring text that is continued: every scored token of a row, and gradients.

Logits are made a chunk at a time.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.tables.soft_targets import SoftTargets
from ..loader.packing import Packing
from ..losses.objective import aim_at
from ..models.head import hidden_states, split_head
from ..models.inputs.reads import check_ids, check_length
from ..targets.alignment import predicting_positions, scored_tokens
from ..targets.spec import wanted
from ..workers.job import Job
from .gradients import compare_gradients
from .held_out import HeldOut
from .measure import Gradient, MeasureRow, Row
from .metrics import Tally, chunk_tokens, measure
from .views import ArmViews


class Measuring:
    """The measures of tokens; see `measure.Measuring`."""

    def __init__(self, job: Job, held_out: HeldOut) -> None:
        self._job, self._held_out = job, held_out

    def tally(self) -> Tally:
        """Tokens alone."""
        return Tally()

    def outcomes(self, row: Row) -> np.ndarray:
        """[N] the scored tokens."""
        tokens: np.ndarray = scored_tokens(row["token_ids"], row["spans"])
        return tokens

    def named(self, measures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Only those that every task has: accuracy would be how often the next token is guessed."""
        return measures

    def of_student(self, model: nn.Module) -> MeasureRow:
        """A row at a time."""
        return partial(self._measure, model)

    def _measure(self, model: nn.Module, row: Row, tally: Tally, view: ArmViews) -> None:
        head, clock = split_head(model), self._job.clock
        ids = torch.as_tensor(row["token_ids"]).long().to(head.weight.device)
        check_length(len(ids), model, "a held-out row has")
        check_ids(int(ids.max()), head.vocab_size, "a held-out row contains")
        with clock.span("disk"):
            targets = SoftTargets.from_row(row).normalised() if "logprobs" in row else None
        with torch.inference_mode():
            with clock.span("model"):
                predicting = self._predicting(model, row)
            following = torch.as_tensor(self.outcomes(row)).long().to(ids.device)
            step = chunk_tokens(head.vocab_size)
            said = self._held_out.said(row, targets)
            for start in range(0, len(predicting), step):
                part = slice(start, start + step)
                with clock.span("model"):
                    logits = head.logits(predicting[part])
                    if said is not None:
                        measured = partial(measure, logits, following[part])
                        measures = said.positions(part).count(row["prompt_key"], tally, measured)
                    else:
                        reference = None if targets is None else targets.positions(part)
                        measures = measure(logits, following[part], reference)
                tally.add(row["prompt_key"], self.named(measures))
                view.add(row, start, measures=measures, logits=logits)

    def _predicting(self, model: nn.Module, row: Row) -> Tensor:
        """[N, D] the states that say what is scored."""
        ids = torch.as_tensor(row["token_ids"]).long().to(split_head(model).weight.device)
        states = hidden_states(model, input_ids=ids[None])[0]
        return states[torch.from_numpy(predicting_positions(row["spans"]))]

    def gradient(self, model: nn.Module, arm: str) -> Gradient:
        """How far the recipe's targets turn the gradient of the soft loss.

        It is measured as training begins, or as it ends.

        None where there is no such loss, or no choice of targets (black-box, soft_weight 0), or
        where `evaluate.gradient_tokens` is 0.
        """
        job = self._job
        loss, score = job.recipe.loss, job.recipe.score
        objective = aim_at(loss, 0.0 if arm == "student_before" else 1.0).objective
        if score is None or objective is None or not self._held_out.scored:
            return None
        if job.recipe.evaluate.gradient_tokens == 0:
            return None
        vocab_size = split_head(model).vocab_size
        packing = Packing(
            tokens_per_pass=1,
            shared_rows=False,
            unstored_temperature=loss.unstored_temperature,
            vocab_size=vocab_size,
        )
        kept = wanted(score, vocab_size)
        job.progress.say(f"gradient of sparse against full targets ({arm})")
        try:
            return compare_gradients(
                model, self._first_rows(), kept=kept, objective=objective, packing=packing
            )
        except torch.OutOfMemoryError:
            job.progress.say("out of memory: the gradient, three times the weights, is left out")
            return None

    def _first_rows(self) -> Iterator[dict[str, Any]]:
        """Rows until they hold `evaluate.gradient_tokens`."""
        left = self._job.recipe.evaluate.gradient_tokens
        for row in self._held_out.targets():
            self._job.stop.check()
            yield row
            left -= row["span_tokens"]
            if left <= 0:
                return
