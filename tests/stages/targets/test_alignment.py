"""The shift, by hand and as a property."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillroom.stages.targets.alignment import (
    parts_of,
    predicting_positions,
    scored_tokens,
    spans_at,
    target_positions,
)
from stillroom.storage.tables.heads import HEADS


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_nine_tokens_by_hand(kind):
    token_ids = kind([1, 50, 60, 2, 51, 52, 61, 62, 2])  # <s> hi | a </s> | and now | b c </s>
    spans = np.array([[2, 2], [6, 3]])
    assert scored_tokens(token_ids, spans).tolist() == [60, 2, 61, 62, 2]
    assert token_ids[predicting_positions(spans)].tolist() == [50, 60, 52, 61, 62]
    assert predicting_positions(spans).tolist() == [1, 2, 5, 6, 7]
    assert parts_of(spans) == [slice(0, 2), slice(2, 5)]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4), st.data())
def test_position_t_predicts_token_t_plus_1(gaps, data):
    """Also where a span's first position is the last token of the one before."""
    ends = np.cumsum([gap + tokens for gap, tokens in gaps])
    spans = np.array([[end - n, n] for end, (_, n) in zip(ends, gaps, strict=True)])
    token_ids = np.arange(100, 100 + ends[-1] + data.draw(st.integers(0, 3)))
    positions, tokens = predicting_positions(spans), scored_tokens(token_ids, spans)
    assert [token_ids[t + 1] for t in positions] == tokens.tolist()
    by_span = [positions[part].tolist() for part in parts_of(spans)]
    assert by_span == [list(range(start - 1, start + n - 1)) for start, n in spans]


@pytest.mark.parametrize("spans", [[[0, 7]], [[1, 2], [4, 3]]])
def test_a_span_outside_the_sequence_is_refused(spans):
    with pytest.raises(AssertionError):
        scored_tokens(np.arange(6), np.array(spans))


@pytest.mark.parametrize("spans", [[[0, 3]], [[0, 1], [3, 1]]])
def test_token_0_is_never_scored(spans):
    with pytest.raises(AssertionError):
        predicting_positions(np.array(spans))


def test_by_hand_a_class_is_said_at_its_words_first_token():
    """[CLS] EU re ##ject it [SEP]: nothing is shifted; a word's second token has no target."""
    spans = spans_at(np.array([1, 2, 4]))
    assert spans.tolist() == [[1, 2], [4, 1]]
    assert target_positions(spans, HEADS["token_classes"]).tolist() == [1, 2, 4]
    assert target_positions(spans, HEADS["lm"]).tolist() == [0, 1, 3]


@given(st.lists(st.integers(0, 40), min_size=1, unique=True))
def test_spans_hold_the_tokens_that_they_were_made_of(indices):
    """From the first token of a row on, where no special token stands before it."""
    tokens = np.sort(indices)
    spans = spans_at(tokens)
    assert target_positions(spans, HEADS["token_classes"]).tolist() == tokens.tolist()
    assert (spans[1:, 0] > spans[:-1].sum(axis=1)).all(), "as few as there can be"
