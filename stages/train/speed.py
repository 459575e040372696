"""How fast a training goes: tokens/s, MFU, padding and waiting.

Each is told at a step, along the run and over all of it.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..loader.samples import Step

if TYPE_CHECKING:
    from .flops import ModelFlops, Peak


@dataclass(kw_only=True, slots=True)
class Speed:
    """What the steps of a run took so far; kept in each checkpoint."""

    tokens: int = 0
    positions: int = 0
    """Computed, padding included."""
    seconds: float = 0.0
    """In steps: waiting for the loader included, validation and checkpoints not."""
    waited_seconds: float = 0.0
    """Of these, for samples that were not read and packed yet."""
    peak_seconds: float = 0.0
    """What the model FLOPs would take at the device's rate."""
    points: list[dict[str, float]] = field(default_factory=list)
    """`tokens` fed, and `tokens_per_second`, `mfu` and `waited_share` since the point before."""

    @property
    def rates(self) -> dict[str, float]:
        """`tokens_per_second`, `mfu` and `waited_share` of it all."""
        seconds = max(self.seconds, 1e-9)
        return {
            "tokens_per_second": round(self.tokens / seconds, 1),
            "mfu": round(self.peak_seconds / seconds, 4),
            "waited_share": round(self.waited_seconds / seconds, 4),
        }

    @property
    def padding_share(self) -> float:
        """Padding positions over all positions."""
        return round(1 - self.tokens / self.positions, 4) if self.positions else 0.0


class Meter:
    """Adds up the steps of a run."""

    def __init__(
        self, speed: Speed, flops: "ModelFlops", peak: "Peak", *, devices: int = 1
    ) -> None:
        """`peak` is that of each of the `devices`, which share the steps."""
        self.speed, self.peak, self._devices = speed, peak, devices
        self._flops, self._before = flops, replace(speed)

    def add(self, step: Step, *, positions: int, seconds: float, waited: float) -> Speed:
        """Count a step; returns that step alone."""
        peak_seconds = self._flops.step(step) / (self._devices * self.peak.flops_per_second)
        this = Speed(
            tokens=step.tokens,
            positions=positions,
            seconds=seconds,
            waited_seconds=waited,
            peak_seconds=peak_seconds,
        )
        for name in ("tokens", "positions", "seconds", "waited_seconds", "peak_seconds"):
            setattr(self.speed, name, getattr(self.speed, name) + getattr(this, name))
        return this

    def point(self, tokens: int) -> None:
        """Keep the rates since the last point, as of `tokens` fed."""
        now, before = self.speed, self._before
        since = Speed(
            tokens=now.tokens - before.tokens,
            seconds=now.seconds - before.seconds,
            waited_seconds=now.waited_seconds - before.waited_seconds,
            peak_seconds=now.peak_seconds - before.peak_seconds,
        )
        self._before = replace(now)
        now.points.append({"tokens": tokens, **since.rates})

    def note(self, this: Speed) -> str:
        """MFU in words, short, with what it is a share of."""
        share = f"{100 * this.rates['mfu']:.0f} %"
        return f"MFU {share}" if self.peak.vendor else f"{share} of a matrix product's rate"

    def summary(self) -> dict[str, Any]:
        """Over the run, for its record."""
        return {
            "seconds": round(self.speed.seconds, 3),
            **self.speed.rates,
            "padding_share": self.speed.padding_share,
            "peak": asdict(self.peak),
            "speed": self.speed.points,
        }
