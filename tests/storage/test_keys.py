"""Names made from content, and sealed records."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.storage.errors import IntegrityError
from stillroom.storage.keys import canonical_json, content_id, content_key, row_seed, seal, unseal

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aé☃"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_canonical_json_is_one_spelling():
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    assert canonical_json(b"\x01\xff") == b'"01ff"'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_numbers_that_json_does_not_have_are_refused(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


def test_values_without_a_canonical_form_are_refused():
    with pytest.raises(TypeError, match="set has no canonical form"):
        canonical_json({1, 2})


def test_keys_are_stable_across_versions():
    # Written down: if these change, every store made before is worthless.
    assert content_id("prompt", text="Hello", format="prompt") == "b5aa05532ec53b91cc1500457cb78c38"
    assert (
        content_key("prompt", format="prompt", text="Hello").hex()
        == "b5aa05532ec53b91cc1500457cb78c38"
    )
    assert row_seed(bytes.fromhex("ffffffffffffffff" + "00" * 8)) == 2**63 - 1
    assert row_seed(bytes(16)) == 0


@given(JSON, JSON)
def test_equal_values_and_only_those_share_a_key(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (content_key("x", v=a) == content_key("x", v=b)) == same
    assert content_key("x", v=a) != content_key("y", v=a)
    assert 0 <= row_seed(content_key("x", v=a)) < 2**63


@given(st.dictionaries(st.text("xyz", max_size=3), JSON, max_size=3))
def test_a_sealed_record_comes_back(record):
    assert unseal(seal(record), "r.json") == record


def test_a_changed_record_is_named():
    data = seal({"rows": 10})
    with pytest.raises(IntegrityError, match=r"commits/x\.json: the record was changed"):
        unseal(data.replace(b"10", b"11"), "commits/x.json")
    for junk in (b"", b"{", b"[]", b"{}", b"\xff", data[:-5]):
        with pytest.raises(IntegrityError, match=r"r\.json: not a record"):
            unseal(junk, "r.json")
