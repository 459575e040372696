"""The vLLM engine, which writes and reads offline, with continuous batching.

This is the one file that imports vllm.

Each row has its own seed, so its text does not depend on which rows ran beside it, as far as the
arithmetic allows: vLLM sums in an order that depends on the batch, and logits that differ in the
last bit can turn a sampled token when two candidates are that close. On the CPU in float32 we have
not seen it happen; on GPUs in bf16 expect it now and then.

Every log-probability is a raw one, of the whole vocabulary before temperature and top_p
(`logprobs_mode`): the processed ones are of a nucleus, with -inf outside.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from ...storage.errors import EngineDied, RowError, StillroomError, answered
from ..models.fit.config import UNLIMITED
from ..models.identity import Identity
from ..models.inputs.rendering import Renderer
from ..recipe.engines import Generate, lora_room
from ..targets.bounded import Best, Bounded, bounded_targets
from ..targets.spec import kept_while_writing
from ..workers.clock import Clock
from .base import Completion, Request, Said, Text, before_stop

ENTRIES_AT_ONCE = 1 << 22
"""Log-probabilities that are in Python's lists at a time, about 100 bytes each."""


def _opened(author: Identity, what: str, given: Mapping[str, Any], **settings: Any) -> Any:
    """A model in vLLM's `LLM`; `given` are the recipe's own arguments.

    Raises:
        UsageError: vLLM refuses; `what` begins the message.
    """
    import torch

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        _prepare_cpu()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": str(author.folder),
        "dtype": author.dtype,
        "seed": 0,
        "enforce_eager": on_cpu,
        "enable_lora": author.adapter is not None,
        "disable_log_stats": True,
        "trust_remote_code": author.runs_code,
        "logprobs_mode": "raw_logprobs",
    }
    if author.adapter is not None:
        arguments["max_lora_rank"] = lora_room(author.parts["adapter"]["config"])
    with answered(f"{what}: vLLM refuses to start with {author.folder}", _ELSE):
        return LLM(**{**arguments, **settings, **given})


_ELSE = "Change them, or use the engine hf."


def _prepare_cpu() -> None:
    """Set defaults for CPUs.

    vLLM's own defaults start two more processes and compile a function: half a minute per start.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, whole numbers only


def _adapter_of(author: Identity) -> Any:
    """What each request of an author says of its adapter.

    On a CPU rows with and without an adapter would be mixed up.
    """
    if author.adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("teacher", 1, str(author.adapter))


class VllmEngine:
    """One model in vLLM that writes."""

    def __init__(self, author: Identity, settings: Generate, clock: Clock) -> None:
        import torch

        limits: dict[str, Any] = {}
        if author.context_tokens < UNLIMITED:
            limits["max_model_len"] = author.context_tokens
        if settings.keep is not None:
            limits["max_logprobs"] = -1
        if not torch.cuda.is_available():
            # A prompt cut in two makes vLLM 0.32 rewind the seeded row's generator, which CPU
            # generators cannot do.
            limits["enable_chunked_prefill"] = False
        self._llm = _opened(author, "generate.engine_args", settings.engine_args, **limits)
        self._settings, self._clock = settings, clock
        self._vocab_size, self._lora = author.vocab_size, _adapter_of(author)
        self._tokenizer = Renderer(author.folder, {}).tokenizer

    def generate(
        self, requests: Iterable[Request], heartbeat: Callable[[], None]
    ) -> Iterator[Completion]:
        """Keep the engine full and hand out completions as they finish."""
        engine = self._llm.llm_engine
        rows = engine.vllm_config.scheduler_config.max_num_seqs
        in_flight = rows + max(
            1, rows // 4
        )  # the next ones wait at its door; more would only be lost with it
        waiting = iter(requests)
        held: set[str] = set()
        more = True
        while more or engine.has_unfinished_requests():
            while more and engine.get_num_unfinished_requests() < in_flight:
                request = next(waiting, None)
                if request is None:
                    more = False
                elif (refusal := self._submit(request)) is not None:
                    yield Completion(request.number, [], "", "error", refusal)
                else:
                    held.add(str(request.number))
            try:
                heartbeat()
            except StillroomError:
                engine.abort_request(list(held))
                raise
            if not engine.has_unfinished_requests():
                continue  # everything was refused: a step would wait for an answer that never comes
            try:
                with self._clock.span("model"):
                    outputs = engine.step()
            except (
                Exception
            ) as error:  # its state is then unknown, in this process or in the engine's own
                raise EngineDied(f"vLLM: {type(error).__name__}: {error}") from error
            for output in outputs:
                if output.finished:
                    completion = self._completion(output)
                    held.discard(str(completion.number))
                    yield completion

    def _submit(self, request: Request) -> str | None:
        """Hand one request to the engine; the reason if it will not take it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        s = self._settings
        kept = kept_while_writing(s, self._vocab_size)
        # Given in full: of the model's generation_config.json, vLLM then takes the end ids and
        # nothing else.
        sampling = SamplingParams(
            temperature=s.temperature,
            top_p=s.top_p if s.temperature > 0 else 1.0,
            max_tokens=s.max_tokens,
            stop=list(s.stop) or None,
            seed=request.seed if s.temperature > 0 else None,
            logprobs=None if kept is None else kept.k,
            flat_logprobs=kept is not None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            self._llm.llm_engine.add_request(
                str(request.number),
                {"prompt_token_ids": request.prompt_ids},
                sampling,
                lora_request=self._lora,
            )
        except ValueError as error:
            return str(error)
        except Exception as error:
            raise EngineDied(f"vLLM: {type(error).__name__}: {error}") from error
        return None

    def _completion(self, output: Any) -> Completion:
        best = output.outputs[0]
        # vLLM ends its text before the stop string, its ids behind it.
        ids, text = before_stop(list(best.token_ids), self._settings.stop, self._text)
        try:
            targets = self._kept(ids, best.logprobs)
        except FloatingPointError as error:
            return Completion(_number(output), [], "", "error", str(error))
        why = best.finish_reason or "stop"
        return Completion(_number(output), ids, text, why, targets=targets)

    def _kept(self, ids: list[int], logprobs: Any) -> Bounded | None:
        """The distributions that some tokens were drawn from."""
        kept = kept_while_writing(self._settings, self._vocab_size)
        if kept is None or not ids:
            return None
        found, there = _arrays(logprobs, 0, len(ids)), np.array(ids)
        if (found.first != there).any():
            raise FloatingPointError("vLLM gave log-probabilities of other tokens than it drew")
        best = Best(found.ids, found.logprobs, there, found.first_logprob)
        return bounded_targets(best, kept, self._vocab_size)

    def _text(self, ids: list[int]) -> str:
        with self._clock.span("tokenizer"):
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class VllmReader:
    """One model in vLLM that says what follows in texts: the log-probabilities of a prompt.

    vLLM gives those of a whole prompt at once, K + 1 a position: the token that is there, then the
    K best. Where they are too many, each position is asked for alone, as the first token of a
    completion; what comes before it is then in vLLM's cache. Prompts whose log-probabilities are
    asked for do not read that cache, which vLLM sees to: told to, it would give memory that nothing
    was written to (`skip_reading_prefix_cache`).
    """

    def __init__(
        self, teacher: Identity, given: Mapping[str, Any], *, longest: int, clock: Clock
    ) -> None:
        """`longest`: tokens of the longest text."""
        import torch

        # vLLM has no request that writes nothing; what it writes here is behind the last position
        # that the model has, and is not read.
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        limits = {"max_model_len": longest + 1, "max_logprobs": -1}
        self._llm = _opened(teacher, "score.engine_args", given, **limits)
        self._vocab_size, self._lora, self._clock = teacher.vocab_size, _adapter_of(teacher), clock
        # On CPUs the prompt log-probabilities of several requests with an adapter end vLLM 0.32.
        self._alone = self._lora is not None and not torch.cuda.is_available()
        self._numbers = count()

    def read(
        self, texts: Sequence[Text], entries: int | None, look: Callable[[], None]
    ) -> Iterator[Said]:
        """See `base.Reader`: few requests at once, their numbers made into arrays as they come."""
        wide = (self._vocab_size if entries is None else entries) + 1
        whole = [t for t in texts if entries or len(t.token_ids) * wide <= ENTRIES_AT_ONCE]
        for group in _grouped(whole, wide, alone=self._alone):
            yield from self._prompts(group, entries, look)
        for text in texts:
            if text not in whole:
                yield from self._positions(text, look)

    def _prompts(
        self, texts: Sequence[Text], entries: int | None, look: Callable[[], None]
    ) -> Iterator[Said]:
        asked = {next(self._numbers): text for text in texts}
        prompts = {
            # What stands behind the last token that is asked about is not read.
            number: text.token_ids[: int(text.positions[-1]) + 2]
            for number, text in asked.items()
        }
        most = -1 if entries is None else entries
        for number, output in self._run(prompts, look, prompt_logprobs=most):
            text, said = asked[number], output.prompt_logprobs
            # Of a prompt the log-probabilities at index t are those of its token t.
            found = _arrays(said, 1, len(prompts[number]))[text.positions]
            if (found.first != np.array(text.token_ids)[text.positions + 1]).any():
                raise EngineDied("vLLM gave log-probabilities of other tokens than it was asked of")
            yield Said(text.number, found.ids, found.logprobs, found.first_logprob)

    def _positions(self, text: Text, look: Callable[[], None]) -> Iterator[Said]:
        """Every id at each position, so many positions at once."""
        size = max(1, ENTRIES_AT_ONCE // self._vocab_size)
        for start in range(0, len(text.positions), size):
            positions = text.positions[start : start + size].tolist()
            asked = {next(self._numbers): position for position in positions}
            prompts = {number: text.token_ids[: at + 1] for number, at in asked.items()}
            parts = {
                asked[number]: _arrays(output.outputs[0].logprobs, 0, 1)
                for number, output in self._run(prompts, look, logprobs=-1)
            }
            ids = np.concatenate([parts[position].ids for position in positions])
            logprobs = np.concatenate([parts[position].logprobs for position in positions])
            there = np.array([text.token_ids[position + 1] for position in positions])
            own = logprobs[ids == there[:, None]]
            yield Said(text.number, ids, logprobs, own)

    def _run(
        self, prompts: Mapping[int, list[int]], look: Callable[[], None], **asked: Any
    ) -> Iterator[tuple[int, Any]]:
        """What comes of requests, by their numbers, as it comes."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, held = self._llm.llm_engine, {str(number) for number in prompts}
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **self._cached(asked),
        )
        try:
            for number, ids in prompts.items():
                prompt = {"prompt_token_ids": ids}
                engine.add_request(str(number), prompt, sampling, lora_request=self._lora)
            while engine.has_unfinished_requests():
                look()
                with self._clock.span("model"):
                    outputs = engine.step()
                for output in outputs:
                    if output.finished:
                        held.discard(str(_number(output)))
                        yield _number(output), output
        except StillroomError:
            engine.abort_request(list(held))
            raise
        except ValueError as error:  # it did not take one
            engine.abort_request(list(held))
            raise RowError("engine", f"vLLM: {error}") from error
        except Exception as error:
            raise EngineDied(f"vLLM: {type(error).__name__}: {error}") from error

    def _cached(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What is said of the cache of prompts: nothing, vLLM knows when not to read it."""
        return asked


def _grouped(texts: Sequence[Text], wide: int, *, alone: bool) -> Iterator[list[Text]]:
    """Texts whose log-probabilities are held at once."""
    group: list[Text] = []
    held = 0
    for text in texts:
        size = len(text.token_ids) * wide
        if group and (alone or held + size > ENTRIES_AT_ONCE):
            yield group
            group, held = [], 0
        group.append(text)
        held += size
    if group:
        yield group


@dataclass(frozen=True, slots=True, eq=False)
class _Arrays:
    """vLLM's lists as arrays.

    At each of n positions they have the token that is there, then the best entries.
    """

    first: np.ndarray
    """[n] int32"""
    first_logprob: np.ndarray
    """[n] float32"""
    ids: np.ndarray
    """[n, K] int32"""
    logprobs: np.ndarray
    """[n, K] float32"""

    def __getitem__(self, positions: np.ndarray) -> "_Arrays":
        parts = (self.first, self.first_logprob, self.ids, self.logprobs)
        return _Arrays(*(part[positions] for part in parts))


def _arrays(flat: Any, start: int, stop: int) -> _Arrays:
    """Positions `start` to `stop` of a `FlatLogprobs`, which is as wide at each of them."""
    begins, ends = flat.start_indices[start:stop], flat.end_indices[start:stop]
    if len(begins) != stop - start:
        raise EngineDied(f"vLLM gave {len(begins)} positions, expected {stop - start}")
    part = slice(begins[0], ends[-1])
    ids = np.array(flat.token_ids[part], np.int32).reshape(stop - start, -1)
    logprobs = np.array(flat.logprobs[part], np.float32).reshape(ids.shape)
    return _Arrays(ids[:, 0], logprobs[:, 0], ids[:, 1:], logprobs[:, 1:])


def _number(output: Any) -> int:
    """The number of the request, to whose name vLLM may add."""
    return int(output.request_id.split("-")[0])
