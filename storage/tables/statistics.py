"""Statistics: what a shard says of all its soft targets, for people and for the choice of K."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per kind: rows, scored tokens, entries per token, and the mass that the entries keep.

    The mass has a mean and quantiles.

    Kinds whose positions differ have quantiles of their entries; sampled targets have no mass that
    is kept.
    """
    result: dict[str, Any] = {}
    for kind in sorted({row["kind"] for row in rows}):
        chosen = [row for row in rows if row["kind"] == kind]
        tokens = sum(row["span_tokens"] for row in chosen)
        total = sum(len(row["logprobs"] if row["ids"] is None else row["ids"]) for row in chosen)
        result[kind] = {"rows": len(chosen), "tokens": tokens, "entries_per_token": total / tokens}
        if any(row["entries"] is not None for row in chosen):
            entries = [
                np.full(row["span_tokens"], row["k"]) if row["entries"] is None else row["entries"]
                for row in chosen
            ]
            result[kind]["entries"] = _quantiles(np.concatenate(entries), 0.5, 0.99)
        if chosen[0]["tail_logprob"] is not None:
            tail = np.concatenate([row["tail_logprob"] for row in chosen]).astype(np.float64)
            result[kind]["kept_mass"] = _quantiles(1 - np.exp(tail), 0.01, 0.1, 0.5)
    return result


def _quantiles(values: np.ndarray, *at: float) -> dict[str, float]:
    found = np.quantile(values, at)
    return {"mean": float(values.mean())} | {
        f"q{round(q * 100):02}": float(x) for q, x in zip(at, found, strict=True)
    }
