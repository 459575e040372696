"""The `hf` engine: transformers' own generate, where vLLM cannot be installed. Slower, same rows.

Sampling is by the Gumbel-max trick: argmax of log p + g with g standard Gumbel noise is a draw from
p. The noise comes from each row's own seed, so a row's text does not depend on which rows ran
beside it, up to the last bit of the logits.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ...storage.errors import StillroomError, UsageError
from ...storage.tables.soft_targets import SoftTargets
from ..ledger.requests import author_context
from ..models.attention.future import check_causal
from ..models.attention.longest import Company
from ..models.causal_lm import load_causal_lm
from ..models.device import check_device
from ..models.identity import Identity
from ..models.inputs.rendering import Renderer
from ..recipe.engines import Generate, unknown_arguments
from ..targets.bounded import Bounded
from ..targets.entries_and_tail import targets_of
from ..targets.spec import Kept, kept_while_writing
from ..workers.clock import Clock
from .base import Completion, Request, before_stop


class _RowNoise(LogitsProcessor):
    """Adds each row's own Gumbel noise, a function of (row seed, position)."""

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = np.stack([g.gumbel(size=scores.shape[-1]) for g in self._generators])
        return torch.log_softmax(scores.float(), -1) + torch.from_numpy(noise).to(
            scores.device, torch.float32
        )


class _Kept(LogitsProcessor):
    """What the model says at each step, before anything is done to it.

    These are the targets of all rows, step by step.
    """

    def __init__(self, kept: Kept) -> None:
        self._kept, self._logits = kept, torch.empty(0)
        self._steps: list[SoftTargets] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self._logits):
            self.drawn(input_ids[:, -1])
        self._logits = scores.float().clone()
        return scores

    def drawn(self, next_ids: torch.Tensor) -> None:
        """What was drawn at the last step."""
        self._steps.append(targets_of(self._logits, next_ids, kept=self._kept))

    def of_row(self, row: int, tokens: int) -> Bounded:
        """The targets of a row's first tokens."""
        steps = [step.positions(slice(row, row + 1)) for step in self._steps[:tokens]]
        names = ("ids", "logprobs", "tail_logprob", "token_logprob", "entropy")
        found = {name: np.concatenate([getattr(step, name) for step in steps]) for name in names}
        return Bounded(SoftTargets(**found), None)


class _Ends(StoppingCriteria):
    """Where each row of a batch ends.

    It ends with an end id, or once a stop string stands in its completion.

    `lengths` holds the completion tokens of the rows that ended. What transformers writes behind an
    end is not read, so no id has to mean padding; and text is looked for in completions only, never
    across the end of a prompt.
    """

    def __init__(
        self, rows: int, ended: Callable[[list[int]], bool], *, start: int, step: Callable[[], None]
    ) -> None:
        self.lengths: list[int | None] = [None] * rows
        self._ended = ended
        self._start = start
        self._step = step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._step()
        for row, ids in enumerate(input_ids[:, self._start :].tolist()):
            if self.lengths[row] is None and self._ended(ids):
                self.lengths[row] = len(ids)
        return torch.tensor(
            [length is not None for length in self.lengths], device=input_ids.device
        )


class HfEngine:
    """One model in transformers."""

    def __init__(self, author: Identity, settings: Generate, clock: Clock) -> None:
        for why in unknown_arguments("hf", settings.engine_args):
            raise UsageError(f"generate.engine_args: {why}.")
        self._model = load_causal_lm(author)
        check_causal(self._model)
        self._company = Company(self._model)
        self._tokenizer = Renderer(author.folder, {}).tokenizer
        self._settings, self._clock = settings, clock
        self._vocab_size = author.vocab_size
        self._context = author_context(settings, author.context_tokens)
        self._batch = settings.engine_args.get("batch_size", 32)
        own: Any = self._model.generation_config
        self._ends = set(
            own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        ) - {None}
        # Replaced, not passed: transformers fills what is not given (a repetition penalty, say)
        # from the model's own.
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(
        self, requests: Iterable[Request], heartbeat: Callable[[], None]
    ) -> Iterator[Completion]:
        """Write one batch at a time, whose completions come out together.

        A row that the context will cut short is written alone: beside others it would be cut where
        the longest is. So are all rows of a batch that may not share a pass.
        """
        waiting = iter(requests)
        room = self._context - self._settings.max_tokens
        while drawn := list(islice(waiting, self._batch)):
            fitting = [r for r in drawn if len(r.prompt_ids) <= room]
            cut = [[r] for r in drawn if len(r.prompt_ids) > room]
            together = [fitting] if self._may_share(fitting) else [[r] for r in fitting]
            for batch in [*together, *cut]:
                yield from self._careful(batch, heartbeat)

    def _may_share(self, batch: list[Request]) -> bool:
        """Whether rows may be written beside one another, up to their ends. None is no batch."""
        lengths = [len(request.prompt_ids) for request in batch]
        if len(batch) < 2:
            return bool(batch)
        return self._company.may_share([*lengths, max(lengths) + self._settings.max_tokens])

    def _careful(
        self, batch: list[Request], heartbeat: Callable[[], None], attempt: int = 1
    ) -> Iterator[Completion]:
        """A batch's completions.

        A batch that fails is halved, until the row that it fails on stands alone.
        """
        failure = None
        try:
            done = self._run(batch, heartbeat)
        except StillroomError:  # from the heartbeat
            raise
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        # Only here, outside the handler, are the tensors of a failed pass free.
        if failure is None:
            yield from done
            return
        check_device(self._model.device, failure)
        if len(batch) == 1:
            yield Completion(batch[0].number, [], "", "error", failure, attempt)
            return
        half = len(batch) // 2
        yield from self._careful(batch[:half], heartbeat, attempt + 1)
        yield from self._careful(batch[half:], heartbeat, attempt + 1)

    @torch.inference_mode()
    def _run(self, batch: list[Request], heartbeat: Callable[[], None]) -> list[Completion]:
        longest = max(len(r.prompt_ids) for r in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, request in enumerate(batch):
            ids[number, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[number, longest - len(request.prompt_ids) :] = 1
        ends = _Ends(len(batch), self._ended, start=longest, step=heartbeat)
        asked = kept_while_writing(self._settings, self._vocab_size)
        kept = None if asked is None else _Kept(asked)
        device = self._model.device
        model: Any = self._model
        with self._clock.span("model"):
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=min(self._settings.max_tokens, self._context - longest),
                logits_processor=self._processors([r.seed for r in batch], kept),
                stopping_criteria=StoppingCriteriaList([ends]),
            )
            if kept is not None:
                kept.drawn(output[:, -1])
        done = [
            self._completion(request, row[:length], "length" if length is None else "stop")
            for request, row, length in zip(
                batch, output[:, longest:].tolist(), ends.lengths, strict=True
            )
        ]
        if kept is None:
            return done
        return [
            replace(one, targets=kept.of_row(row, len(one.token_ids))) if one.token_ids else one
            for row, one in enumerate(done)
        ]

    def _processors(self, seeds: list[int], kept: _Kept | None) -> LogitsProcessorList:
        s = self._settings
        first: list[LogitsProcessor] = [] if kept is None else [kept]
        if s.temperature == 0:
            return LogitsProcessorList(first)
        warpers = [*first, TemperatureLogitsWarper(s.temperature)]
        if s.top_p < 1:
            warpers.append(TopPLogitsWarper(s.top_p))
        return LogitsProcessorList([*warpers, _RowNoise(seeds)])

    def _ended(self, ids: list[int]) -> bool:
        if ids[-1] in self._ends:
            return True
        if not self._settings.stop:
            return False
        text = self._text(ids)
        return any(stop in text for stop in self._settings.stop)

    def _completion(self, request: Request, ids: list[int], finish_reason: str) -> Completion:
        kept, text = before_stop(ids, self._settings.stop, self._text)
        return Completion(request.number, kept, text, finish_reason)

    def _text(self, ids: list[int]) -> str:
        with self._clock.span("tokenizer"):
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
