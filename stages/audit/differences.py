"""How far a stored row is from what its teacher says now, and how far it may be.

The teacher reads each row twice: alone, and among others, padded, which changes the order of the
sums inside. So what arithmetic alone may do is measured, not assumed. Per quantity of a row, in
nats, there is one value per position or entry:

    d = |stored - measured|             what is judged; measured: the row read alone
    r = |stored| * 2**-(bits + 1)       the most that rounding to `bits` bits of mantissa did;
                                        of a tail that is bounded (`tail_bound`), that bound
                                        besides
    n = |measured - measured again|     the noise of the arithmetic

A row is right if, for each quantity,

    max(d - r)   <=  ABSOLUTE + 4 eps + NOISE * (largest max(n) of any row)
    mean(d - r)  <=  ABSOLUTE + 4 eps + NOISE * (largest mean(n) of any row)

with eps of the dtype that the teacher computes in (2**-7 in bfloat16). Two engines add in other
orders, as rows alone and among others do: in float32 within ABSOLUTE, in half precision within that
noise. An entropy that is a lower bound may be less than measured by anything. Drawn ids do not
repeat: of sampled targets `draws` is compared, a mean that is 0 in expectation (`numbers.py`), and
chance takes the place of r.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .stored_rows import StoredRow

if TYPE_CHECKING:
    from .numbers import Numbers

ABSOLUTE = 1e-3
"""Nats: what float32 sums of another machine may differ by."""

NOISE = 4.0
"""How often the noise that was seen a difference may be: few rows were read, and each twice."""

DEVIATIONS = 6.0
"""Standard deviations at which drawn ids are no longer drawn from this teacher."""

BOUNDLESS = 1e6
"""Nats, in place of infinity, which JSON does not have."""


@dataclass(kw_only=True, slots=True)
class Quantity:
    """One quantity over all rows that were read, in nats.

    `draws` are compared over rows, by the mean of each over its positions.
    """

    values: int = 0
    worst: float = 0.0
    """Of d, as `mean`."""
    mean: float = 0.0
    noise_worst: float = 0.0
    """Of n, as `noise_mean`."""
    noise_mean: float = 0.0
    tolerance_worst: float = 0.0
    """The right sides of the two inequalities, as `tolerance_mean`."""
    tolerance_mean: float = 0.0
    slack_worst: float = 0.0
    """The largest r, which comes on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One quantity of one row, in nats: what is needed of d, d - r, r and n to judge it."""

    values: int
    worst: float
    mean: float
    beyond_worst: float
    """The left sides of the two inequalities, as `beyond_mean`."""
    beyond_mean: float
    slack_worst: float
    noise_worst: float
    noise_mean: float

    def within(self, limit: Quantity) -> bool:
        """Whether both inequalities hold: the numbers are the teacher's."""
        return (
            self.beyond_worst <= limit.tolerance_worst and self.beyond_mean <= limit.tolerance_mean
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SecondReading:
    """What a second reading of a row gave."""

    row: StoredRow
    differences: dict[str, Difference]
    """By quantity."""
    entropy: np.ndarray
    """[N] as the teacher has it now."""

    def off(self, limits: Mapping[str, Quantity]) -> dict[str, float]:
        """The quantities that differ by more than they may, with their mean difference."""
        return {
            name: difference.mean
            for name, difference in self.differences.items()
            if not difference.within(limits[name])
        }


def over_rows(readings: Sequence[SecondReading], eps: float) -> dict[str, Quantity]:
    """Each quantity over all rows that have it, and how far it may be off.

    `eps` is that of the teacher's dtype.
    """
    names = sorted({name for reading in readings for name in reading.differences})
    found = {}
    for name in names:
        rows = [reading.differences[name] for reading in readings if name in reading.differences]
        values = sum(row.values for row in rows)
        noise_worst = max(row.noise_worst for row in rows)
        noise_mean = max(row.noise_mean for row in rows)
        found[name] = Quantity(
            values=values,
            worst=max(row.worst for row in rows),
            # Rows count by their values: these are means over all values, not over rows.
            mean=sum(row.mean * row.values for row in rows) / values,
            noise_worst=noise_worst,
            noise_mean=sum(row.noise_mean * row.values for row in rows) / values,
            tolerance_worst=ABSOLUTE + 4 * eps + NOISE * noise_worst,
            tolerance_mean=ABSOLUTE + 4 * eps + NOISE * noise_mean,
            slack_worst=max(row.slack_worst for row in rows),
        )
    return found


def slack_of(
    row: StoredRow, stored: "Numbers", part: slice | np.ndarray = slice(None)
) -> dict[str, np.ndarray]:
    """The r of each quantity of some of a row's targets: its rounding.

    A tail that is bounded has the bound besides.
    """
    slack = {
        name: rounding(values, row.columns["mantissa_bits"]) for name, values in stored.items()
    }
    bound = row.columns.get("tail_bound")
    if bound is not None and "tail_logprob" in slack:
        slack["tail_logprob"] = slack["tail_logprob"] + np.minimum(
            np.asarray(bound)[part], BOUNDLESS
        )
    return slack


def compare(
    stored: "Numbers",
    measured: "Numbers",
    *,
    again: "Numbers",
    slack: Mapping[str, np.ndarray],
) -> dict[str, Difference]:
    """A row's stored numbers against two readings, per quantity; `slack` is r of each."""
    found = {
        name: difference(values, measured[name], again=again[name], slack=slack[name])
        for name, values in stored.items()
    }
    if "draws" in measured:
        found["draws"] = _compare_draws(measured, again)
    return found


def difference(
    stored: np.ndarray, measured: np.ndarray, *, again: np.ndarray, slack: np.ndarray
) -> Difference:
    """The numbers of one quantity; `slack` is r."""
    apart = _apart(stored, measured)  # d
    noise = _apart(measured, again)  # n
    beyond = apart - slack  # d - r
    return Difference(
        values=len(apart),
        worst=float(apart.max()),
        mean=float(apart.mean()),
        beyond_worst=float(beyond.max()),
        beyond_mean=float(beyond.mean()),
        slack_worst=float(slack.max()),
        noise_worst=float(noise.max()),
        noise_mean=float(noise.mean()),
    )


def rounding(stored: np.ndarray, bits: int) -> np.ndarray:
    """What rounding to nearest did at most, half of the last bit: r = |stored| * 2**-(bits + 1)."""
    finite = np.where(np.isfinite(stored), stored, 0.0)
    half: np.ndarray = np.abs(finite) * 2.0 ** -(bits + 1)
    return half


def _compare_draws(measured: "Numbers", again: "Numbers") -> Difference:
    """The mean over N positions against its expectation, 0.

    Positions are drawn apart, so the variance of the mean is (sum of the variances) / N^2.
    """
    mean = measured["draws"].mean(dtype=np.float64, keepdims=True)
    mean_again = again["draws"].mean(dtype=np.float64, keepdims=True)
    variances = measured["draws_variance"].sum(dtype=np.float64, keepdims=True)
    chance = DEVIATIONS * np.sqrt(variances) / len(measured["draws"])
    return difference(np.zeros(1), mean, again=mean_again, slack=chance)


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| in float64.

    It is 0 where both are -inf, and `BOUNDLESS` where only one is or a number is missing.
    """
    with np.errstate(invalid="ignore"):  # -inf - -inf
        apart = np.abs(a.astype(np.float64) - b)
    apart = np.where(a == b, 0.0, apart)
    bounded: np.ndarray = np.nan_to_num(apart, nan=BOUNDLESS, posinf=BOUNDLESS)
    return bounded
