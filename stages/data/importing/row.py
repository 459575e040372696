"""One row of a foreign table as a soft target of this store, or why it is none.

The table has token ids and teacher probabilities.

Nobody else's table says how its lists stand to its tokens, so that is asked for (`columns.py`), and
everything that can be checked is. What such a table does not hold is bounded (`bounds.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....storage.errors import IntegrityError
from ....storage.tables.doubts import SUM_TOLERANCE
from ....storage.tables.soft_targets import SoftTargets
from ....storage.tables.spans import check_spans, positions, span_after
from .bounds import Entries, bounded_targets, check_ids, nothing_left
from .columns import BadRow, Columns
from .rounding import mantissa_bits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ForeignRow:
    """A row that was understood."""

    token_ids: np.ndarray
    """[T] int32."""
    prompt_tokens: int
    """What precedes the first scored token; 0 where that is the second of all."""
    spans: np.ndarray
    """[S, 2] start and tokens of each scored span."""
    targets: SoftTargets
    """Of every token of the spans."""
    nothing_left: np.ndarray
    """[M] bool, of positions where a tail would be seen: whether the entries sum to 1 all the
    same."""


def convert(record: Mapping[str, Any], columns: Columns, *, vocab_size: int) -> ForeignRow:
    """A row of the foreign table in this store's terms.

    Raises:
        BadRow: lengths, ids or numbers do not fit.
    """
    tokens = _tokens(record, columns.tokens, vocab_size)
    ids, values = _list(record, columns.ids), _list(record, columns.values)
    if len(ids) != len(values):
        raise BadRow(
            "lengths",
            columns.values,
            found=f"{len(values)} positions",
            expected=f"{len(ids)}, as in {columns.ids}",
            help="Each position has its ids and its numbers; name other columns.",
        )
    part: Sequence[int]
    if columns.spans is None:
        part, prompt = _part(
            columns, len(ids), tokens=len(tokens), prompt=_prompt(record, columns, len(tokens))
        )
        spans = span_after(prompt, len(tokens))
    else:
        spans = _spans(record, columns.spans, len(tokens))
        part = _part_of_spans(columns, len(ids), tokens=len(tokens), spans=spans)
        first = int(spans[0, 0])
        prompt = first if first > 1 else 0
    entries = _entries(record, columns, ids, values, part=part)
    following = tokens[positions(spans)]
    given = _given(record, columns, part=part)
    targets = bounded_targets(
        entries, following, columns=columns, given=given, vocab_size=vocab_size
    )
    return ForeignRow(
        token_ids=tokens,
        prompt_tokens=prompt,
        spans=spans,
        targets=targets,
        nothing_left=nothing_left(entries, columns, vocab_size),
    )


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
    check_ids(tokens, column, vocab_size)
    return tokens.astype(np.int32)


def _prompt(record: Mapping[str, Any], columns: Columns, total: int) -> int:
    """How many tokens are the prompt."""
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


def _spans(record: Mapping[str, Any], column: str, total: int) -> np.ndarray:
    """[S, 2] start and tokens of each scored span."""
    numbers = _array(_list(record, column), column)
    expected = f"start, tokens, start, tokens ... of spans among {total} tokens"
    help = "Count from 0, in the ids of the whole text; the first token is never scored."
    if not len(numbers) or len(numbers) % 2 or (numbers != np.floor(numbers)).any():
        raise BadRow("spans", column, found=str(record[column]), expected=expected, help=help)
    spans = numbers.astype(np.int64).reshape(-1, 2)
    try:
        check_spans(spans, total, "the row")
    except IntegrityError as error:
        raise BadRow("spans", column, found=str(error), expected=expected, help=help) from error
    return spans


def _part_of_spans(
    columns: Columns, length: int, *, tokens: int, spans: np.ndarray
) -> Sequence[int]:
    """`_part` where the spans are given: which lists are about their tokens."""
    scored: list[int] = positions(spans).tolist()
    if length == tokens:
        return [n - 1 for n in scored] if columns.targets_at == "next" else scored
    if length == tokens - 1:
        return [n - 1 for n in scored]
    # One for each scored token. At each of them, about the next (next), the first of a span would
    # have none.
    if length == len(scored) and columns.targets_at == "same":
        return range(length)
    more = f" or {len(scored)} (one for each scored token)" if columns.targets_at == "same" else ""
    raise BadRow(
        "lengths",
        columns.ids,
        found=f"{length} positions",
        expected=f"{tokens} (one for each token), {tokens - 1}{more}",
        help="Name another column, or see --targets-at.",
    )


def _part(columns: Columns, length: int, *, tokens: int, prompt: int) -> tuple[range, int]:
    """Which lists are about the span, and the prompt's tokens.

    The prompt is one token longer where the first scored token has no list.

    The list of position t is about token t + 1 (targets_at next) or token t (same).
    """
    start = max(prompt, 1)
    span = tokens - start
    shift = 1 if columns.targets_at == "next" else 0
    # One for each token.
    if length == tokens:
        return range(start - shift, tokens - shift), prompt
    # One for each token but the first, which nothing predicts (same), or but the last, which
    # predicts nothing that is there (next): either way list n is about token n + 1.
    if length == tokens - 1 and length != span:
        return range(start - 1, tokens - 1), prompt
    # One for each scored token.
    if length == span and (shift == 0 or prompt == 0):
        return range(span), prompt
    # One at each token of the completion, about the next (next): the completion's first token has
    # none, the last list is about nothing that is there.
    if length == span and prompt > 1 and span > 1:
        return range(span - 1), prompt + 1
    raise BadRow(
        "lengths",
        columns.ids,
        found=f"{length} positions",
        expected=(
            f"{tokens} (one for each token), {tokens - 1} or {span} (one for each of the "
            "completion)"
        ),
        help="Say which tokens the lists are about: --columns prompt_tokens=COLUMN, "
        "completion_tokens=COLUMN or spans=COLUMN.",
    )


def _entries(
    record: Mapping[str, Any],
    columns: Columns,
    ids: Sequence[Any],
    values: Sequence[Any],
    *,
    part: Sequence[int],
) -> Entries:
    """The entries of the positions `part`, of the lists of all."""
    of_ids = _matrix(ids, columns.ids, columns, part=part)
    numbers = _matrix(values, columns.values, columns, part=part)
    if of_ids.shape != numbers.shape:
        raise BadRow(
            "lengths",
            columns.values,
            found=f"{numbers.shape[1]} numbers at a position",
            expected=f"{of_ids.shape[1]}, as in {columns.ids}",
            help="Name other columns.",
        )
    if columns.kind == "probs":
        return Entries(of_ids, *_from_probs(numbers, columns))
    lse = None if columns.lse is None else _aligned(record, columns.lse, columns, part=part)
    return Entries(of_ids, *_from_logs(numbers, lse, columns))


def _from_probs(numbers: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] log-probabilities, and how far rounding may have moved them.

    log(p (1 + e)) is about log p + e.
    """
    wrong = (numbers <= 0) | (numbers > 1 + SUM_TOLERANCE)
    if wrong.any():
        raise BadRow(
            "probability",
            columns.values,
            found=f"a probability of {numbers[wrong][0]:g}",
            expected="more than 0, and 1 at most",
            help="See --values.",
        )
    errors = np.full_like(numbers, 2.0 ** -mantissa_bits(numbers))
    return np.minimum(np.log(numbers), 0.0), errors


def _from_logs(
    numbers: np.ndarray, lse: np.ndarray | None, columns: Columns
) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] log-probabilities, and how far rounding may have moved them.

    A number x with b bits of mantissa moves by at most |x| 2^-b.
    """
    logprobs, errors = numbers, np.abs(numbers) * 2.0 ** -mantissa_bits(numbers)
    if lse is not None:
        # Logits: log p = x - lse, and both may be off.
        lse = lse[:, None]
        logprobs = numbers - lse
        errors = errors + np.abs(lse) * 2.0 ** -mantissa_bits(lse)
    most = float(logprobs.max())
    if most > SUM_TOLERANCE or not np.isfinite(logprobs).all():
        over = most > SUM_TOLERANCE
        raise BadRow(
            "probability",
            columns.values,
            found=f"a log-probability of {most:g}" if over else "a number that is not finite",
            expected="0 at most",
            help="Probabilities are --values probs; logits need --columns lse=COLUMN, the log of "
            "their sum of exp over the vocabulary.",
        )
    return np.minimum(logprobs, 0.0), errors


def _given(
    record: Mapping[str, Any], columns: Columns, *, part: Sequence[int]
) -> np.ndarray | None:
    """[N] what the table says of the tokens that are there; None: nothing."""
    if columns.token_logprobs is None:
        return None
    given = _aligned(record, columns.token_logprobs, columns, part=part)
    if given.max() > SUM_TOLERANCE:
        raise BadRow(
            "probability",
            columns.token_logprobs,
            found=f"a log-probability of {given.max():g}",
            expected="0 at most",
            help="Name another column.",
        )
    capped: np.ndarray = np.minimum(given, 0.0)
    return capped


def _aligned(
    record: Mapping[str, Any], column: str, columns: Columns, *, part: Sequence[int]
) -> np.ndarray:
    """[N] of a list that has one number for each position."""
    found, expected = _list(record, column), len(record[columns.ids])
    if len(found) != expected:
        raise BadRow(
            "lengths",
            column,
            found=f"{len(found)} positions",
            expected=f"{expected}, as in {columns.ids}",
            help="Name another column.",
        )
    return _array([found[n] for n in part], column)


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
    """[n] float64 of a list of numbers; `at` names its position."""
    found = _floats(values)
    if found.ndim != 1:
        raise BadRow(
            "unreadable",
            column,
            found=f"something that is no list of numbers{at}",
            expected="numbers",
            help="Name another column.",
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


def _matrix(
    lists: Sequence[Any], column: str, columns: Columns, *, part: Sequence[int]
) -> np.ndarray:
    """[N, K] of some of the lists, the given order kept; K + 1 where the last entry is forced."""
    fewest = 2 if columns.forced else 1
    lists = [lists[n] for n in part]
    whole = _floats(lists)
    if whole.ndim == 2 and whole.shape[1] >= fewest and not np.isnan(whole).any():
        return whole
    # What is wrong with them, position by position.
    rows = [_array(row, column, at=f" at position {n}") for n, row in zip(part, lists, strict=True)]
    lengths = {len(row) for row in rows}
    if len(lengths) == 1 and min(lengths) >= fewest:
        return np.stack(rows)
    raise BadRow(
        "lengths",
        column,
        found=f"positions with {min(lengths)} to {max(lengths)} entries",
        expected="as many at each" if min(lengths) >= fewest else "entries at each",
        help="Cut the lists to the shortest before importing them.",
    )


def _floats(values: Any) -> np.ndarray:
    """Float64 of nested lists of numbers; of anything else one NaN without a dimension."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return np.array(np.nan)
