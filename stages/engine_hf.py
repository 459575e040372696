"""The `hf` engine: transformers' own generate, where vLLM cannot be installed. Slower, same rows.

Sampling is by the Gumbel-max trick: argmax of log p + g with g standard Gumbel noise is a draw from p. The noise comes
from each row's own seed, so a row's text does not depend on which rows ran beside it, up to the last bit of the logits.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from .engine import Completion, Request
from .identity import Identity
from .rendering import Renderer
from .requests import author_context
from .sections import Generate
from .teacher import load_causal_lm


class _RowNoise(LogitsProcessor):
    """Adds each row's own Gumbel noise, a function of (row seed, position)."""

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = np.stack([g.gumbel(size=scores.shape[-1]) for g in self._generators])
        return torch.log_softmax(scores.float(), -1) + torch.from_numpy(noise).to(scores.device, torch.float32)


class HfEngine:
    """One model in transformers."""

    def __init__(self, author: Identity, settings: Generate) -> None:
        self._model = load_causal_lm(author)
        self._tokenizer = Renderer(author.folder, {}).tokenizer
        self._settings = settings
        self._context = author_context(settings, author.context_tokens)
        self._batch = int(settings.engine_args.get("batch_size", 32))
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Batches of prompts of like length; a batch's completions come out together.

        A row that the context will cut short is written alone: beside others it would be cut where the longest is.
        """
        waiting = iter(requests)
        room = self._context - self._settings.max_tokens
        while pool := list(islice(waiting, self._batch * 8)):
            pool.sort(key=lambda r: len(r.prompt_ids))
            fitting = [r for r in pool if len(r.prompt_ids) <= room]
            for start in range(0, len(fitting), self._batch):
                yield from self._run(fitting[start : start + self._batch])
            for request in pool[len(fitting) :]:
                yield from self._run([request])

    @torch.inference_mode()
    def _run(self, batch: list[Request]) -> Iterator[Completion]:
        longest = max(len(r.prompt_ids) for r in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, longest - len(request.prompt_ids) :] = 1
        device = self._model.device
        model: Any = self._model
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=min(self._settings.max_tokens, self._context - longest),
            logits_processor=self._processors([r.seed for r in batch]),
            pad_token_id=0,
            stop_strings=list(self._settings.stop) or None,
            tokenizer=self._tokenizer if self._settings.stop else None,
        )
        for row, request in enumerate(batch):
            yield self._completion(request, output[row, longest:].tolist())

    def _processors(self, seeds: list[int]) -> LogitsProcessorList:
        s = self._settings
        if s.temperature == 0:
            return LogitsProcessorList()
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(s.temperature)]
        if s.top_p < 1:
            warpers.append(TopPLogitsWarper(s.top_p))
        return LogitsProcessorList([*warpers, _RowNoise(seeds)])

    def _completion(self, request: Request, ids: list[int]) -> Completion:
        """Cut the padding that a batch leaves behind a row that ended early."""
        end = next((i + 1 for i, token in enumerate(ids) if token in self._ends), None)
        text = str(self._tokenizer.decode(ids[:end], skip_special_tokens=True))
        stop = min((text.find(s) for s in self._settings.stop if s in text), default=None)
        if end is None and stop is not None:
            end = next(i for i in range(1, len(ids) + 1) if self._stopped(ids[:i]))
            text = text[:stop]
        if end is None:
            return Completion(request.number, ids, text, "length")
        return Completion(request.number, ids[:end], text, "stop")

    def _stopped(self, ids: list[int]) -> bool:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return any(s in text for s in self._settings.stop)
