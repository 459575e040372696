"""The vLLM engine: offline, continuous batching; the one file that imports vllm.

Each row has its own seed, so its text does not depend on which rows ran beside it, as far as the
arithmetic allows: vLLM sums in an order that depends on the batch, and logits that differ in the
last bit can turn a sampled token when two candidates are that close. On the CPU in float32 we have
not seen it happen; on GPUs in bf16 expect it now and then.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...storage.errors import EngineDied, StillroomError, answered
from ..models.fit.config import UNLIMITED
from ..models.identity import Identity
from ..models.inputs.rendering import Renderer
from ..recipe.engines import Generate, lora_room
from ..workers.clock import Clock
from .base import Completion, Request, before_stop


def _prepare_cpu() -> None:
    """Defaults for CPUs: vLLM's own start two more processes and compile a function, half a minute per start."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, whole numbers only


class VllmEngine:
    """One model in vLLM."""

    def __init__(self, author: Identity, settings: Generate, clock: Clock) -> None:
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
        }
        if author.adapter is not None:
            arguments["max_lora_rank"] = lora_room(author.parts["adapter"]["config"])
        if author.context_tokens < UNLIMITED:
            arguments["max_model_len"] = author.context_tokens
        if on_cpu:
            # A prompt cut in two makes vLLM 0.32 rewind the seeded row's generator, which CPU
            # generators cannot do.
            arguments["enable_chunked_prefill"] = False
        what = f"generate.engine_args: vLLM refuses to start with {author.folder}"
        with answered(what, "Change them, or use generate.engine=hf."):
            self._llm = LLM(**arguments | settings.engine_args)
        self._settings, self._clock = settings, clock
        self._adapter = author.adapter
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
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        s = self._settings
        # Given in full: of the model's generation_config.json, vLLM then takes the end ids and
        # nothing else.
        sampling = SamplingParams(
            temperature=s.temperature,
            top_p=s.top_p if s.temperature > 0 else 1.0,
            max_tokens=s.max_tokens,
            stop=list(s.stop) or None,
            seed=request.seed if s.temperature > 0 else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        adapter = LoRARequest("teacher", 1, str(self._adapter)) if self._adapter else None
        try:
            self._llm.llm_engine.add_request(
                str(request.number),
                {"prompt_token_ids": request.prompt_ids},
                sampling,
                lora_request=adapter,
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
        number = int(output.request_id.split("-")[0])
        return Completion(number, ids, text, best.finish_reason or "stop")

    def _text(self, ids: list[int]) -> str:
        with self._clock.span("tokenizer"):
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
