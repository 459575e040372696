"""How far two readings of the same rows differ, and which differences are no rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from .numbers import Numbers


Fault = Literal["shifted by one position", "other tokens'", "other numbers"]


BOUNDLESS = 1e6
"""Nats, in place of infinity, which JSON does not have."""


ABSOLUTE = 1e-3
"""Nats: float32 sums of another machine."""

NOISE = 4.0

DEVIATIONS = 6.0
"""Standard deviations at which drawn ids are no longer drawn from this teacher."""


@dataclass(kw_only=True, slots=True)
class Difference:
    """One quantity over all rows that were read, in nats; `draws`: over rows, their mean over positions."""

    values: int = 0
    worst: float = 0.0
    mean: float = 0.0
    noise_worst: float = 0.0
    """Between the two readings of the teacher."""
    noise_mean: float = 0.0
    tolerance_worst: float = 0.0
    """Rounding comes on top, and in `draws` chance."""
    tolerance_mean: float = 0.0
    slack_worst: float = 0.0
    """What comes on top, at most."""


def differences(readings: Sequence["Reading"], allowance: float) -> dict[str, Difference]:
    """What all readings together differ by, for each number; `allowance` is added to what noise explains."""
    result: dict[str, Difference] = {}
    for name in sorted({name for reading in readings for name in reading.parts}):
        parts = [reading.parts[name] for reading in readings if name in reading.parts]
        values = sum(part.values for part in parts)
        result[name] = Difference(
            values=values,
            worst=max(part.worst for part in parts),
            mean=sum(part.mean * part.values for part in parts) / values,
            noise_worst=max(part.noise_worst for part in parts),
            noise_mean=sum(part.noise_mean * part.values for part in parts) / values,
            tolerance_worst=ABSOLUTE + allowance + NOISE * max(part.noise_worst for part in parts),
            tolerance_mean=ABSOLUTE + allowance + NOISE * max(part.noise_mean for part in parts),
            slack_worst=max(part.slack_worst for part in parts),
        )
    return result


def off_row(reading: "Reading", limits: Mapping[str, Difference]) -> dict[str, float]:
    """The numbers of one row that differ by more than the limits allow."""
    return {
        name: part.mean for name, part in reading.parts.items() if not part.within(limits[name])
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One quantity of one row: differences from what is stored, nats."""

    values: int
    worst: float
    mean: float
    excess_worst: float
    """The worst and the mean, each value less what rounding or chance may do."""
    excess_mean: float
    slack_worst: float
    """The most that rounding or chance may do."""
    noise_worst: float
    noise_mean: float

    def within(self, limit: Difference) -> bool:
        """Whether this is the teacher's, as far as `limit` goes."""
        return (
            self.excess_worst <= limit.tolerance_worst and self.excess_mean <= limit.tolerance_mean
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What came of reading a row again."""

    parts: dict[str, Part]
    entropy: np.ndarray
    """[N] by the teacher."""


def compare(
    stored: "Numbers", measured: "Numbers", again: "Numbers", *, bits: int
) -> dict[str, Part]:
    """Stored numbers against a reading, and that against another one, per quantity."""
    parts = {}
    for name, values in stored.items():
        rounding = np.abs(np.where(np.isfinite(values), values, 0.0)) * 2.0 ** -(bits + 1)
        parts[name] = _part(
            _apart(values, measured[name]), rounding, _apart(measured[name], again[name])
        )
    if "draws" in measured:
        now, then = (
            np.array([numbers["draws"].mean(dtype=np.float64)]) for numbers in (measured, again)
        )
        chance = (
            DEVIATIONS
            * np.sqrt([measured["draws_variance"].sum(dtype=np.float64)])
            / len(measured["draws"])
        )
        parts["draws"] = _part(_apart(now, np.zeros(1)), chance, _apart(now, then))
    return parts


def _part(found: np.ndarray, slack: np.ndarray, noise: np.ndarray) -> Part:
    excess = found - slack
    return Part(
        values=len(found),
        worst=float(found.max()),
        mean=float(found.mean()),
        excess_worst=float(excess.max()),
        excess_mean=float(excess.mean()),
        slack_worst=float(slack.max()),
        noise_worst=float(noise.max()),
        noise_mean=float(noise.mean()),
    )


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| in float64; 0 where both are -inf, `BOUNDLESS` where one is or where a number is none."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(a.astype(np.float64) - b)
    return np.nan_to_num(np.where(a == b, 0.0, apart), nan=BOUNDLESS, posinf=BOUNDLESS)
