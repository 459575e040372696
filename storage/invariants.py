"""What must hold in a row: its shape, checked before it is written, and the numbers of targets, checked by verify.

Tolerances: `bits` mantissa bits round a log probability l by at most |l| * 2**-(bits + 1).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .codec import SoftTargets
from .errors import IntegrityError
from .schema import TableName

SUM_TOLERANCE = 2e-3
"""Entries and tail may miss 1 by this much, besides what rounding does: teachers compute in half precision."""


def check_shape(table: TableName, row: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """IntegrityError if a row contradicts itself or `about`, the description of its shard."""
    if table == "soft_targets":
        aligned_targets(row, about)
    if table == "generations":
        prompt, completion, total = row["prompt_tokens"], row["completion_tokens"], len(row["token_ids"])
        if prompt < 0 or completion < 0 or prompt + completion != total:
            raise IntegrityError(
                f"generations row: {prompt} prompt tokens and {completion} completion tokens are not {total} token ids."
            )


def aligned_targets(row: Mapping[str, Any], about: Mapping[str, Any]) -> SoftTargets:
    """The row's targets, one for each token of its span; IntegrityError if the row says otherwise."""
    start, n, k, total = row["span_start"], row["span_tokens"], row["k"], len(row["token_ids"])
    if n < 1 or k < 1 or start < 1 or start + n > total:
        raise IntegrityError(
            f"soft_targets row: span_start {start}, span_tokens {n} and k {k} do not fit a row of {total} tokens. "
            "A span starts at 1 or later, because position t predicts token t + 1, and ends within the row."
        )
    if (row["kind"] == "full") != (row["ids"] is None):
        found = "without" if row["ids"] is None else "with"
        raise IntegrityError(f"soft_targets row: kind {row['kind']!r} {found} ids; only kind 'full' has none.")
    if row["kind"] == "full" and k != about["vocab_size"]:
        raise IntegrityError(f"soft_targets row: kind 'full' with k {k}, the vocabulary has {about['vocab_size']}.")
    if row["teacher_id"] != about["teacher_id"]:
        raise IntegrityError(f"soft_targets row: teacher {row['teacher_id']} in a shard of {about['teacher_id']}.")
    targets = SoftTargets.from_row(row)
    for name in ("logprobs", "tail_logprob", "token_logprob", "entropy"):
        if np.isnan(row[name]).any():
            raise IntegrityError(f"soft_targets row: {name} holds NaN. The teacher's numbers are broken.")
    return targets


def doubts(row: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(column, what is wrong with it) for a soft-targets row whose shape holds."""
    targets = aligned_targets(row, about)
    vocabulary, bits = about["vocab_size"], about["mantissa_bits"]
    tokens = row["token_ids"][row["span_start"] : row["span_start"] + row["span_tokens"]]
    if not ((row["token_ids"] >= 0) & (row["token_ids"] < vocabulary)).all():
        yield "token_ids", f"a token id is outside the vocabulary of {vocabulary}"
    elif targets.ids is not None:
        yield from _doubtful_entries(targets, vocabulary)
    if targets.logprobs.max() > _slack(targets.logprobs.max(), bits):
        yield "logprobs", "a log probability is above 0"
    if not ((targets.entropy >= -_slack(0.0, bits)) & (targets.entropy <= np.log(vocabulary) * 1.01 + 1e-3)).all():
        yield "entropy", f"an entropy is outside 0 to log({vocabulary}) nats"
    off = np.abs(np.exp(targets.log_total()) - 1)
    if (off > SUM_TOLERANCE + _sum_rounding(targets, bits)).any():
        yield "logprobs", f"entries and tail miss a sum of 1 by up to {off.max():.2g}"
    kept = np.minimum(np.exp(targets.logprobs).sum(axis=1, dtype=np.float64), 1.0).mean()
    if abs(kept - row["kept_mass"]) > SUM_TOLERANCE + _sum_rounding(targets, bits).mean():
        yield "kept_mass", f"says {row['kept_mass']:.4f}, the entries hold {kept:.4f}"
    if misplaced := _misplaced(targets, tokens, bits):
        yield "token_logprob", f"{misplaced} positions disagree with the entries about the token that follows"


def _doubtful_entries(targets: SoftTargets, vocabulary: int) -> Iterator[tuple[str, str]]:
    assert targets.ids is not None
    if targets.ids.min() < 0 or targets.ids.max() >= vocabulary:
        yield "ids", f"an entry is outside the vocabulary of {vocabulary}"
    if (np.diff(np.sort(targets.ids, axis=1), axis=1) == 0).any():
        yield "ids", "an id stands twice at one position"
    if (np.diff(targets.logprobs, axis=1) > 0).any():
        yield "logprobs", "entries are not in descending order"


def _misplaced(targets: SoftTargets, tokens: np.ndarray, bits: int) -> int:
    """Positions whose `token_logprob` cannot be that of `tokens`: the sign of targets shifted against their tokens."""
    n = len(tokens)
    if targets.ids is None:
        entry = targets.logprobs[np.arange(n), tokens]
        kept = np.ones(n, bool)
    else:
        match = targets.ids == tokens[:, None]
        kept = match.any(axis=1)
        entry = np.where(kept, targets.logprobs[np.arange(n), match.argmax(axis=1)], targets.logprobs[:, -1])
    with np.errstate(invalid="ignore"):  # -inf against -inf are equal, and NaN exceeds nothing
        above = targets.token_logprob - entry
        return int((np.where(kept, np.abs(above), above) > _slack(targets.token_logprob, bits)).sum())


def _slack(logprob: Any, bits: int) -> Any:
    return 1e-3 + np.abs(logprob) * 2.0**-bits


def _sum_rounding(targets: SoftTargets, bits: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        moved = np.nan_to_num(np.exp(targets.logprobs) * np.abs(targets.logprobs)).sum(axis=1, dtype=np.float64)
        moved += np.nan_to_num(np.exp(targets.tail_logprob) * np.abs(targets.tail_logprob))
    return moved * 2.0 ** -(bits + 1)


def statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per kind: rows, scored tokens, entries per token, and the mass that the entries keep (mean and quantiles)."""
    result = {}
    for kind in sorted({row["kind"] for row in rows}):
        chosen = [row for row in rows if row["kind"] == kind]
        kept = 1 - np.exp(np.concatenate([row["tail_logprob"] for row in chosen]).astype(np.float64))
        quantiles = np.quantile(kept, [0.01, 0.1, 0.5])
        result[kind] = {
            "rows": len(chosen),
            "tokens": len(kept),
            "entries_per_token": sum(len(row["logprobs"]) for row in chosen) / len(kept),
            "kept_mass": dict(zip(["mean", "q01", "q10", "q50"], [kept.mean(), *quantiles], strict=True)),
        }
    return result
