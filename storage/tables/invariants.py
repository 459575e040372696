"""What must hold in a row: its shape, checked before it is written, and the numbers of targets, checked by verify.

Integers must agree exactly (so many targets as scored tokens, counts that sum to the draws), floats
to their rounding. Tolerances: `bits` mantissa bits round a log probability l by at most |l| *
2**-(bits + 1).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import IntegrityError
from .kinds import STRUCTURES
from .schema import TableName
from .soft_targets import SoftTargets

SUM_TOLERANCE = 2e-3
"""Entries and tail may miss 1 by this much, besides what rounding does: teachers compute in half
precision."""
DEVIATIONS = 8.0
"""Standard deviations at which draws that miss the tokens that are there are no longer chance."""
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
    if table == "generations":
        prompt, completion, total = (
            row["prompt_tokens"],
            row["completion_tokens"],
            len(row["token_ids"]),
        )
        if prompt < 0 or completion < 0 or prompt + completion != total:
            raise IntegrityError(
                f"generations row: {prompt} prompt tokens and {completion} completion tokens are "
                f"not {total} token ids."
            )


def aligned_targets(row: Mapping[str, Any], about: Mapping[str, Any]) -> SoftTargets:
    """The row's targets, one for each token of its span; IntegrityError if the row says otherwise."""
    start, n, k, total = row["span_start"], row["span_tokens"], row["k"], len(row["token_ids"])
    if about.get("head") == "classes":
        _check_classes(row, about["class_names"])
    elif n < 1 or k < 1 or start < 1 or start + n > total:
        raise IntegrityError(
            f"soft_targets row: span_start {start}, span_tokens {n} and k {k} do not fit a row of "
            f"{total} tokens. A span starts at 1 or later, because position t predicts token t + "
            "1, and ends within the row."
        )
    _kind_columns(row)
    if STRUCTURES[row["kind"]].whole and k != _outcomes(about):
        raise IntegrityError(
            f"soft_targets row: kind {row['kind']!r} with k {k}, the vocabulary has {_outcomes(about)}."
        )
    if row["teacher_id"] != about["teacher_id"]:
        raise IntegrityError(
            f"soft_targets row: teacher {row['teacher_id']} in a shard of {about['teacher_id']}."
        )
    targets = SoftTargets.from_row(row)
    for name in (
        "logprobs",
        "weights",
        "tail_logprob",
        "token_logprob",
        "entropy",
        "tempered_tails",
    ):
        if row.get(name) is not None and np.isnan(row[name]).any():
            raise IntegrityError(
                f"soft_targets row: {name} holds NaN. The teacher's numbers are broken."
            )
    _entry_numbers(row, targets)
    _check_temperatures(row["kind"], targets)
    return targets


def _outcomes(about: Mapping[str, Any]) -> int:
    """What a distribution is over: ids of the vocabulary, or classes."""
    return len(about["class_names"]) if about.get("head") == "classes" else int(about["vocab_size"])


def _check_classes(row: Mapping[str, Any], names: Sequence[str]) -> None:
    """A text that is classified has one target over all classes, at its last token, and a gold label or none."""
    found = row["span_start"], row["span_tokens"], row["kind"]
    expected = len(row["token_ids"]) - 1, 1, "full"
    if found != expected:
        raise IntegrityError(
            f"soft_targets row: span_start, span_tokens and kind are {found}, expected "
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
            and (found != 1).all()
            and (np.diff(found) > 0).all()
        )
    if not sound:
        raise IntegrityError(
            f"soft_targets row: kind {kind!r} with temperatures "
            f"{None if found is None else found.tolist()} and "
            f"{'no' if tails is None else 'their'} sums. Expected temperatures above 0 other than "
            "1, ascending, each with a sum at every position; sampled: one at most; full: none."
        )


def doubts(row: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(column, what is wrong with it) for a soft-targets row whose shape holds."""
    targets = aligned_targets(row, about)
    vocabulary, bits = about["vocab_size"], about["mantissa_bits"]
    if about.get("head") == "classes":
        label = row.get("label")  # without one, `token_logprob` is that of the best class
        tokens = np.array([targets.probabilities[0].argmax() if label is None else label])
    else:
        tokens = row["token_ids"][row["span_start"] : row["span_start"] + row["span_tokens"]]
    if not ((row["token_ids"] >= 0) & (row["token_ids"] < vocabulary)).all():
        yield "token_ids", f"a token id is outside the vocabulary of {vocabulary}"
    elif targets.ids is not None:
        yield from _doubtful_ids(row["ids"], targets.ids, vocabulary)
    if not (
        (targets.entropy >= -_slack(0.0, bits))
        & (targets.entropy <= np.log(_outcomes(about)) * 1.01 + 1e-3)
    ).all():
        yield "entropy", f"an entropy is outside 0 to log({_outcomes(about)}) nats"
    if targets.temperatures is not None:
        yield from _doubtful_temperatures(targets, vocabulary, bits)
    if targets.logprobs is None:
        yield from _doubtful_draws(row, targets, tokens)
    else:
        yield from _doubtful_logprobs(row, targets, bits)
        if misplaced := _misplaced(targets, tokens, bits):
            yield (
                "token_logprob",
                f"{misplaced} positions disagree with the entries about the token that follows",
            )


def _doubtful_ids(flat: np.ndarray, ids: np.ndarray, vocabulary: int) -> Iterator[tuple[str, str]]:
    if flat.min() < 0 or flat.max() >= vocabulary:
        yield "ids", f"an entry is outside the vocabulary of {vocabulary}"
    ordered = np.sort(ids, axis=1)
    if ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)).any():
        yield "ids", "an id stands twice at one position"


def _doubtful_logprobs(
    row: Mapping[str, Any], targets: SoftTargets, bits: int
) -> Iterator[tuple[str, str]]:
    logprobs = targets.logprobs
    assert logprobs is not None
    if logprobs.max() > _slack(logprobs.max(), bits):
        yield "logprobs", "a log probability is above 0"
    with np.errstate(invalid="ignore"):  # padding is -inf after -inf
        if targets.ids is not None and np.any(np.diff(logprobs, axis=1) > 0):
            yield "logprobs", "entries are not in descending order"
    rounding = _sum_rounding(targets, bits)
    off = np.abs(np.exp(targets.log_total()) - 1)
    if np.any(off > SUM_TOLERANCE + rounding):
        yield "logprobs", f"entries and tail miss a sum of 1 by up to {off.max():.2g}"
    kept = np.exp(logprobs).sum(axis=1, dtype=np.float64)
    if abs(np.minimum(kept, 1.0).mean() - row["kept_mass"]) > SUM_TOLERANCE + rounding.mean():
        yield (
            "kept_mass",
            f"says {row['kept_mass']:.4f}, the entries hold {np.minimum(kept, 1.0).mean():.4f}",
        )
    if STRUCTURES[row["kind"]].holds_mass:
        assert targets.entries is not None
        slack = SUM_TOLERANCE + rounding
        last = np.exp(logprobs[np.arange(len(kept)), targets.entries - 1])
        if np.any((kept < row["p"] - slack) & (targets.entries < row["k"])):
            yield "entries", f"a position has fewer entries than hold a mass of {row['p']:.4g}"
        if np.any((kept - last > row["p"] + slack) & (targets.entries > row["k_min"])):
            yield "entries", f"a position has more entries than a mass of {row['p']:.4g} needs"


def _doubtful_temperatures(
    targets: SoftTargets, vocabulary: int, bits: int
) -> Iterator[tuple[str, str]]:
    """What n ids of mass m, each at most c, can sum to when each is raised to 1/T.

    The sum is m * c^(1/T - 1) where as few as possible hold the mass, n^(1 - 1/T) * m^(1/T) where
    all hold the same.
    """
    assert targets.temperatures is not None
    assert targets.tempered_tails is not None
    n = len(targets.entropy)
    if targets.logprobs is None or targets.tail_logprob is None:
        mass, most, ids = np.zeros(n), np.zeros(n), np.full(n, vocabulary)
    else:
        mass = targets.tail_logprob.astype(np.float64)
        most = np.minimum(mass, _least(targets))
        ids = vocabulary - (
            targets.logprobs.shape[1] if targets.entries is None else targets.entries
        )
    for temperature, found in zip(
        targets.temperatures.tolist(), targets.tempered_tails.T, strict=True
    ):
        some = np.isfinite(mass) & (ids > 0)
        m, c, f, count = mass[some], most[some], found[some], np.broadcast_to(ids, n)[some]
        ends = np.stack(
            [m + (1 / temperature - 1) * c, (1 - 1 / temperature) * np.log(count) + m / temperature]
        )
        slack = (1 + 1 / temperature) * (
            SUM_TOLERANCE + (np.abs(m) + np.abs(c)) * 2.0**-bits
        ) + _slack(f, bits)
        if (
            np.isfinite(found[~some]).any()
            or ((f < ends.min(axis=0) - slack) | (f > ends.max(axis=0) + slack)).any()
        ):
            yield (
                "tempered_tails",
                f"no mass outside the entries has this sum at temperature {temperature:g}",
            )


def _doubtful_draws(
    row: Mapping[str, Any], targets: SoftTargets, tokens: np.ndarray
) -> Iterator[tuple[str, str]]:
    """The token that is there has probability t, so k draws hold it with chance 1 - (1 - t)**k, or min(1, k t)."""
    if targets.weights is not None:
        if row["weights"].min() <= 0:
            yield "weights", "a weight is not above 0"
        return
    logprob = targets.token_logprob.astype(np.float64)
    if targets.temperatures is not None and targets.tempered_tails is not None:
        logprob = logprob / targets.temperatures[0] - targets.tempered_tails[:, 0]
    chance = np.exp(np.minimum(logprob, 0.0))
    drawn = (
        np.minimum(1.0, row["k"] * chance)
        if row["draw"] == "systematic"
        else 1 - (1 - chance) ** row["k"]
    )
    hits = np.any(targets.ids == tokens[:, None], axis=1).sum()
    if abs(hits - drawn.sum()) > DEVIATIONS * np.sqrt((drawn * (1 - drawn)).sum()) + 1:
        yield "token_logprob", f"{hits} tokens that follow were drawn, expected {drawn.sum():.1f}"


def _misplaced(targets: SoftTargets, tokens: np.ndarray, bits: int) -> int:
    """Positions whose `token_logprob` cannot be that of `tokens`: the sign of targets shifted against their tokens."""
    n = len(tokens)
    assert targets.logprobs is not None
    if targets.ids is None:
        entry = targets.logprobs[np.arange(n), tokens]
        kept = np.ones(n, bool)
    else:
        match = targets.ids == tokens[:, None]
        kept = match.any(axis=1)
        entry = np.where(
            kept, targets.logprobs[np.arange(n), match.argmax(axis=1)], _least(targets)
        )
    with np.errstate(invalid="ignore"):  # -inf against -inf are equal, and NaN exceeds nothing
        above = targets.token_logprob - entry
        return int(
            (np.where(kept, np.abs(above), above) > _slack(targets.token_logprob, bits)).sum()
        )


def _least(targets: SoftTargets) -> np.ndarray:
    """[N] log probability of the last entry."""
    assert targets.logprobs is not None
    n, k = targets.logprobs.shape
    last = np.full(n, k - 1) if targets.entries is None else targets.entries - 1
    return targets.logprobs[np.arange(n), last]


def _slack(logprob: Any, bits: int) -> Any:
    return 1e-3 + np.abs(logprob) * 2.0**-bits


def _sum_rounding(targets: SoftTargets, bits: int) -> np.ndarray:
    assert targets.logprobs is not None
    assert targets.tail_logprob is not None
    with np.errstate(invalid="ignore"):
        moved = np.nan_to_num(np.exp(targets.logprobs) * np.abs(targets.logprobs)).sum(
            axis=1, dtype=np.float64
        )
        moved += np.nan_to_num(np.exp(targets.tail_logprob) * np.abs(targets.tail_logprob))
    return moved * 2.0 ** -(bits + 1)


def statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per kind: rows, scored tokens, entries per token, and the mass that the entries keep (mean and quantiles).

    Kinds whose positions differ have quantiles of their entries; sampled targets have no mass that
    is kept.
    """
    result: dict[str, Any] = {}
    for kind in sorted({row["kind"] for row in rows}):
        chosen = [row for row in rows if row["kind"] == kind]
        tokens = sum(row["span_tokens"] for row in chosen)
        total = sum(len(row["logprobs"] if row["ids"] is None else row["ids"]) for row in chosen)
        result[kind] = {"rows": len(chosen), "tokens": tokens, "entries_per_token": total / tokens}
        if chosen[0]["entries"] is not None:
            result[kind]["entries"] = _quantiles(
                np.concatenate([row["entries"] for row in chosen]), 0.5, 0.99
            )
        if chosen[0]["tail_logprob"] is not None:
            tail = np.concatenate([row["tail_logprob"] for row in chosen]).astype(np.float64)
            result[kind]["kept_mass"] = _quantiles(1 - np.exp(tail), 0.01, 0.1, 0.5)
    return result


def _quantiles(values: np.ndarray, *at: float) -> dict[str, float]:
    found = np.quantile(values, at)
    return {"mean": float(values.mean())} | {
        f"q{round(q * 100):02}": float(x) for q, x in zip(at, found, strict=True)
    }
