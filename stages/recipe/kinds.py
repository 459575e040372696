"""The kinds of soft targets that a recipe can ask for: one row each.

All who need a fact about a kind ask here.

A new one is a row here, one in `storage/tables/kinds.py` (what its rows consist of), and, where it
does not keep all k best entries, a function in `stages/targets/best_entries.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from ...storage.tables.kinds import STRUCTURES, Structure
from .engines import SCORING
from .features import FeatureRequest
from .fields import Kernel, Options, Section

HF = "hf"
"""The engine of rows that name none, and the one that shows what a teacher's blocks hand on."""
VLLM = "vllm"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetKind:
    """What a recipe can say of one kind, and what serves it."""

    settings: tuple[str, ...] = ()
    """Its fields of `score`."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Settings without a usable default, with what the kind does with them and what to try."""
    words: str
    """It for people, with the settings in braces."""
    kept: str = ""
    """What it keeps, in a figure's title; k and p in braces."""
    served_by: tuple[str, ...] = ()
    """Other kinds whose stored rows serve too, where they are whole or have k entries or more."""
    covers: Mapping[str, Literal[">=", "<=", "="]] = field(default_factory=dict)
    """How a column of a stored row of this kind must compare with what is asked for, for reuse."""
    bytes_per_entry: float
    """About what an entry takes on disk at 10 mantissa bits, compressed."""
    bytes_per_token: float
    """What a scored token takes besides."""


KINDS = {
    "topk": TargetKind(
        settings=("k",),
        words="topk, {k} entries per position",
        kept="best {k:,}",
        served_by=("full",),
        covers={"k": ">="},
        bytes_per_entry=2.6,
        bytes_per_token=8,
    ),
    "topp": TargetKind(
        settings=("p", "k", "k_min"),
        needs={"p": "keeps the fewest entries that hold a mass of p. Try 0.9"},
        words="topp, mass {p} in at most {k} entries per position",
        kept="topp, mass {p:g}",
        served_by=("topk", "full"),
        covers={"k": ">=", "p": ">=", "k_min": ">="},
        bytes_per_entry=2.6,
        bytes_per_token=8,
    ),
    "sampled": TargetKind(
        settings=("rounds", "draw", "proposal"),
        words="sampled, {rounds} draws per position ({draw})",
        covers={"k": "=", "draw": "=", "proposal": "="},
        bytes_per_entry=1.1,
        bytes_per_token=8,
    ),
    "full": TargetKind(
        words="full, the whole distribution",
        bytes_per_entry=1.5,
        bytes_per_token=0,
    ),
}

if TYPE_CHECKING:
    Targets = str
else:
    Targets = Literal[tuple(KINDS)]

WHOLE = tuple(name for name in KINDS if STRUCTURES[name].whole)
"""The kinds that have every id."""


def kinds_with(setting: str) -> list[str]:
    """The kinds that have this setting."""
    return [name for name, kind in KINDS.items() if setting in kind.settings]


class Score(Section):
    """The teacher's distribution at every completion position."""

    engine: Literal["auto", "hf", "vllm"] = "auto"
    """hf: one forward pass of transformers. vllm: the log-probabilities of a prompt in vLLM, for a
    teacher that only fits there; the best entries then have a tail within a bound. auto: hf where
    transformers loads the teacher, else vllm; the first worker decides, for all that share the
    store. A stored row is reused whatever made it, unless an engine is named here."""
    engine_args: Options = Field({})
    """vllm: arguments of `LLM` that change its speed or its memory, and no number."""
    targets: Targets = "topk"
    """What is kept of the distribution."""
    k: int = Field(64, ge=1)
    """topk, topp: entries per position at most."""
    p: float | None = Field(None, gt=0, le=1)
    """topp: mass to keep."""
    k_min: int = Field(1, ge=1)
    """topp: at least this many entries."""
    rounds: int = Field(50, ge=1)
    """sampled: draws per position."""
    draw: Literal["multinomial", "systematic"] = "multinomial"
    """sampled: how to draw."""
    proposal: float = Field(1.0, gt=0)
    """sampled: draw from the teacher to this power, and weigh what is drawn; 1: from the teacher
    itself."""
    temperatures: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    """Loss temperatures that students can be trained at besides 1; sampled: the only one, which is
    drawn at."""
    batch_tokens: int | None = Field(None, ge=1)
    """Tokens of one forward pass, padding included; halved when memory runs out. null: 8192, on
    CPUs one row."""
    kernel: Kernel | None = None
    """Who makes the sums over the vocabulary; null: Triton on an NVIDIA GPU, else torch. Same
    numbers."""
    features: list[FeatureRequest] = Field([])
    """What is stored of the teacher besides, taken in the same pass; of rows to train on."""

    @field_validator("engine_args")
    @classmethod
    def _same_numbers(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if others := sorted(arguments.keys() - SCORING):
            raise ValueError(
                f"{others[0]!r} may change what the teacher says, whose rows are kept under its "
                f"identity. It takes {', '.join(sorted(SCORING))}"
            )
        return arguments

    @property
    def named_engine(self) -> str | None:
        """The one engine whose rows are wanted; None: any."""
        return None if self.engine == "auto" else self.engine

    def engine_for(self, teacher_weights: str) -> str | None:
        """The one engine whose rows are wanted, or None for any.

        Entropies that weigh teachers must be no bounds.
        """
        exact = teacher_weights == "entropy" and self.structure.has_tail
        return HF if exact else self.named_engine

    @property
    def kind(self) -> TargetKind:
        """What a recipe can say of these targets, and what serves them."""
        return KINDS[self.targets]

    @property
    def structure(self) -> Structure:
        """What the rows of these targets consist of."""
        return STRUCTURES[self.targets]
