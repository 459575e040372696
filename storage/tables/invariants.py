"""Invariants: the shape that a row must have, checked before it is written. Its numbers are for `doubts.py`.

Integers must agree exactly: so many targets as scored tokens, counts that sum to the draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import IntegrityError
from .features import check_features
from .kinds import STRUCTURES
from .schema import FLOATS, TableName
from .soft_targets import SoftTargets
from .spans import check_spans, spans_of

# Columns of some kinds only; where a kind does not have one it is null.
_OPTIONAL = sorted(
    {
        name
        for structure in STRUCTURES.values()
        for name in (*structure.columns, *(structure.weighted or ()))
    }
)


def check_shape(table: TableName, row: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """IntegrityError if a row contradicts itself or `about`, the description of its shard."""
    if table == "soft_targets":
        aligned_targets(row, about)
    if table == "features":
        check_features(row, about)
    if table == "generations":
        prompt, completion = row["prompt_tokens"], row["completion_tokens"]
        total = len(row["token_ids"])
        if row.get("spans") is not None:
            check_spans(spans_of(row), total, "generations row")
        if prompt < 0 or completion < 0 or prompt + completion != total:
            raise IntegrityError(
                f"generations row: {prompt} prompt tokens and {completion} completion tokens are "
                f"not {total} token ids."
            )


def aligned_targets(row: Mapping[str, Any], about: Mapping[str, Any]) -> SoftTargets:
    """The row's targets, one for each token of its span; IntegrityError if the row says otherwise."""
    k = row["k"]
    if about.get("head") == "classes":
        _check_classes(row, about["class_names"])
    else:
        _check_spans(row)
    _kind_columns(row)
    if STRUCTURES[row["kind"]].whole and k != outcomes(about):
        raise IntegrityError(
            f"soft_targets row: kind {row['kind']!r} with k {k}, the vocabulary has {outcomes(about)}."
        )
    if row["teacher_id"] != about["teacher_id"]:
        raise IntegrityError(
            f"soft_targets row: teacher {row['teacher_id']} in a shard of {about['teacher_id']}."
        )
    targets = SoftTargets.from_row(row)
    _refuse_nan(row)
    _check_lengths(row, len(targets.entropy))
    _entry_numbers(row, targets)
    _check_temperatures(row["kind"], targets)
    return targets


def _check_spans(row: Mapping[str, Any]) -> None:
    """The spans fit the row, and `span_start` and `span_tokens` say the same as they."""
    spans = spans_of(row)
    check_spans(spans, len(row["token_ids"]), "soft_targets row")
    found = row["span_start"], row["span_tokens"]
    expected = int(spans[0, 0]), int(spans[:, 1].sum())
    if found != expected:
        raise IntegrityError(
            f"soft_targets row: span_start and span_tokens are {found}, its spans say {expected}."
        )
    if row["k"] < 1:
        raise IntegrityError(f"soft_targets row: k is {row['k']}, expected 1 or more.")


def _check_lengths(row: Mapping[str, Any], n: int) -> None:
    """What is said of each scored token beside its target is said of all N."""
    for name in ("labels", "tail_bound"):
        if row.get(name) is not None and len(row[name]) != n:
            raise IntegrityError(
                f"soft_targets row: {name} holds {len(row[name])} numbers, expected {n}, one for "
                "each scored token."
            )
    if row.get("tail_bound") is None:
        return
    if row.get("tail_logprob") is None or np.min(row["tail_bound"]) < 0:
        raise IntegrityError(
            "soft_targets row: tail_bound says how far off tail_logprob may be: it is 0 or more, "
            "and there where a tail is."
        )


def _refuse_nan(row: Mapping[str, Any]) -> None:
    for name in FLOATS:
        if row.get(name) is not None and np.isnan(row[name]).any():
            raise IntegrityError(
                f"soft_targets row: {name} holds NaN. The teacher's numbers are broken."
            )


def outcomes(about: Mapping[str, Any]) -> int:
    """What a distribution is over: ids of the vocabulary, or classes."""
    if about.get("head") == "classes":
        return len(about["class_names"])
    return int(about["vocab_size"])


def _check_classes(row: Mapping[str, Any], names: Sequence[str]) -> None:
    """A text that is classified has one target over all classes, at its last token, and a gold label or none."""
    spans = None if row.get("spans") is None else list(row["spans"])
    found = row["span_start"], row["span_tokens"], row["kind"], spans
    expected = len(row["token_ids"]) - 1, 1, "full", None
    if found != expected:
        raise IntegrityError(
            f"soft_targets row: span_start, span_tokens, kind and spans are {found}, expected "
            f"{expected}: where texts are classified, each has one target over all classes, at "
            "its last token."
        )
    label = row.get("label")
    if label is not None and not 0 <= label < len(names):
        raise IntegrityError(
            f"soft_targets row: label {label}, expected 0 to {len(names) - 1} ({', '.join(names)})."
        )


def _kind_columns(row: Mapping[str, Any]) -> None:
    """A kind has the columns it needs and no other's."""
    kind = row["kind"]
    if kind not in STRUCTURES:
        raise IntegrityError(
            f"soft_targets row: kind {kind!r}, expected one of {', '.join(STRUCTURES)}."
        )
    expected = STRUCTURES[kind].columns_of(row.get("proposal"))
    for name in _OPTIONAL:
        if (row.get(name) is not None) != (name in expected):
            found, wanted = (
                ("with", "has none") if name not in expected else ("without", "needs it")
            )
            raise IntegrityError(
                f"soft_targets row: kind {kind!r} {found} {name}; this kind {wanted}."
            )


def _entry_numbers(row: Mapping[str, Any], targets: SoftTargets) -> None:
    """How many entries a position of a ragged kind may have, and how often its ids were drawn."""
    entries, k = targets.entries, row["k"]
    if entries is None:
        return
    least = 1 if row["k_min"] is None else min(row["k_min"], k)
    if entries.min() < max(1, least) or entries.max() > k:
        raise IntegrityError(
            f"soft_targets row: positions with {entries.min()} to {entries.max()} entries, "
            f"expected {least} to {k}."
        )
    if targets.counts is not None and (
        row["counts"].min() < 1 or (targets.counts.sum(axis=1) != k).any()
    ):
        raise IntegrityError(
            f"soft_targets row: the counts of a position do not sum to its {k} draws."
        )


def _check_temperatures(kind: str, targets: SoftTargets) -> None:
    """Temperatures come with their sums, in order; sampled entries are of one, `full` needs none."""
    found, tails = targets.temperatures, targets.tempered_tails
    if found is None and tails is None:
        return
    most = STRUCTURES[kind].most_temperatures
    sound = found is not None and tails is not None and 1 <= len(found) <= most
    if found is not None and sound:
        sound = bool(
            np.isfinite(found).all()
            and (found > 0).all()
            and (found != 1).all()  # the entries themselves
            and (np.diff(found) > 0).all()
        )
    if not sound:
        raise IntegrityError(
            f"soft_targets row: kind {kind!r} with temperatures "
            f"{None if found is None else found.tolist()} and "
            f"{'no' if tails is None else 'their'} sums. Expected temperatures above 0 other than "
            "1, ascending, each with a sum at every position; sampled: one at most; full: none."
        )
