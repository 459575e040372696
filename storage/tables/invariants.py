"""Invariants: the shape that a row must have, checked before it is written.

What its numbers must keep is in `doubts.py`.

Integers must agree exactly: so many targets as scored tokens, counts that sum to the draws. The
rows of a shard are asked as few long rows (`runs`): neighbours of one kind, their lists one after
another.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import IntegrityError
from .features import check_features
from .heads import head_of
from .kinds import STRUCTURES
from .rows import Rows
from .schema import FLOATS, TableName
from .soft_targets import LISTS, SoftTargets, aligned, joined_list, runs_alike, temperature_codes
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
        if (row.get("image") is not None) != head_of(about).images:
            there = "without" if row.get("image") is None else "with"
            raise IntegrityError(f"soft_targets row: {there} an image, head {about.get('head')!r}.")
    if table == "features":
        check_features(row, about)
    if table == "generations":
        prompt, completion = row["prompt_tokens"], row["completion_tokens"]
        total = len(row["token_ids"])
        if row.get("spans") is not None:
            first = head_of(about).first_scored
            check_spans(spans_of(row), total, "generations row", first=first)
        if prompt < 0 or completion < 0 or prompt + completion != total:
            raise IntegrityError(
                f"generations row: {prompt} prompt tokens and {completion} completion tokens are "
                f"not {total} token ids."
            )


def aligned_targets(
    row: Mapping[str, Any], about: Mapping[str, Any], *, joined: bool = False
) -> SoftTargets:
    """The row's targets, one for each token of its span; IntegrityError if the row says otherwise.

    `joined`: it is the long row of a `Run`; where the spans of each may lie was looked at before.
    """
    k, head = row["k"], head_of(about)
    if not joined:
        if head.whole_text:
            _check_whole_text(row)
        else:
            _check_spans(row, first=head.first_scored)
        if head.classes:
            _check_classes(row, about["class_names"])
        if head.masked:
            _check_hidden(row, int(about["vocab_size"]))
    _kind_columns(row)
    if STRUCTURES[row["kind"]].whole and k != outcomes(about):
        raise IntegrityError(
            f"soft_targets row: kind {row['kind']!r} with k {k}, the vocabulary has "
            f"{outcomes(about)}."
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


def _check_spans(row: Mapping[str, Any], *, first: int) -> None:
    """The spans fit the row, and `span_start` and `span_tokens` say the same as they."""
    spans = spans_of(row)
    check_spans(spans, len(row["token_ids"]), "soft_targets row", first=first)
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
        # The least of numbers with NaN among them is NaN.
        if row.get(name) is not None and np.isnan(np.min(row[name], initial=0)):
            raise IntegrityError(
                f"soft_targets row: {name} holds NaN. The teacher's numbers are broken."
            )


def outcomes(about: Mapping[str, Any]) -> int:
    """What a distribution is over: ids of the vocabulary, or classes."""
    if head_of(about).classes:
        return len(about["class_names"])
    return int(about["vocab_size"])


def _check_whole_text(row: Mapping[str, Any]) -> None:
    """A text that is classified has one target, at its last token."""
    spans = None if row.get("spans") is None else list(row["spans"])
    found = row["span_start"], row["span_tokens"], row["kind"], spans
    expected = len(row["token_ids"]) - 1, 1, "full", None
    if found != expected:
        raise IntegrityError(
            f"soft_targets row: span_start, span_tokens, kind and spans are {found}, expected "
            f"{expected}: where texts are classified, each has one target over all classes, at "
            "its last token."
        )


def _check_classes(row: Mapping[str, Any], names: Sequence[str]) -> None:
    """Targets over classes are whole, and gold labels are some of the classes.

    A text has one label, or each target has one (-1: none).
    """
    if row["kind"] != "full":
        raise IntegrityError(
            f"soft_targets row: kind {row['kind']!r} over classes, expected 'full'."
        )
    labels = [] if row.get("labels") is None else row["labels"]
    found = [label for label in np.unique(labels).tolist() if label != -1]
    found += [] if row.get("label") is None else [row["label"]]
    for label in found:
        if not 0 <= label < len(names):
            raise IntegrityError(
                f"soft_targets row: label {label}, expected 0 to {len(names) - 1} "
                f"({', '.join(names)})."
            )


def _check_hidden(row: Mapping[str, Any], vocabulary: int) -> None:
    """Of each token that is hidden it is known which one it is."""
    labels = row.get("labels")
    if labels is None or np.min(labels, initial=0) < 0 or np.max(labels, initial=0) >= vocabulary:
        found = "are missing" if labels is None else f"are {np.min(labels)} to {np.max(labels)}"
        raise IntegrityError(
            f"soft_targets row: labels {found}, expected the tokens that are hidden, 0 to "
            f"{vocabulary - 1}."
        )


def _kind_columns(row: Mapping[str, Any]) -> None:
    """A kind has the columns it needs and no other's."""
    kind = row["kind"]
    if kind not in STRUCTURES:
        raise IntegrityError(
            f"soft_targets row: kind {kind!r}, expected one of {', '.join(STRUCTURES)}."
        )
    expected = STRUCTURES[kind].columns_of(row.get("proposal"))
    lacking = {"entries"} if STRUCTURES[kind].may_lack else set()
    for name in _OPTIONAL:
        if name in lacking:
            continue
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
    """Temperatures come with their sums, in order.

    Sampled entries have one temperature, `full` needs none.
    """
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


_ALIKE = ("kind", "k", "p", "k_min", "draw", "proposal", "teacher_id")
_LISTS = (*LISTS, "labels", "tail_bound")


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Neighbouring rows of `soft_targets` that are alike in all but their numbers."""

    start: int
    stop: int
    edges: np.ndarray
    """[R + 1] the targets of row r are `edges[r]` to `edges[r + 1]` of the long row's."""
    row: dict[str, Any] | None
    """All of them as one; `kept_mass` (NaN: none) and `label` (-1: none) have a number for each.
    None: lengths or spans of a row do not hold, so they cannot be joined."""


def runs(rows: Rows, about: Mapping[str, Any]) -> Iterator[Run]:
    """The rows of a row group as few long rows, for whoever asks the same of all of them."""
    if not len(rows):
        return
    spans = _Spans.of(rows)
    joinable = _joinable(rows, spans, about)
    n, k = rows.numbers("span_tokens").astype(np.int64), rows.numbers("k").astype(np.int64)
    there = np.stack([rows.present(name) for name in _LISTS], axis=1)
    masses, labels = rows.filled("kept_mass", np.nan), rows.filled("label", -1)
    codes = [rows.codes(name) for name in _ALIKE]
    kinds = np.column_stack([joinable, there, *codes, temperature_codes(rows)])
    for start, stop in runs_alike(kinds, n * k):
        edges = np.concatenate([[0], np.cumsum(n[start:stop])])
        row = None
        if joinable[start]:
            lists = [name for name, one in zip(_LISTS, there[start], strict=True) if one]
            row = _long_row(rows, spans, start, stop, lists=lists)
            row |= {"kept_mass": masses[start:stop], "label": labels[start:stop]}
        yield Run(start, stop, edges, row)


@dataclass(frozen=True, slots=True, eq=False)
class _Spans:
    """The S spans of all rows."""

    starts: np.ndarray
    """[S] in the row's own tokens."""
    tokens: np.ndarray
    """[S]"""
    edges: np.ndarray
    """[R + 1] the spans of row r are `edges[r]` to `edges[r + 1]`."""

    @classmethod
    def of(cls, rows: Rows) -> "_Spans":
        """A row without the column has the one of `span_start` and `span_tokens`."""
        offsets, numbers = rows.flat("spans")
        several = rows.present("spans")
        counts = np.where(several, np.diff(offsets) // 2, 1)
        edges = np.concatenate([[0], np.cumsum(counts)])
        row = np.repeat(np.arange(len(rows)), counts)
        # Where the span's two numbers are; those of rows without the column are found beside it.
        at = offsets[row] + 2 * (np.arange(len(row)) - edges[row])
        at = np.where(several[row], at, 0)
        beside = np.append(numbers, [0, 0])
        starts = np.where(several[row], beside[at], rows.numbers("span_start")[row])
        tokens = np.where(several[row], beside[at + 1], rows.numbers("span_tokens")[row])
        return cls(starts.astype(np.int64), tokens.astype(np.int64), edges)


def _joinable(rows: Rows, spans: _Spans, about: Mapping[str, Any]) -> np.ndarray:
    """[R] whether lists have their lengths and spans lie in their row.

    A long row would not show it.
    """
    n, k = rows.numbers("span_tokens").astype(np.int64), rows.numbers("k").astype(np.int64)
    fits = aligned(rows, n, k) & (n >= 1) & (k >= 1)
    for name in ("labels", "tail_bound"):
        fits &= ~rows.present(name) | (np.diff(rows.flat(name)[0]) == n)
    total, head = np.diff(rows.flat("token_ids")[0]), head_of(about)
    if head.classes:
        fits &= _known_labels(rows, len(about["class_names"]))
    if head.masked:
        fits &= rows.present("labels") & _within(rows, 0, int(about["vocab_size"]))
    if head.whole_text:
        at_end = (rows.numbers("span_start") == total - 1) & (n == 1) & ~rows.present("spans")
        return np.asarray(fits & at_end)
    counts, ends = np.diff(spans.edges), spans.starts + spans.tokens
    row = np.repeat(np.arange(len(rows)), counts)
    before = np.concatenate([[head.first_scored], ends[:-1]])[: len(ends)]
    first = spans.edges[:-1][counts > 0]
    before[first] = head.first_scored
    off = (spans.tokens < 1) | (spans.starts < before) | (ends > total[row])
    fits &= (counts > 0) & (np.bincount(row, off, len(rows)) == 0)
    fits &= np.bincount(row, spans.tokens, len(rows)) == n
    begins = np.append(spans.starts, 0)[spans.edges[:-1]]
    fits &= begins == rows.numbers("span_start")
    return np.asarray(fits & (np.diff(rows.flat("spans")[0]) % 2 == 0))


def _known_labels(rows: Rows, classes: int) -> np.ndarray:
    """[R] whether a row's gold labels are classes; -1 among those of its targets is none."""
    label = rows.filled("label", 0)
    return np.asarray((label >= 0) & (label < classes) & _within(rows, -1, classes))


def _within(rows: Rows, least: int, stop: int) -> np.ndarray:
    """[R] whether all `labels` of a row are from `least` to before `stop`."""
    edges, labels = rows.flat("labels")
    wrong = np.concatenate([[0], np.cumsum((labels < least) | (labels >= stop))])
    return np.asarray(np.diff(wrong[edges]) == 0)


def _long_row(
    rows: Rows, spans: _Spans, start: int, stop: int, *, lists: Sequence[str]
) -> dict[str, Any]:
    """Rows `start` to `stop` as one; `lists` are those that they have."""
    offsets, ids = rows.flat("token_ids")
    part = slice(spans.edges[start], spans.edges[stop])
    row = np.repeat(np.arange(start, stop), np.diff(spans.edges[start : stop + 1]))
    starts, tokens = spans.starts[part] + (offsets[row] - offsets[start]), spans.tokens[part]
    return {
        **{name: rows.value(name, start) for name in _ALIKE},
        **{name: joined_list(rows, name, start, stop) for name in lists},
        "token_ids": ids[offsets[start] : offsets[stop]],
        "spans": np.stack([starts, tokens], axis=1).reshape(-1),
        "span_start": int(starts[0]),
        "span_tokens": int(tokens.sum()),
    }
