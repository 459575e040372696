"""Features as they are stored: rounding and its error, what a row may say.

It also measures what a file takes.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from hypothesis.strategies import floats, sampled_from

from stillroom.storage.errors import IntegrityError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store
from stillroom.storage.tables.features import (
    Layout,
    Projected,
    Rounded,
    check_features,
    doubtful_features,
    feature_statistics,
)
from stillroom.storage.tables.row_builders import feature_row

DTYPES = ("int8", "float16", "float32")
ABOUT = {"teacher_id": "teacher", "stage": "score"}


def states(rows: int = 7, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def row(of: np.ndarray, dtype: str, **changes: Any) -> dict[str, Any]:
    names = {"key": b"k" * 16, "reuse_key": b"r" * 16, "text_key": b"t" * 16}
    made = feature_row(
        **names, teacher_id="teacher", kind="hidden", layer=1, states=of, dtype=dtype
    )
    return made | changes


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_read_back_within_their_rounding(dtype: str) -> None:
    made = states()
    found = Rounded.from_row(row(made, dtype)).restored()
    largest = np.abs(made).max(axis=1, keepdims=True)
    most = {"int8": largest / 254 * 1.0001, "float16": np.abs(made) * 2**-11, "float32": 0 * made}
    assert (np.abs(found - made) <= most[dtype]).all()
    off = np.linalg.norm((found - made).astype(np.float64)) / np.linalg.norm(made)
    assert row(made, dtype)["rounding_error"] == pytest.approx(off, abs=1e-9)


def test_rounding_again_changes_nothing() -> None:
    once = Rounded.of(states(), "int8").restored()
    np.testing.assert_array_equal(Rounded.of(once, "int8").restored(), once)


def test_a_vector_of_zeros_stays_one() -> None:
    made = states()
    made[2] = 0
    stored = row(made, "int8")
    assert stored["scale"][2] == 0
    np.testing.assert_array_equal(Rounded.from_row(stored).restored()[2], 0)
    assert not list(doubtful_features(stored))


@settings(max_examples=200, deadline=None)
@given(
    states=arrays(
        np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=floats(width=32)
    ),
    dtype=sampled_from(DTYPES),
)
def test_whatever_can_be_stored_is_not_doubted(states: np.ndarray, dtype: str) -> None:
    """The smallest and the largest numbers too, and vectors of which some have neither."""
    try:
        stored = row(states, dtype)
    except FloatingPointError:
        return
    check_features(stored, ABOUT)
    assert not list(doubtful_features(stored))


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        Rounded.of(np.array([[1.0, np.inf]], np.float32), "int8")
    with pytest.raises(FloatingPointError, match="7e\\+04, beyond what float16 holds"):
        Rounded.of(np.array([[1.0, 7e4]], np.float32), "float16")
    most = np.finfo(np.float32).max
    with pytest.raises(FloatingPointError, match=r"3.4e\+38, beyond what int8 holds"):
        Rounded.of(np.array([[most]], np.float32), "int8")


@pytest.mark.parametrize(
    ("dtype", "changes", "said"),
    [
        ("int8", {"vectors": 6}, "84 bytes, expected 72"),
        ("float16", {"width": 11}, "168 bytes, expected 154"),
        ("int8", {"scale": None}, "int8 with no scales for 7 vectors"),
        ("float16", {"scale": np.ones(7, np.float32)}, "float16 with 7 scales"),
        ("int8", {"dtype": "int4"}, "dtype 'int4'"),
        ("int8", {"teacher_id": "other"}, "teacher other in a shard of teacher"),
        ("int8", {"layer": -1}, "layer -1; layers count from 0"),
        ("int8", {"positions": np.arange(6)}, "6 positions for 7 vectors"),
        ("int8", {"positions": np.array([0, 1, 1, 3, 4, 5, 6])}, "they ascend"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(
    dtype: str, changes: dict[str, Any], said: str
) -> None:
    check_features(row(states(), dtype), ABOUT)
    with pytest.raises(IntegrityError, match=said):
        check_features(row(states(), dtype) | changes, ABOUT)


def test_queries_and_keys_take_4_d_and_little_more(tmp_path: Any) -> None:
    """D = 384 in float16: measured files, of both kinds."""
    store, tokens = Store.open(tmp_path / "store", create=True), 0
    layouts = {
        "queries": Layout(width=384, heads=12, score_scale=0.18, causal=False),
        "keys": Layout(width=384, heads=12),
    }
    with store.writer("features", about=ABOUT) as writer:
        for number in range(60):
            made = states(int(np.random.default_rng(number).integers(40, 160)), 384, seed=number)
            tokens += len(made)
            for kind, layout in layouts.items():
                key = bytes([number, len(kind)]) * 8
                names = {"key": key, "reuse_key": key, "text_key": bytes([number]) * 16}
                how = {"kind": kind, "layer": 5, "dtype": "float16", "layout": layout}
                writer.add(feature_row(**names, teacher_id="teacher", states=made, **how))
    files = sum(commit.shard.bytes for commit in store.commits("features"))
    assert 4 * 384 <= files / tokens <= 4 * 384 + 32
    assert verify(store).ok


HEADS = Layout(width=12, heads=3)
QUERIES = Layout(width=12, heads=3, score_scale=0.5, causal=True, window=4)


@pytest.mark.parametrize(
    ("kind", "layout", "changes", "said"),
    [
        ("keys", HEADS, {"heads": None}, "keys with heads None"),
        ("keys", HEADS, {"heads": 5}, "12 numbers of 5 heads"),
        ("keys", HEADS, {"score_scale": 0.5}, "keys with score_scale 0.5"),
        ("values", HEADS, {"window": 3}, "values with score_scale None, causal None and window 3"),
        ("queries", QUERIES, {"causal": None}, "queries with score_scale 0.5, causal None"),
        ("hidden", None, {"heads": 1}, "hidden with heads 1"),
    ],
)
def test_heads_are_said_of_what_has_some(
    kind: str, layout: Layout | None, changes: dict[str, Any], said: str
) -> None:
    names = {"key": b"k" * 16, "reuse_key": b"r" * 16, "text_key": b"t" * 16}
    made = feature_row(
        **names,
        teacher_id="teacher",
        kind=kind,
        layer=1,
        states=states(),
        dtype="float16",
        layout=layout,
    )
    check_features(made, ABOUT)
    assert not list(doubtful_features(made))
    with pytest.raises(IntegrityError, match=said):
        check_features(made | changes, ABOUT)


@pytest.mark.parametrize(("column", "value"), [("score_scale", 0.0), ("window", 0)])
def test_what_makes_no_attention_is_doubted(column: str, value: float) -> None:
    stored = row(states(), "float16", kind="queries", heads=3, score_scale=0.5, causal=True)
    assert [name for name, _ in doubtful_features(stored | {column: value})] == [column]


def test_numbers_that_cannot_be_are_doubted() -> None:
    for dtype in DTYPES:
        assert not list(doubtful_features(row(states(), dtype)))
    halved = np.frombuffer(row(states(), "int8")["values"], np.int8) // 2
    assert [c for c, _ in doubtful_features(row(states(), "int8", values=halved.tobytes()))] == [
        "values"
    ]
    broken = np.full(7, np.nan, np.float32)
    assert [c for c, _ in doubtful_features(row(states(), "int8", scale=broken))] == ["scale"]
    for scale in (-1.0, np.inf, 3e37):
        broken = np.full(7, scale, np.float32)
        assert [c for c, _ in doubtful_features(row(states(), "int8", scale=broken))] == ["scale"]
    for dtype in DTYPES:  # what the row states, deep verification allows
        for error in (np.nan, np.inf, -0.1, 0.2):
            found = doubtful_features(row(states(), dtype, rounding_error=error))
            assert [c for c, _ in found] == ["rounding_error"]
    infinite = np.full((7, 12), np.inf, "<f2").tobytes()
    assert [c for c, _ in doubtful_features(row(states(), "float16", values=infinite))] == [
        "values"
    ]


def projected(**changes: Any) -> dict[str, Any]:
    """Of 20 numbers in 12."""
    names = {"key": b"k" * 16, "reuse_key": b"r" * 16, "text_key": b"t" * 16}
    made = feature_row(
        **names,
        teacher_id="teacher",
        kind="values_12",
        layer=1,
        states=states(),
        dtype="int8",
        layout=Layout(width=12, projected_from=20),
        projected=Projected(projection="0a" * 16, projection_error=0.3),
    )
    return made | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"projection": None}, "values_12 with projection None"),
        ({"projected_from": None}, "projected_from None"),
        ({"projection_error": None}, "projection_error None"),
        ({"kind": "hidden"}, "hidden with projection 0a0a"),
        ({"kind": "values_012"}, "values_012 with projection 0a0a"),
        ({"kind": "values_13"}, "values_13 of 12 numbers, made of 20; they have 13"),
        ({"projected_from": 12}, "made of 12; they have 12, and had more before"),
        ({"projection": "../../outside"}, "not the name of a matrix"),
        ({"heads": 3}, "values_12 with heads 3"),
    ],
)
def test_a_projected_row_says_by_what_and_from_how_many(changes: dict[str, Any], said: str) -> None:
    check_features(projected(), ABOUT)
    assert not list(doubtful_features(projected()))
    with pytest.raises(IntegrityError, match=said):
        check_features(projected(**changes), ABOUT)


@pytest.mark.parametrize("error", [-0.1, 2.1, np.inf, np.nan])
def test_an_error_that_no_cosines_have_is_doubted(error: float) -> None:
    found = doubtful_features(projected(projection_error=error))
    assert [column for column, _ in found] == ["projection_error"]


def test_a_shard_says_what_projection_costs_where_there_is_one() -> None:
    more = projected(projection_error=0.5, vectors=21)
    found = feature_statistics([projected(), more, row(states(), "int8")])
    assert found["values_12 1 int8"]["projection_error"] == {
        "mean": pytest.approx(0.45),
        "most": 0.5,
    }
    assert "projection_error" not in found["hidden 1 int8"]


@pytest.mark.parametrize(("dtype", "said"), [("int8", 388), ("float16", 768), ("float32", 1536)])
def test_a_file_takes_what_the_plan_says(dtype: str, said: int, tmp_path: Any) -> None:
    """D = 384: 388 bytes a token at 8 bits, and at most 400 on disk; row groups of a MiB."""
    store = Store.open(tmp_path / "store", create=True)
    rng = np.random.default_rng(0)
    tokens = 0
    with store.writer("features", about=ABOUT) as writer:
        for number in range(60):
            made = states(int(rng.integers(40, 160)), 384, seed=number)
            tokens += len(made)
            writer.add(row(made, dtype, key=bytes([number]) * 16, text_key=bytes([number]) * 16))
    (commit,) = store.commits("features")
    assert commit.tokens == tokens
    per_token = commit.shard.bytes / tokens
    assert said <= per_token <= 1.03 * said
    if dtype == "int8":
        assert per_token <= 400
    shard = store.shard("features", commit.shard.sha256)
    assert len(shard.rows_per_group) > 1
    statistics = shard.about["statistics"][f"hidden 1 {dtype}"]
    assert (statistics["rows"], statistics["vectors"]) == (60, tokens)
    error = statistics["rounding_error"]
    assert 0 <= error["mean"] <= error["most"] <= 0.02
    assert (error["mean"] > 0) == (dtype != "float32")
    assert verify(store).ok
