"""Spans: which tokens of a row are scored.

Most rows have one. A conversation has one for each turn of the assistant.

In a row they are flat, as all lists are: start, tokens, start, tokens. In memory they are [S, 2].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import IntegrityError

SPAN_COLUMNS = ("prompt_tokens", "completion_tokens", "spans")
"""What `spans_of` reads of a row of `generations`."""


def one_span(start: Any, tokens: Any) -> np.ndarray:
    """[1, 2] int64: so many tokens from `start` on. Of arrays [R], one for each row: [R, 1, 2]."""
    return np.stack([start, tokens], axis=-1, dtype=np.int64)[..., None, :]


def spans_of(row: Mapping[str, Any]) -> np.ndarray:
    """[S, 2] int64 start and tokens of each scored span of a row.

    The row is one of `generations` or `soft_targets`.

    A row without the column has one span: that of `span_start` and `span_tokens`, or what follows
    the prompt. Nothing precedes the first token, so it is never scored. Columns [R] of rows of
    one span give [R, 1, 2].

    Raises:
        IntegrityError: the column holds an odd number of numbers.
    """
    if row.get("spans") is not None:
        numbers = np.asarray(row["spans"], np.int64)
        if len(numbers) % 2:
            raise IntegrityError(
                f"spans: {numbers.tolist()}, expected two numbers for each, start and tokens."
            )
        return numbers.reshape(-1, 2)
    if "span_start" in row:
        return one_span(row["span_start"], row["span_tokens"])
    return span_after(row["prompt_tokens"], row["prompt_tokens"] + row["completion_tokens"])


def span_after(prompt_tokens: Any, total_tokens: Any) -> np.ndarray:
    """[1, 2] all that follows a prompt; nothing precedes the first token of a text without one."""
    start = np.maximum(prompt_tokens, 1)
    return one_span(start, np.maximum(total_tokens - start, 0))


def spans_before(spans: np.ndarray, end: int) -> np.ndarray:
    """[S, 2] the spans of a row that is cut. [[2, 3], [7, 4]] before 9 are [[2, 3], [7, 2]]."""
    starts = spans[:, 0]
    tokens = np.minimum(spans.sum(axis=1), end) - starts
    cut: np.ndarray = np.stack([starts, tokens], axis=1)[tokens > 0]
    return cut


def flat(spans: np.ndarray) -> np.ndarray:
    """[2 S] int32: the column `spans`."""
    return spans.astype(np.int32).reshape(-1)


def positions(spans: np.ndarray) -> np.ndarray:
    """[N] int64 indices of the scored tokens, ascending: for [[2, 3], [7, 1]], 2, 3, 4, 7."""
    starts, tokens = spans[:, 0], spans[:, 1]
    if len(spans) == 1:
        return np.arange(starts[0], starts[0] + tokens[0])
    ends = np.cumsum(tokens)  # of each span's tokens, counted through all of them
    return np.repeat(starts - (ends - tokens), tokens) + np.arange(tokens.sum())


def scored_tokens(rows: pa.Table) -> np.ndarray:
    """[R] how many tokens of each row of `generations` are scored. It reads `SPAN_COLUMNS`."""
    spans = rows["spans"].combine_chunks()
    prompts = rows["prompt_tokens"].to_numpy()
    after = prompts + rows["completion_tokens"].to_numpy() - np.maximum(prompts, 1)
    tokens = spans.flatten().to_numpy()[1::2].astype(np.int64)  # every second number
    ends = np.cumsum(spans.value_lengths().fill_null(0).to_numpy() // 2)  # of each row's spans
    before = np.concatenate([[0], np.cumsum(tokens)])  # tokens of the spans before
    in_spans = np.diff(before[np.concatenate([[0], ends])])
    scored: np.ndarray = np.where(spans.is_valid().to_numpy(zero_copy_only=False), in_spans, after)
    return scored


def check_spans(spans: np.ndarray, total_tokens: int, what: str, *, first: int = 1) -> None:
    """Refuse spans that are empty, overlap, start too early or leave the row.

    `first`: index of the first token that may be scored (`Head.first_scored`).

    Raises:
        IntegrityError: they do; `what` is the row, for the message.
    """
    starts, tokens = spans[:, 0], spans[:, 1]
    ends = starts + tokens
    # Where each may start: spans do not overlap.
    before = np.concatenate([[first], ends[:-1]])
    off = np.flatnonzero((tokens < 1) | (starts < before) | (ends > total_tokens))
    wrong = None if len(spans) else "there is none"
    if len(off):
        wrong = f"the one at {starts[off[0]]} "
        if tokens[off[0]] < 1:
            wrong += "has no tokens"
        elif starts[off[0]] < before[off[0]]:
            wrong += f"starts before {before[off[0]]}"
        else:
            wrong += f"ends at {ends[off[0]]}, the row has {total_tokens} tokens"
    if wrong is not None:
        raise IntegrityError(
            f"{what}: of its spans (start, tokens) {spans.tolist()}, {wrong}. Spans have tokens, "
            f"ascend, do not overlap, {_STARTS[first]}and end within the row."
        )


_STARTS = {0: "", 1: "start at 1 or later, because position t predicts token t + 1, "}
