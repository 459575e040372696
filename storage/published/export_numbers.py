"""Numbers of an export for its card.

How long the texts are, what the entries keep, and how unsure the teacher is.
"""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from ..tables.kinds import STRUCTURES
from ..tables.spans import scored_tokens

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
_BINS = 10_000


class Spread:
    """Mean, quantiles and largest of numbers from 0 to a limit, in bounded memory.

    Quantiles are exact to 1/10,000 of the limit.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._counts = np.zeros(_BINS, np.int64)
        self._sum, self._most = 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Count some numbers; those beyond the limit count as the limit."""
        values = np.clip(np.asarray(values, np.float64), 0, self._limit)
        places = np.minimum(values / self._limit * _BINS, _BINS - 1).astype(np.int64)
        self._counts += np.bincount(places, minlength=_BINS)
        self._sum += float(values.sum())
        self._most = max(self._most, float(values.max(initial=0.0)))

    def numbers(self) -> dict[str, float] | None:
        """Mean, quantiles and largest; None if nothing was added."""
        below = np.cumsum(self._counts)  # numbers in each bin and those before it
        total = below[-1]
        if not total:
            return None
        found = {}
        for name, share in QUANTILES.items():
            place = int(np.searchsorted(below, share * total))
            middle = (place + 0.5) * self._limit / _BINS
            found[name] = round(min(middle, self._most), 6)
        found["mean"] = round(self._sum / int(total), 6)
        found["max"] = round(self._most, 6)
        return found


class Lengths:
    """Total, mean, quantiles and largest of tokens a row, exact."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, values: np.ndarray) -> None:
        """Count some lengths."""
        lengths, counts = np.unique(values, return_counts=True)
        self._counts.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))

    def numbers(self) -> dict[str, float]:
        """All zero if nothing was added."""
        if not self._counts:
            return dict.fromkeys(("total", "mean", *QUANTILES, "max"), 0)
        lengths = np.array(sorted(self._counts), np.int64)
        counts = np.array([self._counts[length] for length in lengths.tolist()], np.int64)
        below = np.cumsum(counts)  # rows of each length and shorter
        rows = below[-1]
        places = {name: np.searchsorted(below, share * rows) for name, share in QUANTILES.items()}
        total = int(np.dot(lengths, counts))
        return {
            "total": total,
            "mean": round(total / int(rows), 2),
            **{name: int(lengths[place]) for name, place in places.items()},
            "max": int(lengths[-1]),
        }


class TargetNumbers:
    """Of the soft targets of one split."""

    def __init__(self, outcomes: int) -> None:
        """`outcomes`: what a distribution is over, V."""
        self._kinds: Counter[str] = Counter()
        self._tokens, self._scored, self._entries = Lengths(), Lengths(), Lengths()
        self._mass, self._entropy = Spread(1.0), Spread(float(np.log(max(outcomes, 2))))
        self._temperatures: set[float] | None = None

    def add(self, rows: pa.Table) -> None:
        """Count some rows."""
        self._kinds.update(rows["kind"].to_pylist())
        self._tokens.add(_lengths(rows["token_ids"]))
        spans, k = rows["span_tokens"].to_numpy(), rows["k"].to_numpy()
        self._scored.add(spans)
        entries = rows["entries"].combine_chunks()
        self._entries.add(np.asarray(entries.flatten()))
        fixed = np.asarray(entries.is_null())
        self._entries.add(np.repeat(k[fixed], spans[fixed]))
        self._entropy.add(np.asarray(rows["entropy"].combine_chunks().flatten()))
        tails = np.asarray(rows["tail_logprob"].combine_chunks().flatten(), np.float64)
        self._mass.add(1.0 - np.exp(tails))
        stored = map(_numbers, rows["temperatures"].to_pylist())
        for kind, others in set(zip(rows["kind"].to_pylist(), stored, strict=True)):
            self._meet(kind, set(others))

    def _meet(self, kind: str, others: set[float]) -> None:
        """Keep the temperatures that these rows can be read at too."""
        if STRUCTURES[kind].whole:  # at all of them
            return
        drawn_at_another = STRUCTURES[kind].drawn and others
        here = others if drawn_at_another else {1.0, *others}
        self._temperatures = here if self._temperatures is None else self._temperatures & here

    def numbers(self) -> dict[str, Any]:
        """As the manifest has them."""
        return {
            "kinds": dict(sorted(self._kinds.items())),
            "tokens": self._tokens.numbers(),
            "scored_tokens": self._scored.numbers(),
            "entries": self._entries.numbers(),
            "kept_mass": self._mass.numbers(),
            "entropy": self._entropy.numbers(),
            "temperatures": None if self._temperatures is None else sorted(self._temperatures),
        }


def _numbers(values: list[float] | None) -> tuple[float, ...]:
    """float32 as it was written."""
    return tuple(round(value, 6) for value in values or ())


class TextNumbers:
    """Of the generations of one split."""

    def __init__(self) -> None:
        self._prompts, self._completions = Lengths(), Lengths()
        self._tokens, self._scored = Lengths(), Lengths()
        self._finished: Counter[str] = Counter()

    def add(self, rows: pa.Table) -> None:
        """Count some rows."""
        prompts = rows["prompt_tokens"].to_numpy()
        completions = rows["completion_tokens"].to_numpy()
        tokens = prompts + completions
        self._prompts.add(prompts)
        self._completions.add(completions)
        self._tokens.add(tokens)
        self._scored.add(scored_tokens(rows))
        self._finished.update(rows["finish_reason"].to_pylist())

    def numbers(self) -> dict[str, Any]:
        """As the manifest has them."""
        return {
            "prompt_tokens": self._prompts.numbers(),
            "completion_tokens": self._completions.numbers(),
            "tokens": self._tokens.numbers(),
            "scored_tokens": self._scored.numbers(),
            "finish_reason": dict(sorted(self._finished.items())),
        }


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    return np.diff(np.asarray(lists.combine_chunks().offsets))
