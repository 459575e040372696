"""Whether targets belong to the tokens that they stand beside.

It is seen without their teacher, by what they find likely. With l_s(n) the log-probability that the
target at position n gives the token at n + s, and H its entropy, targets that are in place find
their own tokens likely: l_0 is above l_1 and l_-1 in the mean. It is so by 0.5 nats and more,
measured on texts that small teachers were trained on, and on others (verse, encyclopedia, code,
another language). Otherwise they are

    shifted     where the token beside, s = 1 or -1, is the likely one, beyond chance: above
                their own and above that of the other side; and one of two more things says that
                it is their own:
                it fits:  -l_s is as low as H says, much lower than -l_0 beside H
                blind:    their own token is no likelier than that on the other side
                The same with the tokens of the row after and the row before.
    unknowing   where -l_0 is far above H, beyond chance, and l_0 no better than its neighbours:
                sure, of nothing here. So are targets of any other tokens, and those of a
                teacher that does not know such text

Chance is counted over the distinct tokens that predict, not over positions: a text that repeats
itself, read by a teacher that knows nothing, is one accident many times over. (A teacher without
training whose output layer is its embedding finds the token before most likely, and looks shifted.)

Where words are classified, their gold classes stand for tokens, and the words beside for positions.
Where tokens are hidden, the hidden ones beside stand for positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...storage.tables.heads import HEADS, Head
from ...storage.tables.kinds import STRUCTURES
from ...storage.tables.soft_targets import SoftTargets
from ...storage.tables.spans import spans_of
from ..targets.alignment import parts_of, scored_tokens, target_positions

Row = Mapping[str, Any]

NATS = 0.5
"""Difference in the mean that is no longer a matter of which model or text ..."""
DEVIATIONS = 6.0
"""... nor of chance, at so many standard errors ..."""
DISTINCT = 16
"""... of so many distinct things, fewer of which say nothing of their spread."""
LITTLE = 1 / 4
"""What is less than a quarter of a difference between shifted and own is little beside it: targets
in place that merely like the neighbour have their own token closer than that."""
NOTHING = 1 / 10
"""How little of what they are surprised by unknowing targets may win on their own tokens."""


_LM = HEADS["lm"]


def shifted(rows: Sequence[Row], head: Head = _LM) -> str | None:
    """Whose the targets of some `soft_targets` rows are in place of their own, in words.

    None: nobody else's are seen.

    Rows are in the order of the store, and not of texts with one target each.
    """
    known = [row for row in rows if at_one(row) and _known(row, head)]
    whose = "labels" if head.classes else "tokens"
    for found, what in ((_by_position(known, head), "position"), (_by_row(known, head), "row")):
        if found is None:
            continue
        before, own, after, entropy, predicting = found
        for there, other, side in ((after, before, "after"), (before, after, "before")):
            if _belong(there, own, other, entropy=entropy, predicting=predicting):
                return (
                    f"shifted by one {what}, those of the {what} {side}: -log p of the {whose} "
                    f"there is {-there.mean():.2f} nats, of their own {-own.mean():.2f}, of those "
                    f"on the other side {-other.mean():.2f}, their entropy {entropy.mean():.2f}"
                )
    return None


def _belong(
    there: np.ndarray,
    own: np.ndarray,
    other: np.ndarray,
    *,
    entropy: np.ndarray,
    predicting: np.ndarray,
) -> bool:
    """Whether targets are those of the tokens on one side.

    Args:
        there: [N] log-probabilities of the tokens there, l_s.
        own: [N] of their own, l_0.
        other: [N] of those on the other side, l_-s.
        entropy: [N] of the targets.
        predicting: [N] the tokens that predict.
    """
    gain = there - own
    nearest = beyond_chance(gain, of=predicting) and beyond_chance(there - other, of=predicting)
    # -l_s is H in the mean if the text is the teacher's: the excess -l_s - H is little beside the
    # excess of their own, or negative. Both are written with their sign turned.
    fits = (there + entropy).mean() > LITTLE * (own + entropy).mean()
    # Their own token is no likelier than the other side's, beside what the shift gains.
    blind = (own - other).mean() < LITTLE * gain.mean()
    return nearest and bool(fits or blind)


def unknowing(rows: Sequence[Row]) -> str | None:
    """How little the targets know of any token here, in words.

    None: they know something, or claim nothing.
    """
    if (found := _by_position([row for row in rows if _measures(row)], _LM)) is None:
        return None
    before, own, after, entropy, predicting = found
    # How much less likely the tokens are than the targets' entropy says: -l_0 - H.
    excess = -own - entropy
    # How much likelier than their neighbours, whichever comes closer; two standard errors in doubt.
    ahead = min((own - before, own - after), key=np.mean)
    mean, error = _mean(ahead, of=predicting)
    know_something = mean + 2 * error > NOTHING * excess.mean()
    if know_something or not beyond_chance(excess, of=predicting):
        return None
    return (
        f"-log p of the tokens that the targets stand beside is {-own.mean():.2f} nats, of the "
        f"neighbouring ones {-before.mean():.2f} and {-after.mean():.2f}, where their entropy is "
        f"{entropy.mean():.2f}"
    )


def surprise(rows: Sequence[Row]) -> float | None:
    """How much less likely the teacher finds the text than the targets' entropy says, nats.

    None: that is chance.
    """
    found = [
        -row["token_logprob"].astype(np.float64) - row["entropy"] for row in rows if _measures(row)
    ]
    excess = np.concatenate(found) if found else np.zeros(1)
    return float(excess.mean()) if beyond_chance(excess, of=np.arange(len(excess))) else None


def at_one(row: Row) -> bool:
    """Whether a row's entropy and entries are at temperature 1: ids may be drawn at another one."""
    return not STRUCTURES[row["kind"]].drawn or row.get("temperatures") is None


def _measures(row: Row) -> bool:
    """Whether a row's entropy says how likely the teacher's own text is.

    It does at temperature 1, if it is no bound.
    """
    return at_one(row) and not row.get("entropy_is_bound")


def beyond_chance(values: np.ndarray, *, of: np.ndarray) -> bool:
    """Whether a mean is so far above 0 that something must be wrong.

    Neither chance nor a teacher that is a little off explains it then.

    Args:
        values: [N].
        of: [N] what each value is of; values of the same thing count once.
    """
    mean, error = _mean(values, of=of)
    return len(np.unique(of)) >= DISTINCT and mean > max(NATS, DEVIATIONS * error)


def _mean(values: np.ndarray, *, of: np.ndarray) -> tuple[float, float]:
    """Mean, and its standard error if values of the same thing go up and down together."""
    _, group = np.unique(of, return_inverse=True)
    mean = float(values.mean())
    together = np.bincount(group, values - mean)
    return mean, float(np.sqrt((together**2).sum()) / len(values))


def _by_position(rows: Sequence[Row], head: Head) -> np.ndarray | None:
    """[5, N] of the inner positions of all rows: l_-1, l_0, l_1, entropy, the token that predicts.

    None: there are none.
    """
    parts = []
    for row in rows:
        tokens = _outcomes(row, head)
        for part in _parts(row, head):
            # The first and the last position of a span have no neighbour on one side.
            inner = slice(part.start + 1, part.stop - 1)
            if inner.start < inner.stop:
                beside = [tokens[inner.start + s : inner.stop + s] for s in (-1, 0, 1)]
                parts.append(_likelihoods(row, inner, beside, head))
    return np.concatenate(parts, axis=1) if parts else None


def _by_row(rows: Sequence[Row], head: Head) -> np.ndarray | None:
    """The same with the tokens of the row before, the own and the row after.

    It goes span by span, as far as all three go.
    """
    parts = []
    for three in zip(rows, rows[1:], rows[2:], strict=False):
        _, row, _ = three
        for spans in zip(*(_parts(one, head) for one in three), strict=False):
            n = min(span.stop - span.start for span in spans)
            own = spans[1].start
            tokens = [
                _outcomes(one, head)[span.start : span.start + n]
                for one, span in zip(three, spans, strict=True)
            ]
            parts.append(_likelihoods(row, slice(own, own + n), tokens, head))
    return np.concatenate(parts, axis=1) if parts else None


def _likelihoods(row: Row, part: slice, tokens: Sequence[np.ndarray], head: Head) -> np.ndarray:
    """[5, N] the log-probabilities that targets give three lists of tokens, and two rows more.

    These are the targets' entropy and the token that predicts.
    """
    targets = SoftTargets.from_row(row).positions(part)
    positions = target_positions(spans_of(row), head)
    predicting = row["token_ids"][positions][part]
    return np.stack([*(_logprob_of(targets, one) for one in tokens), targets.entropy, predicting])


def _known(row: Row, head: Head) -> bool:
    """Whether it is known what is there, at each of a row's targets."""
    return not head.classes or (row["labels"] is not None and bool((row["labels"] >= 0).all()))


def _outcomes(row: Row, head: Head) -> np.ndarray:
    """[N] what is there."""
    outcomes: np.ndarray = scored_tokens(row["token_ids"], spans_of(row))
    return np.asarray(row["labels"]) if head.in_labels else outcomes


def _parts(row: Row, head: Head) -> list[slice]:
    """Which of the N targets stand beside one another.

    They are those of a span, or of all words, or of all that is hidden.
    """
    return [slice(0, int(row["span_tokens"]))] if head.in_labels else parts_of(spans_of(row))


def _logprob_of(targets: SoftTargets, tokens: np.ndarray) -> np.ndarray:
    """[N] what targets give some tokens; where a token is no entry, the most that it can be."""
    if targets.ids is None:
        # Full: every token is an entry.
        assert targets.logprobs is not None
        stated: np.ndarray = targets.logprobs[np.arange(len(tokens)), tokens]
        return stated.astype(np.float64)
    match = targets.ids == tokens[:, None]
    probs = targets.probabilities.astype(np.float64)
    least = np.min(probs, axis=1, where=targets.ids >= 0, initial=1.0)
    if targets.tail_logprob is None:
        # Sampled: half of what was drawn least, for what was not drawn at all.
        outside = least / 2
    else:
        tail = np.exp(targets.tail_logprob.astype(np.float64))
        outside = np.minimum(least, tail)
    found = np.where(match.any(axis=1), (probs * match).sum(axis=1), outside)
    logprobs: np.ndarray = np.log(np.maximum(found, np.finfo(np.float32).tiny))
    return logprobs
