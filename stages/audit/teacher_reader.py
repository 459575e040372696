"""Reading stored rows again: each alone, and among others, so that the difference shows what the arithmetic may do."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..models.head import check_head, hidden_states, split_head
from ..models.identity import Identity
from ..models.loading import load_causal_lm
from ..targets.alignment import predicting_positions
from .numbers import Numbers, entries_alone, remeasure, stored_numbers
from .rescore import DEVIATIONS, Difference, Row

BOUNDLESS = 1e6
"""Nats, in place of infinity, which JSON does not have."""


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
        return self.excess_worst <= limit.tolerance_worst and self.excess_mean <= limit.tolerance_mean


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What came of reading a row again."""

    parts: dict[str, Part]
    entropy: np.ndarray
    """[N] by the teacher."""


class Reader:
    """A teacher that reads rows."""

    def __init__(self, teacher: Identity, *, device_map: str | None = None) -> None:
        self._model = load_causal_lm(teacher, device_map=device_map)
        check_head(self._model)
        self._head = split_head(self._model)
        self.eps: float = torch.finfo(self._head.weight.dtype).eps
        """Of the dtype that it computes in."""

    def read(self, rows: Sequence[Row]) -> list[Reading]:
        """Read each row alone, and all of them together."""
        together = self._states([row.columns["token_ids"] for row in rows], padding=1)
        found = []
        for row, states in zip(rows, together, strict=True):
            measured = self.measured(row, row.targets)
            again = self._measured(row, row.targets, states, row.span[0] - 1)
            three = [stored_numbers(row.targets), measured, again]
            if row.imported:
                start, n = row.span
                following = row.columns["token_ids"][start : start + n]
                three = [entries_alone(numbers, row.targets, following) for numbers in three]
            parts = compare(*three, bits=row.columns["mantissa_bits"])
            found.append(Reading(parts=parts, entropy=measured["entropy"]))
        return found

    def measured(self, row: Row, targets: SoftTargets, *, position: int | None = None) -> Numbers:
        """`remeasure` targets of a row, read alone, from a position on; None: from where the row's own span starts."""
        (states,) = self._states([row.columns["token_ids"]])
        return self._measured(row, targets, states, row.span[0] - 1 if position is None else position)

    def _measured(self, row: Row, targets: SoftTargets, states: Tensor, position: int) -> Numbers:
        n = len(targets.entropy)
        tokens = row.columns["token_ids"]
        following = torch.from_numpy(np.append(tokens, 0)[position + 1 : position + 1 + n].astype(np.int64))
        with torch.inference_mode():
            return remeasure(
                states[predicting_positions(position + 1, n)], self._head, targets, following, draw=row.draw
            )

    def _states(self, texts: Sequence[np.ndarray], *, padding: int = 0) -> list[Tensor]:
        """[T, D] of each text, read together; the longest has `padding` positions after it, the others more."""
        width = max(map(len, texts)) + padding
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, text in enumerate(texts):
            ids[number, : len(text)] = torch.from_numpy(text.astype(np.int64))
            mask[number, : len(text)] = 1
        device = self._model.device
        with torch.inference_mode():
            hidden = hidden_states(self._model, input_ids=ids.to(device), attention_mask=mask.to(device))
        return [states[: len(text)] for states, text in zip(hidden, texts, strict=True)]


def compare(stored: Numbers, measured: Numbers, again: Numbers, *, bits: int) -> dict[str, Part]:
    """Stored numbers against a reading, and that against another one, per quantity."""
    parts = {}
    for name, values in stored.items():
        rounding = np.abs(np.where(np.isfinite(values), values, 0.0)) * 2.0 ** -(bits + 1)
        parts[name] = _part(_apart(values, measured[name]), rounding, _apart(measured[name], again[name]))
    if "draws" in measured:
        now, then = (np.array([numbers["draws"].mean(dtype=np.float64)]) for numbers in (measured, again))
        chance = DEVIATIONS * np.sqrt([measured["draws_variance"].sum(dtype=np.float64)]) / len(measured["draws"])
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
