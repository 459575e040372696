"""The divergences that a loss can have: one row each.

All who need a fact about a divergence ask here.

A new one is a row of `DIVERGENCES`, its parameters as fields of `DivergenceSettings`, and the
function of the same name in `stages/losses/divergences.py`.

t is the teacher's distribution over the outcomes that are compared, p the student's, m a mixture of
them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from .fields import Section


def always(**_: Any) -> bool:
    """Finite whatever the parameters are."""
    return True


def never(**_: Any) -> bool:
    """Infinite whatever the parameters are."""
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceKind:
    """What is known of one divergence."""

    equation: str
    """What the function computes, in the words of its docstring."""
    source: str
    """Who proposed it, and where."""
    parameters: tuple[str, ...] = ()
    """Its fields of `loss`, which are the function's keyword arguments."""
    finite_without_tail: Callable[..., bool]
    """Whether it is finite where the teacher gives nothing to what is outside its entries, as its
    parameters are."""
    draws_suffice: bool = False
    """Whether draws from the teacher give its mean: only what is linear in t. The others need the
    probability of every outcome."""


DIVERGENCES = {
    "forward_kl": DivergenceKind(
        equation="KL(t || p) = sum_i t_i (log t_i - log p_i)",
        source="Hinton et al. 2015, arXiv 1503.02531",
        finite_without_tail=always,
        draws_suffice=True,
    ),
    "reverse_kl": DivergenceKind(
        equation="KL(p || t) = sum_i p_i (log p_i - log t_i)",
        source="Gu et al. 2024 (MiniLLM), arXiv 2306.08543",
        finite_without_tail=never,
    ),
    "jsd": DivergenceKind(
        equation="w KL(t || m) + (1 - w) KL(p || m), m = w t + (1 - w) p, w = jsd_weight",
        source="Agarwal et al. 2024 (GKD), arXiv 2306.13649",
        parameters=("jsd_weight",),
        finite_without_tail=always,
    ),
    "skew_forward_kl": DivergenceKind(
        equation="KL(t || m), m = skew t + (1 - skew) p",
        source="Ko et al. 2024 (DistiLLM), arXiv 2402.03898",
        parameters=("skew",),
        finite_without_tail=always,
    ),
    "skew_reverse_kl": DivergenceKind(
        equation="KL(p || m), m = (1 - skew) t + skew p",
        source="Ko et al. 2024 (DistiLLM), arXiv 2402.03898",
        parameters=("skew",),
        finite_without_tail=lambda skew: skew > 0,  # without skew it is reverse_kl
    ),
    "total_variation": DivergenceKind(
        equation="1/2 sum_i |t_i - p_i|",
        source="Wen et al. 2023, arXiv 2307.15190",
        finite_without_tail=always,
    ),
    "alpha_beta": DivergenceKind(
        equation="-1/(ab) sum_i [t_i^a p_i^b - a/(a+b) t_i^(a+b) - b/(a+b) p_i^(a+b)]",
        source="Wang et al. 2025 (ABKD), arXiv 2505.04560",
        parameters=("alpha_beta",),
        finite_without_tail=lambda alpha_beta: alpha_beta[0] > 0,  # at a = 0 log t stands alone
    ),
    "adaptive_kl": DivergenceKind(
        equation=(
            "g_h / (g_h + g_t) KL(t || p) + g_t / (g_h + g_t) KL(p || t), "
            "with g = sum_i |t_i - p_i| over head and tail"
        ),
        source="Wu et al. 2024 (AKL), arXiv 2404.02657",
        parameters=("head_mass",),
        finite_without_tail=never,
    ),
}

if TYPE_CHECKING:
    Divergence = str
else:
    Divergence = Literal[tuple(DIVERGENCES)]

# In a student's hash since format 1, whichever divergence it has. A parameter that came later is in
# it only where it is not at its default, so that the hashes of earlier students stay.
_ALWAYS_HASHED = {"skew", "jsd_weight", "alpha_beta", "head_mass"}


GREATEST_EXPONENT = 100
"""Of `alpha_beta`."""


class DivergenceSettings(Section):
    """The part of `loss` that says which divergence."""

    divergence: Divergence = "forward_kl"
    """forward_kl is KL(teacher || student)."""
    skew: float = Field(0.1, ge=0, lt=1)
    """skew_forward_kl, skew_reverse_kl: share of the first distribution in the mixture; 0 is no
    skew."""
    jsd_weight: float = Field(0.5, gt=0, lt=1)
    """jsd: the teacher's share in the mixture; at 0 and at 1 the divergence is 0 throughout."""
    alpha_beta: tuple[float, float] = (0.2, 0.7)
    """alpha_beta: exponents of teacher and student; (1, 0) is forward_kl, (0, 1) reverse_kl."""
    head_mass: float = Field(0.5, gt=0, lt=1)
    """adaptive_kl: the teacher's mass that counts as its head."""

    @field_validator("alpha_beta")
    @classmethod
    def _small_where_unlikely(cls, exponents: tuple[float, float]) -> tuple[float, float]:
        if min(exponents) < 0 or not 0 < max(exponents) <= GREATEST_EXPONENT:
            raise ValueError(
                f"must be two numbers of at least 0, one above 0, none above {GREATEST_EXPONENT} "
                f"(got {list(exponents)}): with others the loss is huge wherever one side finds an "
                "id unlikely, or 0 wherever neither is certain. Use [0.2, 0.7] to start"
            )
        return exponents

    @property
    def kind(self) -> DivergenceKind:
        """What is known of its divergence."""
        return DIVERGENCES[self.divergence]

    def parameters(self) -> dict[str, Any]:
        """Those of its divergence, by name."""
        return {name: getattr(self, name) for name in self.kind.parameters}

    def is_finite_without_tail(self) -> bool:
        """Whether the divergence is finite without a tail.

        Without one, the teacher gives nothing to what is outside its entries.
        """
        return self.kind.finite_without_tail(**self.parameters())

    def idle(self) -> list[str]:
        """Parameters of other divergences that are set, and would be ignored."""
        return [
            name for name in _PARAMETERS if name not in self.kind.parameters and self._is_set(name)
        ]

    def unhashed(self) -> set[str]:
        """Parameters that a student's hash leaves out."""
        return {
            name for name in _PARAMETERS if name not in _ALWAYS_HASHED and not self._is_set(name)
        }

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != DivergenceSettings.model_fields[name].default)


_PARAMETERS = [name for name in DivergenceSettings.model_fields if name != "divergence"]


def owners(parameter: str) -> list[str]:
    """The divergences that have this parameter."""
    return [name for name, kind in DIVERGENCES.items() if parameter in kind.parameters]
