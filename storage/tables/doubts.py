"""Doubts: bounds that the numbers of a stored row must keep, each with its equation.

`verify` asks for them, and whoever is about to learn from rows, of a row or of many as one long
row.

N scored tokens, K entries, V outcomes (ids of the vocabulary, or classes), b mantissa bits, p_ni
the teacher's probability of id i at position n. All log-probabilities are natural.

Where the tolerances come from: rounding moves a stored number l by at most |l| 2^-(b+1), so two of
them that should be equal differ by at most |l| 2^-b; and the teacher computed in half precision, so
that even its unrounded probabilities miss a sum of 1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .heads import head_of
from .invariants import aligned_targets, outcomes
from .kinds import STRUCTURES
from .soft_targets import SoftTargets
from .spans import positions, spans_of

SUM_TOLERANCE = 2e-3
"""Entries and tail may miss 1 by this much, besides what rounding does: teachers compute in half
precision."""
DEVIATIONS = 8.0
"""Standard deviations at which draws that miss the tokens that are there are no longer chance."""

Doubt = tuple[str, str]
"""A column, and what is wrong with it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Stated:
    """Entries whose log-probabilities are stored: those of every kind but `sampled`."""

    logprobs: np.ndarray
    """[N, K], -inf for padding."""
    probs: np.ndarray
    """[N, K] their probabilities."""
    tail: np.ndarray
    """[N] log-probability of all that is no entry."""
    entries: np.ndarray
    """[N] entries of each position."""
    least: np.ndarray
    """[N] log-probability of each position's last entry."""

    @classmethod
    def of(cls, targets: SoftTargets) -> "_Stated | None":
        """None: the entries were drawn."""
        logprobs, tail = targets.logprobs, targets.tail_logprob
        if logprobs is None or tail is None:
            return None
        n, k = logprobs.shape
        entries = np.full(n, k) if targets.entries is None else targets.entries
        least = logprobs[np.arange(n), entries - 1]
        with np.errstate(over="ignore"):  # no log probability: doubted by name
            return cls(logprobs, np.exp(logprobs), tail, entries, least)


def doubts(
    row: Mapping[str, Any], about: Mapping[str, Any], edges: np.ndarray | None = None
) -> Iterator[Doubt]:
    """What is wrong with the numbers of a soft-targets row whose shape holds.

    `edges`: of a long row (`runs`), which is asked as one.
    """
    targets = aligned_targets(row, about, joined=edges is not None)
    if edges is None:
        edges = np.array([0, len(targets.entropy)])
    stated = _Stated.of(targets)
    tokens = _tokens_there(row, targets, about)
    vocabulary, bits = about["vocab_size"], about["mantissa_bits"]
    yield from _doubtful_ids(row, targets, vocabulary)
    yield from _doubtful_entropy(targets.entropy, outcomes(about), bits)
    if (targets.token_logprob > _slack(0.0, bits)).any():
        yield "token_logprob", "a log probability is above 0"
    if stated is not None:
        yield from _doubtful_order(targets, stated, bits)
    yield from _doubtful_temperatures(targets, stated, vocabulary, bits)
    if stated is None:
        yield from _doubtful_draws(row, targets, tokens, edges)
        return
    yield from _doubtful_sums(row, stated, bits, edges)
    if tokens.min() < 0 or tokens.max() >= outcomes(about):
        return  # doubted above, and no distribution has a place for them
    if misplaced := _misplaced(targets, stated, tokens, bits):
        message = f"{misplaced} positions disagree with the entries about the token that follows"
        yield "token_logprob", message


def _tokens_there(
    row: Mapping[str, Any], targets: SoftTargets, about: Mapping[str, Any]
) -> np.ndarray:
    """[N] the outcomes that `token_logprob` speaks of."""
    head = head_of(about)
    if not head.in_labels:
        tokens: np.ndarray = row["token_ids"][positions(spans_of(row))]
        return tokens
    if head.masked:
        return np.asarray(row["labels"])
    label = row.get("label" if head.whole_text else "labels")
    labels = np.full(len(targets.entropy), -1) if label is None else np.atleast_1d(label)
    # The best stands in where there is no label.
    return np.where(labels < 0, targets.probabilities.argmax(axis=1), labels)


def _doubtful_ids(row: Mapping[str, Any], targets: SoftTargets, vocabulary: int) -> Iterator[Doubt]:
    if row["token_ids"].min() < 0 or row["token_ids"].max() >= vocabulary:
        yield "token_ids", f"a token id is outside the vocabulary of {vocabulary}"
        return
    if targets.ids is None:
        return
    if row["ids"].min() < 0 or row["ids"].max() >= vocabulary:
        yield "ids", f"an entry is outside the vocabulary of {vocabulary}"
    ordered = np.sort(targets.ids, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)  # padding is -1
    if repeated.any():
        yield "ids", "an id stands twice at one position"


def _doubtful_entropy(entropy: np.ndarray, outcomes: int, bits: int) -> Iterator[Doubt]:
    """0 <= H <= log V."""
    lowest = -_slack(0.0, bits)
    highest = np.log(outcomes) * 1.01 + 1e-3  # 1 %: rounding of H to as few as 6 bits
    if not ((entropy >= lowest) & (entropy <= highest)).all():
        yield "entropy", f"an entropy is outside 0 to log({outcomes}) nats"


def _doubtful_order(targets: SoftTargets, stated: _Stated, bits: int) -> Iterator[Doubt]:
    """No log p is above 0, and entries that have ids stand best first."""
    most = _slack(0.0, bits)
    if stated.logprobs.max() > most:
        yield "logprobs", "a log probability is above 0"
    if stated.tail.max() > most:
        yield "tail_logprob", "a log probability is above 0"
    if targets.ids is not None and (stated.logprobs[:, 1:] > stated.logprobs[:, :-1]).any():
        yield "logprobs", "entries are not in descending order"


def _doubtful_sums(
    row: Mapping[str, Any], stated: _Stated, bits: int, edges: np.ndarray
) -> Iterator[Doubt]:
    # held_n = sum_i p_ni
    held = (stated.probs @ np.ones(stated.probs.shape[1], np.float32)).astype(np.float64)
    # sum_i p_ni + tail_n = 1
    off = np.abs(held + np.exp(stated.tail, dtype=np.float64) - 1)
    # kept_mass = mean_n min(1, sum_i p_ni), of each row
    said = np.atleast_1d(np.asarray(row.get("kept_mass"), np.float64))
    means = _means(np.minimum(held, 1.0), edges)
    miss = np.where(np.isnan(said), 0.0, np.abs(means - said))

    nucleus = STRUCTURES[row["kind"]].holds_mass
    if off.max() <= SUM_TOLERANCE and miss.max() <= SUM_TOLERANCE and not nucleus:
        return  # whatever rounding does
    tolerance = SUM_TOLERANCE + _sum_rounding(stated, bits)  # [N]
    if not (off <= tolerance).all():
        yield "logprobs", f"entries and tail miss a sum of 1 by up to {off.max():.2g}"
    wrong = np.flatnonzero(miss > _means(tolerance, edges))
    if len(wrong):
        first = wrong[0]
        yield "kept_mass", f"says {said[first]:.4f}, the entries hold {means[first]:.4f}"
    if nucleus:
        yield from _doubtful_nucleus(row, stated, held, tolerance)


def _means(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[R] of [N] values, the mean of each row's."""
    means: np.ndarray = np.add.reduceat(values, edges[:-1]) / np.diff(edges)
    return means


def _doubtful_nucleus(
    row: Mapping[str, Any], stated: _Stated, held: np.ndarray, tolerance: np.ndarray
) -> Iterator[Doubt]:
    """`topp` keeps the fewest entries that hold a mass of p.

    So all entries reach p, and all but the last do not.

    Fewer than k of them, or more than k_min, are there for no other reason.
    """
    p = row["p"]
    falls_short = held < p - tolerance
    if np.any(falls_short & (stated.entries < row["k"])):
        yield "entries", f"a position has fewer entries than hold a mass of {p:.4g}"
    without_last = held - np.exp(stated.least, dtype=np.float64)
    goes_beyond = without_last > p + tolerance
    if np.any(goes_beyond & (stated.entries > row["k_min"])):
        yield "entries", f"a position has more entries than a mass of {p:.4g} needs"


def _sum_rounding(stated: _Stated, bits: int) -> np.ndarray:
    """[N] how far rounding moves a sum of probabilities.

    d exp(l) = p dl and dl <= |l| 2^-(b+1), so by at most sum_i p_i |l_i| 2^-(b+1), tail included.
    """
    # 0 * -inf of what has no probability: nothing moves, and e^-200 is none either.
    entries = stated.probs * np.maximum(stated.logprobs, -200)
    tail = np.exp(stated.tail, dtype=np.float64) * np.maximum(stated.tail, -200)
    moved = np.abs(entries.sum(axis=1, dtype=np.float64)) + np.abs(tail)
    rounding: np.ndarray = moved * 2.0 ** -(bits + 1)
    return rounding


def _misplaced(targets: SoftTargets, stated: _Stated, tokens: np.ndarray, bits: int) -> int:
    """How many positions have a `token_logprob` that cannot be that of `tokens`.

    A token among the entries has its entry's log-probability; another one has at most that of the
    last entry. Targets that are shifted against their tokens show in this.
    """
    positions = np.arange(len(tokens))
    if targets.ids is None:  # the whole vocabulary, in id order
        is_entry = np.ones(len(tokens), bool)
        expected = stated.logprobs[positions, tokens]
    else:
        position, entry = np.nonzero(targets.ids == tokens[:, None])
        is_entry, expected = np.zeros(len(tokens), bool), stated.least.copy()
        is_entry[position] = True
        expected[position] = stated.logprobs[position, entry]
    with np.errstate(invalid="ignore"):  # -inf against -inf are equal, and NaN exceeds nothing
        above = targets.token_logprob - expected
        miss = np.where(is_entry, np.abs(above), above)
        return int((miss > _slack(targets.token_logprob, bits)).sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Outside:
    """What is no entry at each of N positions: n ids of mass m together, none above c."""

    n: np.ndarray
    """[N] ids."""
    log_m: np.ndarray
    """[N] float64; -inf: nothing is outside."""
    log_c: np.ndarray
    """[N] float64."""

    @classmethod
    def of(cls, stated: _Stated | None, *, positions: int, vocabulary: int) -> "_Outside":
        """Drawn entries state nothing: all V ids, of mass 1, count as outside."""
        if stated is None:
            nothing = np.zeros(positions)
            return cls(np.full(positions, vocabulary), nothing, nothing)
        log_m = stated.tail.astype(np.float64)
        log_c = np.minimum(log_m, stated.least)  # entries come best first
        return cls(vocabulary - stated.entries, log_m, log_c)


def _doubtful_temperatures(
    targets: SoftTargets, stated: _Stated | None, vocabulary: int, bits: int
) -> Iterator[Doubt]:
    """Each tempered tail must be a sum that the ids outside the entries can have."""
    temperatures, tails = targets.temperatures, targets.tempered_tails
    if temperatures is None or tails is None:
        return
    outside = _Outside.of(stated, positions=len(tails), vocabulary=vocabulary)
    for temperature, log_sums in zip(temperatures.tolist(), tails.T, strict=True):
        if not _can_be(log_sums, outside, temperature, bits):
            message = f"no mass outside the entries has this sum at temperature {temperature:g}"
            yield "tempered_tails", message


def _can_be(log_sums: np.ndarray, outside: _Outside, temperature: float, bits: int) -> bool:
    """Whether log sum_i p_i^a, a = 1/T, over the ids outside lies between its two extremes.

    With m and n given, the sum is extreme where all ids hold the same, m/n, and where as few as
    possible hold all, c each. Which of the two is the larger depends on whether T is above 1.
    """
    there = np.isfinite(outside.log_m) & (outside.n > 0)
    if np.isfinite(log_sums[~there]).any():
        return False  # nothing is outside, so the sum is 0 and its log -inf
    a = 1 / temperature
    n, log_sums = outside.n[there], log_sums[there]
    log_m, log_c = outside.log_m[there], outside.log_c[there]

    # m/c ids of c each: (m/c) c^a
    gathered = log_m + (a - 1) * log_c
    # n ids of m/n each: n (m/n)^a
    spread = (1 - a) * np.log(n) + a * log_m
    least, most = np.minimum(gathered, spread), np.maximum(gathered, spread)

    # Above, log m and log c are weighted by at most 1 + a; each is off by its rounding and by what
    # the teacher's sums are.
    stored = SUM_TOLERANCE + (np.abs(log_m) + np.abs(log_c)) * 2.0**-bits
    slack = (1 + a) * stored + _slack(log_sums, bits)
    return not ((log_sums < least - slack) | (log_sums > most + slack)).any()


def _doubtful_draws(
    row: Mapping[str, Any], targets: SoftTargets, tokens: np.ndarray, edges: np.ndarray
) -> Iterator[Doubt]:
    """Tokens must be among the draws about as often as their probabilities q say.

    This is asked of each row, and of all rows of a long one together: draws that are another row's
    may be no surprise in one, and are in a hundred.
    """
    if targets.weights is not None:
        if not (row["weights"] > 0).all() or not np.isfinite(row["weights"]).all():
            yield "weights", "a weight is not above 0"
        return
    log_q = targets.token_logprob.astype(np.float64)
    if targets.temperatures is not None and targets.tempered_tails is not None:
        # Drawn at temperature T: log q = log p / T - log sum_i p_i^(1/T)
        log_q = log_q / targets.temperatures[0] - targets.tempered_tails[:, 0]
    q, k = np.exp(np.minimum(log_q, 0.0)), row["k"]

    # The chance that k draws hold the token.
    # Systematic: k evenly spaced points, an interval q wide.
    held = np.minimum(1.0, k * q) if row["draw"] == "systematic" else 1 - (1 - q) ** k
    hits = np.any(targets.ids == tokens[:, None], axis=1).astype(np.int64)

    # Independent positions: variance held (1 - held) each. 1: a single hit is never a surprise.
    for parts in (edges, edges[[0, -1]]):
        found, expected, variance = (
            np.add.reduceat(values, parts[:-1]) for values in (hits, held, held * (1 - held))
        )
        off = np.abs(found - expected) > DEVIATIONS * np.sqrt(variance) + 1
        if off.any():
            first = off.argmax()
            yield (
                "token_logprob",
                f"{found[first]} tokens that follow were drawn, expected {expected[first]:.1f}",
            )
            return


def _slack(logprob: Any, bits: int) -> Any:
    """How far two stored log-probabilities that should be equal may differ.

    |l| 2^-b is their rounding; 1e-3 nats are for the float32 arithmetic that made them.
    """
    return 1e-3 + np.abs(logprob) * 2.0**-bits
