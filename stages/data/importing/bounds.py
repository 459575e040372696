"""Soft targets from a row's entries: what a foreign table does not hold is bounded.

With p_i the entries' probabilities, K of them, and e_i the relative error of each (`rounding.py`):

    tail_logprob    log(1 - sum_i p_i). Where rounding of the numbers may hide all of that, the
                    log of what it may hide: sum_i p_i e_i + K 2^-24
    token_logprob   of a token that is an entry, the entry's; else what the table says of it;
                    else the most that it can be: least entry or tail
    entropy         -sum_i p_i log p_i - tail log tail: of entries and tail as one outcome, the
                    least that it can be

What can be checked of the entries is: ids, order, sums, and what is said of the token that is
there.
"""

from dataclasses import dataclass

import numpy as np

from ....storage.tables.doubts import SUM_TOLERANCE
from ....storage.tables.soft_targets import SoftTargets
from .columns import BadRow, Columns
from .rounding import hidden_mass, leaving_nothing


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """The entries of N positions, in the table's order."""

    ids: np.ndarray
    """[N, K] float64."""
    logprobs: np.ndarray
    """[N, K] float64 natural-log probabilities."""
    error: np.ndarray
    """[N, K] how far rounding may have moved each."""

    def without_last(self) -> "Entries":
        """All but the last of each position."""
        return Entries(self.ids[:, :-1], self.logprobs[:, :-1], self.error[:, :-1])

    def best(self, k: int | None) -> "Entries":
        """The k best, best first; None: all."""
        order = np.argsort(-self.logprobs, axis=1, kind="stable")[:, :k]
        parts = (self.ids, self.logprobs, self.error)
        return Entries(*(np.take_along_axis(part, order, axis=1) for part in parts))


def bounded_targets(
    entries: Entries,
    following: np.ndarray,
    *,
    columns: Columns,
    given: np.ndarray | None,
    vocab_size: int,
) -> SoftTargets:
    """The soft targets of N positions.

    Args:
        entries: All that the table has.
        following: [N] the tokens that they predict.
        columns: What they are.
        given: [N] the log-probability of those tokens, where the table says it.
        vocab_size: Of the teacher.

    Raises:
        BadRow: they are none of this vocabulary, or not the best of a distribution.
    """
    if columns.forced:
        # The table says what the token that is there has: it is the last entry.
        _check_forced(entries.ids[:, -1], following, columns)
        given = entries.logprobs[:, -1]
        entries = entries.without_last()
    check_ids(entries.ids.ravel(), columns.ids, vocab_size)
    _check_distinct(entries.ids, following, columns)
    _check_whole(entries, columns, vocab_size)
    kept = entries.best(columns.k)
    tail = _tail(kept, columns)
    match = kept.ids == following[:, None]
    inside = match.any(axis=1)
    # A token that is an entry: the ids of a position are distinct, so the sum has one term.
    own = np.where(match, kept.logprobs, 0.0).sum(axis=1)
    # A token that is none is no more likely than the least entry, nor than all that is no entry.
    least = kept.logprobs[:, -1]
    outside = np.minimum(least, tail)
    if given is not None:
        _check_given(given, np.where(inside, own, least), inside, columns)
        # What the table says of it; rounding may have lifted that above the least entry.
        outside = np.minimum(given, least)
        # The token is part of the tail, so the tail has no less than it.
        tail = np.where(inside, tail, np.maximum(tail, outside))
    token = np.where(inside, own, outside)
    entropy = -(np.exp(kept.logprobs) * kept.logprobs).sum(axis=1) - np.exp(tail) * tail
    # Entries that sum to a little over 1 may give less than 0, or more than a uniform distribution.
    entropy = np.clip(entropy, 0.0, np.log(vocab_size))
    return SoftTargets(
        ids=kept.ids.astype(np.int32),
        logprobs=kept.logprobs.astype(np.float32),
        tail_logprob=tail.astype(np.float32),
        token_logprob=token.astype(np.float32),
        entropy=entropy.astype(np.float32),
    )


def nothing_left(entries: Entries, columns: Columns, vocab_size: int) -> np.ndarray:
    """[M] `leaving_nothing` of the best entries.

    It is empty, [0], where every id is an entry, so nothing is outside.
    """
    if entries.ids.shape[1] >= vocab_size:
        return np.empty(0, bool)
    best = entries.without_last() if columns.forced else entries
    return leaving_nothing(best.logprobs, best.error)


def check_ids(ids: np.ndarray, column: str, vocab_size: int) -> None:
    """Raise BadRow where a number is no id of the vocabulary."""
    wrong = (ids < 0) | (ids >= vocab_size) | (ids != np.floor(ids))
    if wrong.any():
        raise BadRow(
            "vocabulary",
            column,
            found=f"id {ids[wrong][0]:g}",
            expected=f"0 to {vocab_size - 1}, the teacher's vocabulary",
            help="Name the teacher, tokenizer or --vocab-size that the ids are of.",
        )


def _tail(kept: Entries, columns: Columns) -> np.ndarray:
    """[N] the log probability outside the entries."""
    probs = np.exp(kept.logprobs)
    total = probs.sum(axis=1)
    hidden = hidden_mass(probs, kept.error)
    over = total - 1 > SUM_TOLERANCE + hidden
    if over.any():
        raise BadRow(
            "probability",
            columns.values,
            found=(
                f"entries that sum to {total[over][0]:.6g} at position {_first(over)} of the span"
            ),
            expected="1 at most",
            help="See --values; probabilities must be of the whole vocabulary, at temperature 1.",
        )
    # log(1 - total), and log(hidden) at least.
    tail: np.ndarray = np.log1p(-np.minimum(total, 1 - hidden))
    return tail


def _check_whole(entries: Entries, columns: Columns, vocab_size: int) -> None:
    """Entries are the K best, so none of the V - K other ids has more than the least of them."""
    probs = np.exp(entries.logprobs)
    total = probs.sum(axis=1)
    hidden = hidden_mass(probs, entries.error)
    # The most that all others can have together: (V - K) times the least entry.
    most = (vocab_size - probs.shape[1]) * np.exp((entries.logprobs + entries.error).min(axis=1))
    # A percent more is let through: the last digits of printed numbers are no proof.
    short = 1 - total > most * 1.01 + hidden
    if short.any():
        at = _first(short)
        raise BadRow(
            "probability",
            columns.values,
            found=f"entries that sum to {total[at]:.4g} at position {at} of the span",
            expected=f"{1 - most[at]:.4g} at least, as no other of {vocab_size} ids may have more "
            "than the least entry",
            help="They must be the best, normalised, at temperature 1 (--values). A forced last "
            "one needs --forced.",
        )


def _check_forced(last: np.ndarray, following: np.ndarray, columns: Columns) -> None:
    """The last entry of each position is the token that is there."""
    wrong = last != following
    if wrong.any():
        at = _first(wrong)
        raise BadRow(
            "alignment",
            columns.ids,
            found=f"last entry {last[at]:g} at position {at} of the span",
            expected=f"{following[at]}, the token that is there (--forced)",
            help="Leave --forced out, or set --targets-at to the other value.",
        )


def _check_distinct(ids: np.ndarray, following: np.ndarray, columns: Columns) -> None:
    ordered = np.sort(ids, axis=1)
    repeated = np.diff(ordered, axis=1) == 0
    twice = repeated.any(axis=1)
    if not twice.any():
        return
    at = _first(twice)
    # A token that is there and among the best stands twice where it was added as the last entry.
    forced = (ids[:, -1] == following).all()
    raise BadRow(
        "duplicate_id",
        columns.ids,
        found=f"id {ordered[at, 1:][repeated[at]][0]:g} twice at position {at} of the span",
        expected="each id once",
        help="Each position's last entry is the token that is there: give --forced."
        if forced
        else "Name another column.",
    )


def _check_given(
    given: np.ndarray, entry: np.ndarray, inside: np.ndarray, columns: Columns
) -> None:
    """What is said of the token that is there must agree with the entries.

    It is what its entry says, or less than every entry.

    Args:
        given: [N] what is said.
        entry: [N] its entry, or the least one.
        inside: [N] whether the token is an entry.
        columns: For the message.
    """
    # The two columns may have been rounded apart: a hundredth of a nat, or of the number.
    slack = 1e-2 + 1e-2 * np.abs(entry)
    wrong = np.where(inside, np.abs(given - entry) > slack, given > entry + slack)
    if wrong.any():
        at = _first(wrong)
        limit = "" if inside[at] else "at most "
        raise BadRow(
            "alignment",
            columns.token_logprobs or columns.ids,
            found=f"log-probability {given[at]:.4g} of the token at position {at} of the span",
            expected=f"{limit}{entry[at]:.4g}, as the entries say",
            help="The lists are about other tokens: set --targets-at to the other value, or name "
            "other columns. Or this column is: it must count from the first scored position, as "
            "the lists do, its n-th number that of the token that the n-th list is about.",
        )


def _first(found: np.ndarray) -> int:
    """The first position at which something was found."""
    return int(np.flatnonzero(found)[0])
