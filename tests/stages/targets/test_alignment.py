"""The shift, by hand and as a property."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillroom.stages.targets.alignment import predicting_positions, scored_tokens


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_six_tokens_by_hand(kind):
    token_ids = kind([1, 50, 60, 61, 62, 2])  # <s> hi | a b c </s>
    assert scored_tokens(token_ids, 2, 4).tolist() == [60, 61, 62, 2]
    assert token_ids[predicting_positions(2, 4)].tolist() == [50, 60, 61, 62]
    assert predicting_positions(2, 4) == slice(1, 5)


@given(st.integers(2, 40), st.data())
def test_position_t_predicts_token_t_plus_1(length, data):
    start = data.draw(st.integers(1, length - 1))
    span = data.draw(st.integers(0, length - start))
    token_ids = np.arange(100, 100 + length)
    positions = np.arange(length)[predicting_positions(start, span)]
    assert [token_ids[t + 1] for t in positions] == scored_tokens(token_ids, start, span).tolist()


@pytest.mark.parametrize(("start", "span"), [(0, 3), (4, 3)])
def test_a_span_outside_the_sequence_is_refused(start, span):
    with pytest.raises(AssertionError):
        scored_tokens(np.arange(6), start, span)


def test_token_0_is_never_scored():
    with pytest.raises(AssertionError):
        predicting_positions(0, 3)
