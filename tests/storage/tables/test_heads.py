"""Rows of words: whole ones pass, others are refused by name.

One by one and a row group at a time they are refused alike.
"""

from typing import Any

import numpy as np
import pytest

from stillroom.storage.errors import IntegrityError
from stillroom.storage.integrity.row_faults import faults
from stillroom.storage.tables.doubts import doubts
from stillroom.storage.tables.heads import HEADS, head_of
from stillroom.storage.tables.invariants import check_shape
from stillroom.storage.tables.rows import Rows, check_row, rows_to_table
from stillroom.storage.tables.soft_targets import SoftTargets

NAMES = ["O", "B-PER", "I-PER"]


@pytest.fixture(name="about")
def about_words(samples) -> dict[str, Any]:
    return samples.ABOUT | {"head": "token_classes", "class_names": NAMES}


def word_row(samples, index: int, **more: Any) -> dict[str, Any]:
    """Three words, the first at the row's first token; the second has no label."""
    rng = np.random.default_rng(index)
    logits = rng.normal(0, 2, (3, 3))
    logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    labels = np.array([2, -1, 0], np.int32)
    there = np.where(labels < 0, logprobs.argmax(1), labels)
    targets = SoftTargets(
        ids=None,
        logprobs=logprobs,
        tail_logprob=np.full(3, -np.inf, np.float32),
        token_logprob=logprobs[np.arange(3), there],
        entropy=-(np.exp(logprobs) * logprobs).sum(1),
    )
    row = samples.target_row(index, kind="full")
    own = {"token_ids": np.arange(5, dtype=np.int32), "span_start": 0, "spans": [0, 1, 2, 2]}
    return row | targets.columns(samples.BITS) | own | {"labels": labels} | more


def test_a_row_of_words_holds_and_nothing_in_it_is_doubted(samples, about) -> None:
    row = word_row(samples, 3)
    best = row["logprobs"].reshape(3, 3).max(axis=1)
    for one in (row, row | {"labels": None, "token_logprob": best}):
        check_shape("soft_targets", one, about)
        assert list(doubts(one, about)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": np.array([3, 0, 0])}, r"label 3, expected 0 to 2 \(O, B-PER, I-PER\)"),
        ({"labels": np.array([-2, 0, 0])}, "label -2, expected 0 to 2"),
        ({"labels": np.array([0, 0])}, "labels holds 2 numbers, expected 3"),
        ({"spans": [0, 1, 2, 1]}, "span_start and span_tokens are"),
        ({"spans": [0, 1, 4, 2]}, "ends at 6, the row has 5 tokens"),
        ({"kind": "topk"}, "kind 'topk' over classes, expected 'full'"),
        ({"k": 2}, "k 2, the vocabulary has 3"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(samples, about, change, says) -> None:
    with pytest.raises(IntegrityError, match=says):
        check_shape("soft_targets", word_row(samples, 3, **change), about)


def test_a_language_models_row_never_scores_its_first_token(samples, about) -> None:
    row = samples.target_row(3) | {"span_start": 0}
    with pytest.raises(IntegrityError, match="start at 1 or later, because position t"):
        check_shape("soft_targets", row, samples.ABOUT)


def test_many_rows_are_asked_as_one_is(samples, about) -> None:
    """The wrong one is found among others, whose labels are there or not."""
    right = [word_row(samples, n) for n in range(6)]
    shifted = word_row(samples, 6)
    shifted["token_logprob"] = np.roll(shifted["token_logprob"], 1) - 1
    other = word_row(samples, 7, labels=np.array([9, 0, 0], np.int32))
    rows = [check_row("soft_targets", row) for row in [*right, shifted, other]]
    found = list(faults("soft_targets", Rows(rows_to_table("soft_targets", rows)), about))
    assert {row for row, _, _ in found} == {6, 7}
    assert any("label 9" in said for _, _, said in found)
    alone = list(faults("soft_targets", Rows(rows_to_table("soft_targets", rows[:6])), about))
    assert alone == []


def test_a_head_that_is_not_known_is_refused() -> None:
    assert head_of({}) is HEADS["lm"]
    with pytest.raises(IntegrityError, match="head 'boxes', expected one of lm, classes, token_cl"):
        head_of({"head": "boxes"})
