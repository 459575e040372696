"""Rounding against a definition in exact arithmetic; soft targets there and back."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.storage.errors import IntegrityError
from stillroom.storage.tables.soft_targets import SoftTargets, round_mantissa

FLOATS = st.floats(width=32, allow_nan=False, min_value=-(2.0**99), max_value=2.0**99)
SHORT = st.builds(
    lambda mantissa, exponent: mantissa * 2.0**exponent,
    st.integers(-4095, 4095),
    st.integers(-30, 30),
)
"""Few bits of mantissa: often exactly between two values of fewer bits."""


def rounded_exactly(value: float, bits: int) -> Fraction:
    """Nearest multiple of 2**(exponent - bits), ties to the even one, in rational arithmetic."""
    exact = Fraction(value)
    if exact == 0:
        return exact
    exponent = max(np.frexp(abs(value))[1] - 1, -126)  # below 2**-126 float32 has a fixed step
    return round(exact / Fraction(2) ** int(exponent - bits)) * Fraction(2) ** int(exponent - bits)


@given(st.lists(FLOATS | SHORT, min_size=1, max_size=20), st.integers(1, 23))
def test_round_mantissa_is_round_to_nearest_even(values, bits):
    array = np.array(values, np.float32)
    result = round_mantissa(array, bits)
    assert result.dtype == np.float32
    assert [Fraction(float(x)) for x in result] == [rounded_exactly(float(x), bits) for x in array]
    np.testing.assert_array_equal(round_mantissa(result, bits), result)
    assert np.all(result.view(np.uint32) & np.uint32((1 << (23 - bits)) - 1) == 0)


def test_round_mantissa_keeps_what_is_no_number():
    special = np.array([-np.inf, np.inf, np.nan, 0.0], np.float32)
    for bits in (1, 10, 23):
        np.testing.assert_array_equal(round_mantissa(special, bits), special)
    with pytest.raises(ValueError, match="between 1 and 23"):
        round_mantissa(special, 0)


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("bits", [4, 10, 23])
def test_targets_come_back(samples, k, bits):
    row = samples.target_row(7, k=k)
    targets = SoftTargets.from_row(row)
    columns = targets.columns(bits)
    assert (columns["k"], columns["span_tokens"]) == (k, 6)
    again = SoftTargets.from_row(columns)
    np.testing.assert_array_equal(again.ids, targets.ids)
    np.testing.assert_array_equal(again.logprobs, round_mantissa(targets.logprobs, bits))
    np.testing.assert_allclose(
        columns["kept_mass"], np.exp(targets.logprobs).sum(axis=1).clip(max=1).mean(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("k", "kind"), [(1, "topk"), (4, "topk"), (50, "topk"), (50, "full"), (20, "topp")]
)
@pytest.mark.parametrize("bits", [2, 10])
def test_normalised_sums_to_one(samples, k, kind, bits):
    targets = SoftTargets.from_row(samples.target_row(3, k=k, kind=kind))
    targets = SoftTargets.from_row(targets.columns(bits)).normalised()
    total = np.exp(targets.logprobs.astype(np.float64)).sum(axis=1) + np.exp(
        targets.tail_logprob.astype(np.float64)
    )
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    assert kind == "topp" or np.isfinite(targets.logprobs).all()
    if k == 50:
        assert np.isneginf(targets.tail_logprob).all()  # kept mass 1.0: no tail, and nothing is NaN


@pytest.mark.parametrize("bits", [3, 10])
def test_a_tempered_tail_is_rescaled_with_its_entries(samples, bits):
    """Whatever one factor does to p, its power 1/T does to p^(1/T).

    So the tempered distribution stays as it was.
    """
    row = samples.target_row(3, k=6, kind="tempered")
    stored = SoftTargets.from_row(SoftTargets.from_row(row).columns(bits))
    found = stored.normalised()
    np.testing.assert_array_equal(stored.temperatures, found.temperatures)
    assert not np.array_equal(found.logprobs, stored.logprobs)
    for number, t in enumerate(samples.TEMPERATURES["tempered"]):
        tails = []
        for targets in (stored, found):
            entries = np.log(np.exp(targets.logprobs.astype(np.float64) / t).sum(axis=1))
            tail = targets.tempered_tails[:, number].astype(np.float64)
            tails.append(np.exp(tail - np.logaddexp(entries, tail)))
        np.testing.assert_allclose(*tails, rtol=1e-5)


def test_temperatures_are_names_and_not_rounded(samples):
    targets = SoftTargets.from_row(
        samples.target_row(3, kind="tempered") | {"temperatures": [0.3, 1.7]}
    )
    columns = targets.columns(4)
    np.testing.assert_array_equal(columns["temperatures"], np.array([0.3, 1.7], np.float32))
    np.testing.assert_array_equal(
        columns["tempered_tails"], round_mantissa(targets.tempered_tails.reshape(-1), 4)
    )


def test_normalised_with_all_mass_on_one_entry():
    one = np.zeros((2, 1), np.float32)
    nothing = np.full(2, -np.inf, np.float32)
    targets = SoftTargets(
        np.zeros((2, 1), np.int32), one, nothing, np.zeros(2, np.float32), np.zeros(2, np.float32)
    )
    np.testing.assert_array_equal(targets.normalised().logprobs, one)
    assert targets.columns(10)["kept_mass"] == 1.0
    empty = SoftTargets(targets.ids, nothing[:, None], nothing, nothing, nothing)
    with pytest.raises(IntegrityError, match="no probability at all"):
        empty.normalised()


@pytest.mark.parametrize("name", ["ids", "logprobs", "tail_logprob", "token_logprob", "entropy"])
def test_a_row_whose_lengths_disagree_is_refused(samples, name):
    row = samples.target_row(1)
    with pytest.raises(
        IntegrityError, match=rf"{name} has {len(row[name]) - 1} values, expected {len(row[name])}"
    ):
        SoftTargets.from_row({**row, name: row[name][:-1]})


def test_shapes_that_disagree_are_refused():
    with pytest.raises(IntegrityError, match="entropy has shape"):
        SoftTargets(None, np.zeros((2, 3)), np.zeros(2), np.zeros(2), np.zeros(3))
