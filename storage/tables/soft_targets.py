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

EXACT_BITS = 23
"""Mantissa bits of float32: keeping all of them changes nothing."""

_DTYPES: dict[str, Any] = {
    "entries": np.int32,
    "ids": np.int32,
    "logprobs": np.float32,
    "counts": np.int32,
    "weights": np.float32,
    "tail_logprob": np.float32,
    "token_logprob": np.float32,
    "entropy": np.float32,
    "temperatures": np.float32,
    "tempered_tails": np.float32,
}
LISTS = tuple(_DTYPES)
"""The list columns that hold a distribution: with `k` and `span_tokens`, all that
`normalised_targets` reads."""
_PADDING = {"ids": -1, "logprobs": -np.inf, "counts": 0, "weights": 0.0}
"""The lists with a number for each entry, and what fills the places of shorter positions."""

_VALUES = 1 << 17  # entries normalised at once: more would leave the processor's cache


def round_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """Float32 values with `bits` bits of mantissa (1 to 23), rounded to nearest, ties to even.

    Infinities are kept.

    The relative error is at most 2**-(bits + 1). The zeroed low bytes compress to almost nothing.
    """
    if not 1 <= bits <= EXACT_BITS:
        raise ValueError(f"mantissa bits must be between 1 and {EXACT_BITS} (got {bits})")
    values = np.asarray(values, dtype=np.float32)
    if bits == EXACT_BITS:
        return values
    drop = EXACT_BITS - bits
    pattern = values.view(np.uint32)
    # Adding just under half of the last bit kept, and that bit itself, carries into it where the
    # rest is above half, or is half and the bit odd.
    under_half = np.uint32((1 << (drop - 1)) - 1)
    last_kept = (pattern >> np.uint32(drop)) & np.uint32(1)
    carried = pattern + under_half + last_kept
    rounded = (carried >> np.uint32(drop) << np.uint32(drop)).view(np.float32)
    return np.where(np.isnan(values), values, rounded)


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """The teacher's distribution at N positions, at most K entries each.

    `topk` and `topp` have ids, logprobs and a tail; `full` has logprobs of the whole vocabulary;
    `sampled` has ids with counts, or with weights where they were not drawn from the teacher
    itself, and no tail.
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
        for name, shape in self._shapes(n, k).items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise IntegrityError(
                    f"soft targets: {name} has shape {array.shape}, entries {(n, k)} ask for "
                    f"{shape}"
                )
        widest = k if self.entries is None else int(self.entries.max(initial=0))
        if widest != k:
            raise IntegrityError(f"soft targets: {k} columns for at most {widest} entries")

    def _shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """What the arrays must have beside entries of [n, k]."""
        per_position = ("tail_logprob", "token_logprob", "entropy", "entries")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(per_position, (n,))
        shapes["ids"] = (n, k)
        m = 0 if self.temperatures is None else len(self.temperatures)
        shapes["temperatures"] = (m,)
        shapes["tempered_tails"] = (n, m)
        return shapes

    @property
    def _stated(self) -> np.ndarray:
        """[N, K] the one of `logprobs`, `counts` and `weights` that is there."""
        return next(x for x in (self.logprobs, self.counts, self.weights) if x is not None)

    def columns(self, mantissa_bits: int) -> dict[str, Any]:
        """The columns of a `soft_targets` row that hold the distribution.

        Floats are rounded to `mantissa_bits`.

        `k` is the widest position's number of entries; a kind that has a limit or draws (`topp`,
        `sampled`) says that.
        """
        lists = {name: self._column(name, mantissa_bits) for name in LISTS}
        n, k = self._stated.shape
        numbers = {
            "mantissa_bits": mantissa_bits,
            "kept_mass": self._kept_mass(),
            "k": k,
            "span_tokens": n,
        }
        return lists | numbers

    def _kept_mass(self) -> float | None:
        """Mean over the positions of min(1, sum_i p_i); None: drawn entries keep no mass."""
        if self.logprobs is None:
            return None
        if not len(self.logprobs):
            return 1.0
        held = np.exp(self.logprobs).sum(axis=1, dtype=np.float64)
        return float(np.minimum(held, 1.0).mean())

    def _column(self, name: str, mantissa_bits: int) -> np.ndarray | None:
        values: np.ndarray | None = getattr(self, name)
        if values is None:
            return None
        if name == "temperatures":  # names, to be found again: never rounded
            return values.astype(np.float32, copy=False)
        if name in _PADDING and self.entries is not None:
            values = values[_used(self.entries, values.shape[1])]
        flat = values.reshape(-1)
        if _DTYPES[name] is np.float32:
            return round_mantissa(flat, mantissa_bits)
        return flat.astype(np.int32, copy=False)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "SoftTargets":
        """Read the columns that `columns` wrote; columns of other kinds may be null or absent.

        Raises:
            IntegrityError: a list does not have the length that `span_tokens`, `k` and `entries`
                ask for.
        """
        n, k = row["span_tokens"], row["k"]
        there = [name for name in LISTS if row.get(name) is not None]
        found = {name: np.asarray(row[name], _DTYPES[name]) for name in there}
        entries = found.get("entries")
        if entries is not None and entries.min(initial=0) < 0:
            raise IntegrityError(f"soft_targets row: a position has {entries.min()} entries.")
        temperatures = len(found.get("temperatures", ()))
        lengths = dict.fromkeys(LISTS, n)
        lengths |= dict.fromkeys(_PADDING, n * k if entries is None else int(entries.sum()))
        lengths |= {"temperatures": temperatures, "tempered_tails": n * temperatures}
        for name, values in found.items():
            expected = lengths[name]
            if len(values) != expected:
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
        """[N, K] float32 the teacher's probabilities of the entries, or a draw's estimates."""
        stated = self._stated
        if stated is self.logprobs:
            probabilities: np.ndarray = np.exp(stated)
            return probabilities
        if stated is self.counts:
            draws = stated.sum(axis=1, keepdims=True)
            shares: np.ndarray = stated / draws
            return shares.astype(np.float32)
        return stated

    def positions(self, part: slice | np.ndarray) -> "SoftTargets":
        """The targets of some of the positions."""
        there = [name for name in LISTS if getattr(self, name) is not None]
        found = {name: getattr(self, name)[part] for name in there if name != "temperatures"}
        if self.entries is not None:
            width = int(found["entries"].max(initial=0))
            for name in _PADDING.keys() & found.keys():
                found[name] = found[name][:, :width]
        return replace(self, **found)

    def normalised(self) -> "SoftTargets":
        """Entries and tail rescaled, in log space, so that each position sums to 1.

        So a divergence is never negative.

        Rounding moves the sum by up to 2**-(bits + 1) * sum(p * |log p|). `token_logprob` and
        `entropy` stay as stored; a tempered tail, a sum of p^(1/T), moves by total / T. Sampled
        targets stay as they are: their mean is the teacher, rescaled it would not be.
        """
        if self.logprobs is None or self.tail_logprob is None:
            return self
        # l_i - log(sum of entries and tail), for entries and tail alike
        total = log_total(self.logprobs, self.tail_logprob).astype(np.float32)
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


def log_total(logprobs: np.ndarray, tail_logprob: np.ndarray) -> np.ndarray:
    """[N] float64 log of the sum of entries [N, K] and tail [N]: 0 but for rounding."""
    # Log probabilities that sum to about 1: exponentials neither overflow nor all vanish, so
    # nothing is shifted.
    kept = np.exp(logprobs).sum(axis=1)
    with np.errstate(divide="ignore"):
        total: np.ndarray = np.log(kept + np.exp(tail_logprob, dtype=np.float64))
        return total


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
    spans = rows.numbers("span_tokens").astype(np.int64)
    k = rows.numbers("k").astype(np.int64)
    for row in np.flatnonzero(~aligned(rows, spans, k)):
        SoftTargets.from_row(rows[row])  # raises
    # Neighbours with the same k, lists and temperatures are decoded as one row.
    stored = np.stack([rows.present(name) for name in LISTS], axis=1)
    kinds = np.column_stack([k, stored, temperature_codes(rows)])
    for start, stop in runs_alike(kinds, spans * k):
        edges = np.concatenate([[0], np.cumsum(spans[start:stop])]).tolist()
        names = [name for name, there in zip(LISTS, stored[start], strict=True) if there]
        lists = {name: joined_list(rows, name, start, stop) for name in names}
        joined = {"span_tokens": edges[-1], "k": int(k[start]), **lists}
        whole = SoftTargets.from_row(joined).normalised()
        for first, last in pairwise(edges):
            yield whole.positions(slice(first, last))


def joined_list(rows: Rows, name: str, start: int, stop: int) -> np.ndarray:
    """The list of rows `start` to `stop`, one after another.

    Temperatures, which the rows share, are there once.
    """
    offsets, values = rows.flat(name)
    last = start + 1 if name == "temperatures" else stop
    return values[offsets[start] : offsets[last]]


def aligned(rows: Rows, spans: np.ndarray, k: np.ndarray) -> np.ndarray:
    """[R] whether the row's lists have the lengths that its spans, k and entries ask for."""
    offsets, entries = rows.flat("entries")
    before = np.concatenate([[0], np.cumsum(entries, dtype=np.int64)])
    counted = np.diff(before[offsets])  # sum of each row's `entries`
    expected = dict.fromkeys(LISTS, spans)
    expected |= dict.fromkeys(_PADDING, np.where(rows.present("entries"), counted, spans * k))
    expected["temperatures"] = np.diff(rows.flat("temperatures")[0])  # as many as there are
    expected["tempered_tails"] = spans * expected["temperatures"]
    fits = np.ones(len(rows), bool)
    for name in LISTS:
        lengths = np.diff(rows.flat(name)[0])
        fits &= ~rows.present(name) | (lengths == expected[name])
    return fits


def temperature_codes(rows: Rows) -> np.ndarray:
    """[R] a number for each row's list of temperatures; equal lists have equal numbers."""
    offsets, values = rows.flat("temperatures")
    if not len(values):
        return np.zeros(len(rows), np.int64)
    numbers: dict[bytes, int] = {}
    lists = (values[start:stop].tobytes() for start, stop in pairwise(offsets))
    return np.array([numbers.setdefault(found, len(numbers)) for found in lists])


def runs_alike(kinds: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Neighbouring rows of one kind, no more together than a cache holds."""
    changes = (kinds[1:] != kinds[:-1]).any(axis=1).tolist()
    start, held = 0, 0
    for row, (size, changed) in enumerate(zip(sizes.tolist(), [*changes, True], strict=True)):
        held += size
        if changed or held >= _VALUES:
            yield start, row + 1
            start, held = row + 1, 0
