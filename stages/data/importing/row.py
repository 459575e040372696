"""One row of a foreign table of token ids and teacher probabilities, as a soft target of this store; or why it is none.

Nobody else's table says how its lists stand to its tokens, so that is asked for (`Columns`), and
everything that can be checked is: lengths, ids, order, sums. What such a table does not hold is
bounded:

* `tail_logprob` is log(1 - sum of the entries), by `log1p`. Where rounding of the numbers may hide all of it, it is the
  log of what rounding may hide: sum_i p_i e_i + K 2^-24, e_i = |x_i| 2^-b the error of a
  log-probability or logit x_i that has b bits of mantissa (of a probability 2^-b).
* `token_logprob` of a token that is no entry, and is not given, is the most that it can be: least entry or tail.
* `entropy` is that of entries and tail as one outcome, the least that it can be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ....storage.tables.invariants import SUM_TOLERANCE
from ....storage.tables.soft_targets import SoftTargets
from .rounding import hidden_mass, leaving_nothing, mantissa_bits

Values = Literal["logprobs", "probs", "logits"]
Place = Literal["next", "same"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns hold what, and how their lists stand to the tokens."""

    tokens: str
    """Token ids of the whole text, [T]."""
    ids: str
    """Ids of each position's entries, [L][K]."""
    values: str
    """Their log-probabilities, probabilities or logits, [L][K]."""
    kind: Values = "logprobs"
    lse: str | None = None
    """logits: the log of the sum of exp over the whole vocabulary, [L]."""
    token_logprobs: str | None = None
    """Log-probability of the token that is there, [L]; None: from the entries."""
    prompt_tokens: str | None = None
    """How many tokens at the beginning are the prompt ..."""
    completion_tokens: str | None = None
    """... or how many at the end are not; None: no prompt, all but the first token are scored."""
    targets_at: Place
    """next: what stands at a token predicts the token after it. same: it is the distribution of
    that very token."""
    forced: bool = False
    """Each position's last entry is the token that is there, besides the K best: K + 1 entries."""
    k: int | None = None
    """Keep so many of the best; None: all, of which every position then has equally many."""

    def named(self) -> list[str]:
        """The columns that a table must have."""
        counts = (self.prompt_tokens, self.completion_tokens)
        return [
            c
            for c in (self.tokens, self.ids, self.values, self.lse, self.token_logprobs, *counts)
            if c
        ]


class BadRow(Exception):
    """A row that cannot be a soft target; `reason` is a short code."""

    def __init__(self, reason: str, column: str, *, found: str, expected: str, help: str) -> None:
        super().__init__(f"column {column}: {found}, expected {expected}. {help}")
        self.reason = reason


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """The entries of N positions, in the table's order."""

    ids: np.ndarray
    """[N, K] float64."""
    logprobs: np.ndarray
    """[N, K] float64 natural-log probabilities."""
    error: np.ndarray
    """[N, K] how far rounding may have moved each."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ForeignRow:
    """A row that was understood."""

    token_ids: np.ndarray
    """[T] int32."""
    prompt_tokens: int
    """The first scored token is the one after them, or the second of all."""
    targets: SoftTargets
    """Of every token of the span."""
    nothing_left: np.ndarray
    """[M] bool, of positions where a tail would be seen: whether the entries sum to 1 all the
    same."""


def convert(record: Mapping[str, Any], columns: Columns, *, vocab_size: int) -> ForeignRow:
    """A row of the foreign table in this store's terms.

    Raises:
        BadRow: lengths, ids or numbers do not fit.
    """
    tokens = _tokens(record, columns.tokens, vocab_size)
    prompt = _prompt(record, columns, len(tokens))
    lists, values = _list(record, columns.ids), _list(record, columns.values)
    if len(lists) != len(values):
        raise BadRow(
            "lengths",
            columns.values,
            found=f"{len(values)} positions",
            expected=f"{len(lists)}, as in {columns.ids}",
            help="Each position has its ids and its numbers; name other columns.",
        )
    part, prompt = _part(columns, len(lists), tokens=len(tokens), prompt=prompt)
    start = max(prompt, 1)
    following = tokens[start : start + part.stop - part.start]
    ids = _rows(lists[part], columns.ids, columns, first=part.start)
    numbers = _rows(values[part], columns.values, columns, first=part.start)
    if ids.shape != numbers.shape:
        raise BadRow(
            "lengths",
            columns.values,
            found=f"{numbers.shape[1]} numbers at a position",
            expected=f"{ids.shape[1]}, as in {columns.ids}",
            help="Name other columns.",
        )
    entries = _Entries(ids, *_logprobs(numbers, record, columns, part=part))
    given = _given(record, columns, part=part)
    targets = _targets(entries, following, columns=columns, given=given, vocab_size=vocab_size)
    nothing_left, best = np.empty(0, bool), slice(None, -1 if columns.forced else None)
    if ids.shape[1] < vocab_size:
        nothing_left = leaving_nothing(entries.logprobs[:, best], entries.error[:, best])
    return ForeignRow(
        token_ids=tokens, prompt_tokens=prompt, targets=targets, nothing_left=nothing_left
    )


def _list(record: Mapping[str, Any], column: str) -> Sequence[Any]:
    found: Any = record[column]
    if not isinstance(found, list | tuple | np.ndarray):
        raise BadRow(
            "unreadable",
            column,
            found=type(found).__name__ if found is not None else "nothing",
            expected="a list",
            help="Name another column.",
        )
    return list(found)


def _array(values: Any, column: str, *, at: str = "") -> np.ndarray:
    """[n] float64 of a list of numbers."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        found = None
    if found is None or found.ndim != 1:
        what = f"something that is no list of numbers{at}"
        raise BadRow(
            "unreadable", column, found=what, expected="numbers", help="Name another column."
        )
    if np.isnan(found).any():
        raise BadRow(
            "nan",
            column,
            found=f"NaN or null{at}",
            expected="numbers",
            help="Leave the row out, or make it again.",
        )
    return found


def _tokens(record: Mapping[str, Any], column: str, vocab_size: int) -> np.ndarray:
    tokens = _array(_list(record, column), column)
    if len(tokens) < 2:
        raise BadRow(
            "empty",
            column,
            found=f"{len(tokens)} tokens",
            expected="two at least",
            help="Nothing can be predicted.",
        )
    _check_ids(tokens, column, vocab_size)
    return tokens.astype(np.int32)


def _check_ids(ids: np.ndarray, column: str, vocab_size: int) -> None:
    wrong = (ids < 0) | (ids >= vocab_size) | (ids != np.floor(ids))
    if wrong.any():
        raise BadRow(
            "vocabulary",
            column,
            found=f"id {ids[wrong][0]:g}",
            expected=f"0 to {vocab_size - 1}, the teacher's vocabulary",
            help="Name the teacher, tokenizer or --vocab-size that the ids are of.",
        )


def _prompt(record: Mapping[str, Any], columns: Columns, total: int) -> int:
    column = columns.prompt_tokens or columns.completion_tokens
    if column is None:
        return 0
    count = record[column]
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= total:
        raise BadRow(
            "lengths",
            column,
            found=repr(count),
            expected=f"0 to {total} tokens of the text",
            help="Name another column.",
        )
    prompt = count if columns.prompt_tokens else total - count
    if prompt >= total:
        raise BadRow(
            "empty",
            column,
            found="a text that is all prompt",
            expected="a completion",
            help="Leave the row out.",
        )
    return prompt


def _part(columns: Columns, length: int, *, tokens: int, prompt: int) -> tuple[slice, int]:
    """Which positions are about the span, and the prompt's tokens: the first scored token may have no target."""
    start = max(prompt, 1)
    span = tokens - start
    shift = 1 if columns.targets_at == "next" else 0
    if length == tokens:  # one for each token
        return slice(start - shift, tokens - shift), prompt
    if (
        length == tokens - 1 and length != span
    ):  # one for each but the first, which nothing predicts; or but the last
        return slice(start - 1, tokens - 1), prompt
    if length == span and (shift == 0 or prompt == 0):  # one for each scored token
        return slice(0, span), prompt
    if (
        length == span and prompt > 1 and span > 1
    ):  # one at each token of the completion: none for its first token
        return slice(0, span - 1), prompt + 1
    raise BadRow(
        "lengths",
        columns.ids,
        found=f"{length} positions",
        expected=f"{tokens} (one for each token), {tokens - 1} or {span} (one for each of the completion)",
        help="Say which tokens the lists are about: --columns prompt_tokens=COLUMN or "
        "completion_tokens=COLUMN.",
    )


def _rows(lists: Sequence[Any], column: str, columns: Columns, *, first: int) -> np.ndarray:
    """[N, K] of nested lists, the given order kept; K + 1 where the last entry is forced."""
    try:
        whole = np.asarray(lists, dtype=np.float64)
    except (TypeError, ValueError):
        whole = np.empty(0)
    if whole.ndim == 2 and whole.shape[1] > columns.forced and not np.isnan(whole).any():
        return whole
    # What is wrong with them, position by position.
    rows = [_array(row, column, at=f" at position {first + n}") for n, row in enumerate(lists)]
    lengths = {len(row) for row in rows}
    if len(lengths) == 1 and min(lengths) > columns.forced:
        return np.stack(rows)
    raise BadRow(
        "lengths",
        column,
        found=f"positions with {min(lengths)} to {max(lengths)} entries",
        expected="as many at each" if min(lengths) > columns.forced else "entries at each",
        help="Cut the lists to the shortest before importing them.",
    )


def _logprobs(
    numbers: np.ndarray, record: Mapping[str, Any], columns: Columns, *, part: slice
) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] float64 natural-log probabilities, and how far rounding may have moved them."""
    error = 2.0 ** -mantissa_bits(numbers)
    if columns.kind == "probs":
        if not (wrong := (numbers <= 0) | (numbers > 1 + SUM_TOLERANCE)).any():
            return np.minimum(np.log(numbers), 0.0), np.full_like(numbers, error)
        found, expected = f"a probability of {numbers[wrong][0]:g}", "more than 0, and 1 at most"
        raise BadRow(
            "probability", columns.values, found=found, expected=expected, help="See --values."
        )
    errors = np.abs(numbers) * error
    if columns.kind == "logits":
        assert columns.lse is not None
        lse = _aligned(record, columns.lse, columns, part=part)[:, None]
        numbers, errors = numbers - lse, errors + np.abs(lse) * 2.0 ** -mantissa_bits(lse)
    most = float(numbers.max())
    if most > SUM_TOLERANCE or not np.isfinite(numbers).all():
        found = (
            f"a log-probability of {most:g}"
            if most > SUM_TOLERANCE
            else "a number that is not finite"
        )
        help = (
            "Probabilities are --values probs; logits need --columns lse=COLUMN, the log of their "
            "sum of exp over the vocabulary."
        )
        raise BadRow("probability", columns.values, found=found, expected="0 at most", help=help)
    return np.minimum(numbers, 0.0), errors


def _aligned(
    record: Mapping[str, Any], column: str, columns: Columns, *, part: slice
) -> np.ndarray:
    """[N] of a list that has one number for each position."""
    found, positions = _list(record, column), len(record[columns.ids])
    if len(found) != positions:
        raise BadRow(
            "lengths",
            column,
            found=f"{len(found)} positions",
            expected=f"{positions}, as in {columns.ids}",
            help="Name another column.",
        )
    return _array(found[part], column)


def _given(record: Mapping[str, Any], columns: Columns, *, part: slice) -> np.ndarray | None:
    if columns.token_logprobs is None:
        return None
    given = _aligned(record, columns.token_logprobs, columns, part=part)
    if given.max() > SUM_TOLERANCE:
        found = f"a log-probability of {given.max():g}"
        raise BadRow(
            "probability",
            columns.token_logprobs,
            found=found,
            expected="0 at most",
            help="Name another column.",
        )
    return np.minimum(given, 0.0)


def _targets(
    entries: _Entries,
    following: np.ndarray,
    *,
    columns: Columns,
    given: np.ndarray | None,
    vocab_size: int,
) -> SoftTargets:
    if columns.forced:
        entries, given = _without_forced(entries, following, columns)
    _check_ids(entries.ids.ravel(), columns.ids, vocab_size)
    _check_distinct(entries.ids, following, columns)
    _check_whole(entries, columns, vocab_size)
    order = np.argsort(-entries.logprobs, axis=1, kind="stable")[:, : columns.k]
    ids, logprobs, error = (
        np.take_along_axis(x, order, axis=1) for x in (entries.ids, entries.logprobs, entries.error)
    )
    tail = _tail(logprobs, error, columns)
    match = ids == following[:, None]
    inside = match.any(axis=1)
    token = np.where(
        inside, np.where(match, logprobs, 0.0).sum(axis=1), np.minimum(logprobs[:, -1], tail)
    )
    if given is not None:
        _check_given(given, np.where(inside, token, logprobs[:, -1]), inside, columns)
        tail = np.where(inside, tail, np.maximum(tail, np.minimum(given, logprobs[:, -1])))
        token = np.where(inside, token, np.minimum(given, logprobs[:, -1]))
    entropy = -(np.exp(logprobs) * logprobs).sum(axis=1) - np.exp(tail) * tail
    floats = (
        x.astype(np.float32)
        for x in (logprobs, tail, token, np.clip(entropy, 0.0, np.log(vocab_size)))
    )
    names = ("logprobs", "tail_logprob", "token_logprob", "entropy")
    return SoftTargets(ids=ids.astype(np.int32), **dict(zip(names, floats, strict=True)))


def _tail(logprobs: np.ndarray, error: np.ndarray, columns: Columns) -> np.ndarray:
    """[N] the log probability outside the entries."""
    kept = np.exp(logprobs)
    total, hidden = kept.sum(axis=1), hidden_mass(kept, error)
    if (over := total - 1 > SUM_TOLERANCE + hidden).any():
        raise BadRow(
            "probability",
            columns.values,
            found=f"entries that sum to {total[over][0]:.6g} at position {int(np.flatnonzero(over)[0])} of the span",
            expected="1 at most",
            help="See --values; probabilities must be of the whole vocabulary, at temperature 1.",
        )
    tail: np.ndarray = np.log1p(-np.minimum(total, 1 - hidden))
    return tail


def _check_whole(entries: _Entries, columns: Columns, vocab_size: int) -> None:
    """Entries are the K best, so none of the V - K other ids has more than the least of them."""
    kept = np.exp(entries.logprobs)
    total, hidden = kept.sum(axis=1), hidden_mass(kept, entries.error)
    most = (vocab_size - kept.shape[1]) * np.exp((entries.logprobs + entries.error).min(axis=1))
    if (short := 1 - total > most * 1.01 + hidden).any():
        at = int(np.flatnonzero(short)[0])
        found = f"entries that sum to {total[at]:.4g} at position {at} of the span"
        expected = f"{1 - most[at]:.4g} at least, as no other of {vocab_size} ids may have more than the least entry"
        help = "They must be the best, normalised, at temperature 1 (--values). A forced last one needs --forced."
        raise BadRow("probability", columns.values, found=found, expected=expected, help=help)


def _without_forced(
    entries: _Entries, following: np.ndarray, columns: Columns
) -> tuple[_Entries, np.ndarray]:
    """The K best, and the log-probability of the token that is there, which was the last entry."""
    ids = entries.ids
    if (wrong := ids[:, -1] != following).any():
        position = int(np.flatnonzero(wrong)[0])
        raise BadRow(
            "alignment",
            columns.ids,
            found=f"last entry {ids[position, -1]:g} at position {position} of the span",
            expected=f"{following[position]}, the token that is there (--forced)",
            help="Leave --forced out, or set --targets-at to the other value.",
        )
    return _Entries(ids[:, :-1], entries.logprobs[:, :-1], entries.error[:, :-1]), entries.logprobs[
        :, -1
    ]


def _check_distinct(ids: np.ndarray, following: np.ndarray, columns: Columns) -> None:
    ordered = np.sort(ids, axis=1)
    twice = (np.diff(ordered, axis=1) == 0).any(axis=1)
    if not twice.any():
        return
    position = int(np.flatnonzero(twice)[0])
    repeated = ordered[position, 1:][np.diff(ordered[position]) == 0][0]
    last = (ids[:, -1] == following).all()
    help = (
        "Each position's last entry is the token that is there: give --forced."
        if last
        else "Name another column."
    )
    found = f"id {repeated:g} twice at position {position} of the span"
    raise BadRow("duplicate_id", columns.ids, found=found, expected="each id once", help=help)


def _check_given(
    given: np.ndarray, token: np.ndarray, inside: np.ndarray, columns: Columns
) -> None:
    """What is said of the token that is there must be what its entry says, or less than every entry."""
    slack = 1e-2 + 1e-2 * np.abs(token)
    wrong = np.where(inside, np.abs(given - token) > slack, given > token + slack)
    if wrong.any():
        position = int(np.flatnonzero(wrong)[0])
        raise BadRow(
            "alignment",
            columns.token_logprobs or columns.ids,
            found=f"log-probability {given[position]:.4g} of the token at position {position} of the span",
            expected=f"{'' if inside[position] else 'at most '}{token[position]:.4g}, as the entries say",
            help="The lists are about other tokens: set --targets-at to the other value, or name other columns. Or "
            "this column is: it must count from the first scored position, as the lists do, its n-th number that of "
            "the token that the n-th list is about.",
        )
