"""Soft targets between memory and columns: rounding, flattening, and the way back.

N scored tokens, K entries, V vocabulary. On disk a row's [N, K] arrays are flat lists, row-major.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .errors import IntegrityError

EXACT_BITS = 23
"""Mantissa bits of float32: keeping all of them changes nothing."""


def round_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """Float32 values with `bits` bits of mantissa (1 to 23), rounded to nearest, ties to even; infinities kept.

    The relative error is at most 2**-(bits + 1). The zeroed low bytes compress to almost nothing.
    """
    if not 1 <= bits <= EXACT_BITS:
        raise ValueError(f"mantissa bits must be between 1 and {EXACT_BITS} (got {bits})")
    values = np.asarray(values, dtype=np.float32)
    if bits == EXACT_BITS:
        return values
    drop = np.uint32(EXACT_BITS - bits)
    pattern = values.view(np.uint32)
    half = np.uint32((1 << (int(drop) - 1)) - 1) + ((pattern >> drop) & np.uint32(1))
    rounded = ((pattern + half) >> drop << drop).view(np.float32)
    return np.where(np.isnan(values), values, rounded)


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """The teacher's distribution at N positions, K entries each."""

    ids: np.ndarray | None
    """[N, K] int32 token ids, best first; None: all of the vocabulary, in id order."""
    logprobs: np.ndarray
    """[N, K] float32 natural-log probabilities of the full softmax."""
    tail_logprob: np.ndarray
    """[N] float32 log probability outside the entries; -inf if there is none."""
    token_logprob: np.ndarray
    """[N] float32 log probability of the token that is there."""
    entropy: np.ndarray
    """[N] float32 entropy of the full distribution, nats."""

    def __post_init__(self) -> None:
        n, k = self.logprobs.shape
        shapes = {"tail_logprob": (n,), "token_logprob": (n,), "entropy": (n,), "ids": (n, k)}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise IntegrityError(f"soft targets: {name} has shape {array.shape}, logprobs {(n, k)} ask for {shape}")

    def columns(self, mantissa_bits: int) -> dict[str, Any]:
        """The columns of a `soft_targets` row that hold the distribution; floats rounded to `mantissa_bits`."""
        n, k = self.logprobs.shape
        kept = np.exp(self.logprobs).sum(axis=1, dtype=np.float64)
        return {
            "ids": None if self.ids is None else self.ids.astype(np.int32, copy=False).reshape(-1),
            "logprobs": round_mantissa(self.logprobs, mantissa_bits).reshape(-1),
            "tail_logprob": round_mantissa(self.tail_logprob, mantissa_bits),
            "token_logprob": round_mantissa(self.token_logprob, mantissa_bits),
            "entropy": round_mantissa(self.entropy, mantissa_bits),
            "mantissa_bits": mantissa_bits,
            "kept_mass": float(np.minimum(kept, 1.0).mean()) if n else 1.0,
            "k": k,
            "span_tokens": n,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "SoftTargets":
        """Read the columns that `columns` wrote."""
        n, k = row["span_tokens"], row["k"]
        expected = {"ids": n * k, "logprobs": n * k, "tail_logprob": n, "token_logprob": n, "entropy": n}
        for name, length in expected.items():
            if row[name] is not None and len(row[name]) != length:
                raise IntegrityError(
                    f"soft_targets row: {name} has {len(row[name])} values, expected {length} (span_tokens {n}, "
                    f"k {k}): each scored token has its own target."
                )
        return cls(
            ids=None if row["ids"] is None else np.asarray(row["ids"], np.int32).reshape(n, k),
            logprobs=np.asarray(row["logprobs"], np.float32).reshape(n, k),
            tail_logprob=np.asarray(row["tail_logprob"], np.float32),
            token_logprob=np.asarray(row["token_logprob"], np.float32),
            entropy=np.asarray(row["entropy"], np.float32),
        )

    def normalised(self) -> "SoftTargets":
        """Entries and tail rescaled, in log space, so that each position sums to 1; so a divergence is never negative.

        Rounding moves the sum by up to 2**-(bits + 1) * sum(p * |log p|). `token_logprob` and `entropy` stay as stored.
        """
        total = self.log_total()
        if not np.isfinite(total).all():
            raise IntegrityError("soft targets: a position has no probability at all. Run `stillroom verify`.")
        return replace(
            self,
            logprobs=(self.logprobs - total[:, None]).astype(np.float32),
            tail_logprob=(self.tail_logprob - total).astype(np.float32),
        )

    def log_total(self) -> np.ndarray:
        """[N] float64 log of the sum of entries and tail: 0 but for rounding."""
        largest = np.maximum(self.logprobs.max(axis=1, initial=-np.inf), self.tail_logprob)
        shift = np.where(np.isfinite(largest), largest, 0.0).astype(np.float32)
        kept = np.exp(self.logprobs - shift[:, None]).sum(axis=1, dtype=np.float64)
        with np.errstate(divide="ignore"):
            return np.log(kept + np.exp(self.tail_logprob - shift, dtype=np.float64)) + shift
