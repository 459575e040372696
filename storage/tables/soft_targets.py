"""Soft targets between memory and columns: rounding, flattening, and the way back.

N scored tokens, K entries, V vocabulary. In memory the entries are [N, K] arrays; where positions
differ in how many they have (`topp`, `sampled`), K is the widest position's number and the rest is
padding. On disk they are flat lists, one position after another, without padding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import IntegrityError
from .rows import Rows

LISTS = (
    *(
        "entries",
        "ids",
        "logprobs",
        "counts",
        "weights",
        "tail_logprob",
        "token_logprob",
        "entropy",
    ),
    *("temperatures", "tempered_tails"),
)
"""The list columns that hold a distribution: with `k` and `span_tokens`, all that
`normalised_targets` reads."""

_PER_ENTRY = {"ids", "logprobs", "counts", "weights"}

_VALUES = 1 << 17  # entries normalised at once: more would leave the processor's cache


EXACT_BITS = 23
"""Mantissa bits of float32: keeping all of them changes nothing."""
_LISTS: dict[str, Any] = dict.fromkeys(("entries", "ids", "counts"), np.int32)
_LISTS |= dict.fromkeys(("logprobs", "weights", "tail_logprob", "tempered_tails"), np.float32)
_LISTS |= dict.fromkeys(("temperatures", "token_logprob", "entropy"), np.float32)
_PER_POSITION = tuple(name for name in _LISTS if name != "temperatures")
_PADDING = {"ids": -1, "logprobs": -np.inf, "counts": 0, "weights": 0.0}


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
    """The teacher's distribution at N positions, at most K entries each.

    `topk` and `topp` have ids, logprobs and a tail; `full` has logprobs of the whole vocabulary; `sampled` has ids with
    counts, or with weights where they were not drawn from the teacher itself, and no tail.
    """

    ids: np.ndarray | None
    """[N, K] int32 token ids, best first, -1 for padding; None: all of the vocabulary, in id
    order."""
    logprobs: np.ndarray | None
    """[N, K] float32 natural-log probabilities of the full softmax, -inf for padding; None:
    sampled."""
    tail_logprob: np.ndarray | None
    """[N] float32 log probability outside the entries, -inf if there is none; None: sampled."""
    token_logprob: np.ndarray
    """[N] float32 log probability of the token that is there."""
    entropy: np.ndarray
    """[N] float32 entropy of the full distribution, nats; sampled: of the one that was drawn
    from."""
    entries: np.ndarray | None = None
    """[N] int32 entries of each position; None: K everywhere."""
    counts: np.ndarray | None = None
    """[N, K] int32 how often each id was drawn, 0 for padding; counts / draws has the teacher as
    its mean."""
    weights: np.ndarray | None = None
    """[N, K] float32 estimate of the probability of each id, 0 for padding; its mean is the
    teacher."""
    temperatures: np.ndarray | None = None
    """[m] float32 other temperatures than 1 that can be had of the entries, ascending; None: none.

    sampled: [1], the one whose distribution was drawn from. `full` has all temperatures and names
    none.
    """
    tempered_tails: np.ndarray | None = None
    """[N, m] float32 log of the sum of p_i^(1/T) over the ids that are no entry (sampled: over all
    ids).

    p is the softmax at temperature 1, so the log-normaliser of softmax(z / T) in these terms is
    logaddexp(logsumexp(logprobs / T), tempered_tails).
    """

    def __post_init__(self) -> None:
        stated = [x for x in (self.logprobs, self.counts, self.weights) if x is not None]
        if len(stated) != 1:
            raise IntegrityError(
                f"soft targets: {len(stated)} of logprobs, counts and weights are there, expected "
                "one"
            )
        n, k = stated[0].shape
        shapes = dict.fromkeys(("tail_logprob", "token_logprob", "entropy", "entries"), (n,)) | {
            "ids": (n, k)
        }
        if self.temperatures is not None or self.tempered_tails is not None:
            m = 0 if self.temperatures is None else len(self.temperatures)
            shapes |= {"temperatures": (m,), "tempered_tails": (n, m)}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise IntegrityError(
                    f"soft targets: {name} has shape {array.shape}, entries {(n, k)} ask for "
                    f"{shape}"
                )
        widest = k if self.entries is None else int(self.entries.max(initial=0))
        if widest != k:
            raise IntegrityError(f"soft targets: {k} columns for at most {widest} entries")

    def columns(self, mantissa_bits: int) -> dict[str, Any]:
        """The columns of a `soft_targets` row that hold the distribution; floats rounded to `mantissa_bits`.

        `k` is the widest position's number of entries; a kind that has a limit or draws (`topp`, `sampled`) says that.
        """
        n = len(self.token_logprob)
        kept = (
            None if self.logprobs is None else np.exp(self.logprobs).sum(axis=1, dtype=np.float64)
        )
        return {name: self._column(name, mantissa_bits) for name in _LISTS} | {
            "mantissa_bits": mantissa_bits,
            "kept_mass": None
            if kept is None
            else float(np.minimum(kept, 1.0).mean())
            if n
            else 1.0,
            "k": next(
                x.shape[1] for x in (self.logprobs, self.counts, self.weights) if x is not None
            ),
            "span_tokens": n,
        }

    def _column(self, name: str, mantissa_bits: int) -> np.ndarray | None:
        values: np.ndarray | None = getattr(self, name)
        if values is None:
            return None
        if name == "temperatures":  # names, to be found again
            return values.astype(np.float32, copy=False)
        if name == "tempered_tails":
            values = values.reshape(-1)
        if values.ndim == 2:
            values = (
                values.reshape(-1)
                if self.entries is None
                else values[_used(self.entries, values.shape[1])]
            )
        if _LISTS[name] is np.float32:
            return round_mantissa(values, mantissa_bits)
        return values.astype(np.int32, copy=False)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "SoftTargets":
        """Read the columns that `columns` wrote; columns of other kinds may be null or absent.

        Raises:
            IntegrityError: a list does not have the length that `span_tokens`, `k` and `entries`
                ask for.
        """
        n, k = row["span_tokens"], row["k"]
        found = {
            name: np.asarray(row[name], kind)
            for name, kind in _LISTS.items()
            if row.get(name) is not None
        }
        entries = found.get("entries")
        temperatures = len(found.get("temperatures", ()))
        lengths = dict.fromkeys(_PADDING, n * k if entries is None else int(entries.sum()))
        lengths |= {"temperatures": temperatures, "tempered_tails": n * temperatures}
        for name, values in found.items():
            if len(values) != (expected := lengths.get(name, n)):
                raise IntegrityError(
                    f"soft_targets row: {name} has {len(values)} values, expected {expected} "
                    f"(span_tokens {n}, k {k}): each scored token has its own target."
                )
        if "tempered_tails" in found:
            found["tempered_tails"] = found["tempered_tails"].reshape(n, temperatures)
        for name in _PADDING.keys() & found.keys():
            found[name] = _widened(found[name], (n, k), entries, _PADDING[name])
        nothing: dict[str, Any] = dict.fromkeys(("ids", "logprobs", "tail_logprob"))
        return cls(**nothing | found)

    @property
    def probabilities(self) -> np.ndarray:
        """[N, K] float32 what the entries say of the teacher: its probabilities, or a draw's estimate of them."""
        if self.weights is not None:
            return self.weights
        if self.counts is not None:
            return (self.counts / self.counts.sum(axis=1, keepdims=True)).astype(np.float32)
        assert self.logprobs is not None
        return np.exp(self.logprobs)

    def positions(self, part: slice) -> "SoftTargets":
        """The targets of some of the positions."""
        found = {
            name: values[part]
            for name in _PER_POSITION
            if (values := getattr(self, name)) is not None
        }
        if self.entries is not None:
            width = int(found["entries"].max(initial=0))
            found |= {name: found[name][:, :width] for name in _PADDING.keys() & found.keys()}
        return replace(self, **found)

    def normalised(self) -> "SoftTargets":
        """Entries and tail rescaled, in log space, so that each position sums to 1; so a divergence is never negative.

        Rounding moves the sum by up to 2**-(bits + 1) * sum(p * |log p|). `token_logprob` and
        `entropy` stay as stored; a tempered tail, a sum of p^(1/T), moves by total / T. Sampled
        targets stay as they are: their mean is the teacher, rescaled it would not be.
        """
        if self.logprobs is None or self.tail_logprob is None:
            return self
        total = self.log_total().astype(np.float32)
        if not np.isfinite(total).all():
            raise IntegrityError(
                "soft targets: a position has no probability at all. Run `stillroom verify`."
            )
        tempered = self.tempered_tails
        if tempered is not None and self.temperatures is not None:
            tempered = tempered - total[:, None] / self.temperatures
        return replace(
            self,
            logprobs=self.logprobs - total[:, None],
            tail_logprob=self.tail_logprob - total,
            tempered_tails=tempered,
        )

    def log_total(self) -> np.ndarray:
        """[N] float64 log of the sum of entries and tail: 0 but for rounding.

        Not for sampled targets.
        """
        assert self.logprobs is not None
        assert self.tail_logprob is not None
        # Log probabilities that sum to about 1: exponentials neither overflow nor all vanish, so
        # nothing is shifted.
        kept = np.exp(self.logprobs).sum(axis=1)
        with np.errstate(divide="ignore"):
            return np.log(kept + np.exp(self.tail_logprob, dtype=np.float64))


def _used(entries: np.ndarray, k: int) -> np.ndarray:
    """[N, K] which places hold an entry."""
    return np.arange(k) < entries[:, None]


def _widened(
    flat: np.ndarray, shape: tuple[int, int], entries: np.ndarray | None, padding: float
) -> np.ndarray:
    """[N, K] of a flat list."""
    if entries is None:
        return flat.reshape(shape)
    wide = np.full((len(entries), int(entries.max(initial=0))), padding, flat.dtype)
    wide[_used(entries, wide.shape[1])] = flat
    return wide


def normalised_targets(rows: Rows) -> Iterator[SoftTargets]:
    """`SoftTargets.from_row(row).normalised()` of each row; neighbours share memory.

    Raises:
        IntegrityError: a list does not have the length that its row asks for, or a position has no
            probability.
    """
    spans, k = rows.numbers("span_tokens").astype(np.int64), rows.numbers("k").astype(np.int64)
    stored = np.stack([rows.present(name) for name in LISTS], axis=1)
    for row in np.flatnonzero(~_aligned(rows, spans, k)):
        SoftTargets.from_row(rows[row])  # raises
    for start, stop in _runs(np.column_stack([k, stored, _temperatures(rows)]), spans * k):
        edges = np.concatenate([[0], np.cumsum(spans[start:stop])]).tolist()
        lists = {
            name: rows.flat(name) for name, there in zip(LISTS, stored[start], strict=True) if there
        }
        part = {
            name: values[offsets[start] : offsets[stop]]
            for name, (offsets, values) in lists.items()
        }
        if "temperatures" in lists:  # one list for all of the run
            offsets, values = lists["temperatures"]
            part["temperatures"] = values[offsets[start] : offsets[start + 1]]
        whole = SoftTargets.from_row(
            {"span_tokens": edges[-1], "k": int(k[start]), **part}
        ).normalised()
        yield from (whole.positions(slice(*pair)) for pair in pairwise(edges))


def _aligned(rows: Rows, spans: np.ndarray, k: np.ndarray) -> np.ndarray:
    """[R] whether the row's lists have the lengths that its spans, k and entries ask for."""
    offsets, entries = rows.flat("entries")
    counted = np.concatenate([[0], np.cumsum(entries, dtype=np.int64)])[offsets]
    total = np.where(rows.present("entries"), np.diff(counted), spans * k)
    expected = dict.fromkeys(LISTS, spans) | dict.fromkeys(_PER_ENTRY, total)
    expected["temperatures"] = np.diff(rows.flat("temperatures")[0])
    expected["tempered_tails"] = spans * expected["temperatures"]
    fits = np.ones(len(rows), bool)
    for name in LISTS:
        fits &= ~rows.present(name) | (np.diff(rows.flat(name)[0]) == expected[name])
    return fits


def _temperatures(rows: Rows) -> np.ndarray:
    """[R] a number for each row's list of temperatures; equal lists have equal numbers."""
    offsets, values = rows.flat("temperatures")
    if not len(values):
        return np.zeros(len(rows), np.int64)
    numbers: dict[bytes, int] = {}
    lists = (values[start:stop].tobytes() for start, stop in pairwise(offsets))
    return np.array([numbers.setdefault(found, len(numbers)) for found in lists])


def _runs(kinds: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Neighbouring rows of one kind, no more together than a cache holds."""
    changes = (kinds[1:] != kinds[:-1]).any(axis=1).tolist()
    start, held = 0, 0
    for row, (size, changed) in enumerate(zip(sizes.tolist(), [*changes, True], strict=True)):
        held += size
        if changed or held >= _VALUES:
            yield start, row + 1
            start, held = row + 1, 0
