"""Spans of a row: which tokens are scored.

What is wrong is refused by the writer and found by verify.
"""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.errors import IntegrityError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.tables.rows import check_row, row_bytes, rows_to_table
from stillroom.storage.tables.spans import flat, positions, scored_tokens, spans_of

TWO = 1  # of the tests' rows one with two spans: [[2, 3], [6, 3]] of ten tokens

WRONG = [
    ({"spans": [2, 3, 4, 3]}, "the one at 4 starts before 5"),
    ({"spans": [6, 3, 2, 3]}, "the one at 2 starts before 9"),
    ({"spans": [2, 6, 9, 0]}, "the one at 9 has no tokens"),
    ({"spans": [0, 3, 6, 3], "span_start": 0}, "the one at 0 starts before 1"),
    ({"spans": [2, 3, 8, 3]}, "the one at 8 ends at 11, the row has 10 tokens"),
    ({"spans": []}, r"of its spans \(start, tokens\) \[\], there is none"),
    ({"spans": [2, 3, 6]}, "expected two numbers for each"),
]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *WRONG,
        ({"spans": [2, 2, 6, 3]}, r"are \(2, 6\), its spans say \(2, 5\)"),
        ({"span_start": 3}, r"are \(3, 6\), its spans say \(2, 6\)"),
        ({"labels": [1] * 5}, "labels holds 5 numbers, expected 6"),
        ({"tail_bound": np.ones(7, np.float32)}, "tail_bound holds 7 numbers, expected 6"),
        ({"tail_bound": -np.ones(6, np.float32)}, "it is 0 or more"),
    ],
)
def test_targets_with_wrong_spans_are_refused_and_found(store, samples, monkeypatch, change, says):
    row = samples.target_row(TWO) | change
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        writer.add(samples.target_row(0))
        with pytest.raises(IntegrityError, match=says):
            writer.add(row)
        monkeypatch.setattr("stillroom.storage.store.writer.check_shape", lambda *_: None)
        writer.add(row)
    (problem,) = verify(store).problems
    assert f"row 1 ({row['key'].hex()})" in problem.message
    with pytest.raises(IntegrityError, match=says):
        raise IntegrityError(problem.message)


@pytest.mark.parametrize(("change", "says"), WRONG)
def test_generations_with_wrong_spans_are_refused(store, samples, change, says):
    row = samples.generation_row(TWO) | {"token_ids": [1] * 10, "completion_tokens": 8}
    with (
        store.writer("generations", about=samples.GENERATIONS_ABOUT) as writer,
        pytest.raises(IntegrityError, match=says),
    ):
        writer.add(row | {"spans": change["spans"]})


def test_what_is_said_of_each_scored_token_comes_back(store, samples):
    said = {
        "labels": np.arange(6, dtype=np.int32),
        "tail_bound": np.linspace(0, 1, 6).astype(np.float32),
        "entropy_is_bound": True,
        "engine": "vllm",
    }
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        writer.add(samples.target_row(TWO) | said)
    (commit,) = store.commits("soft_targets")
    (row,) = store.rows("soft_targets", {commit.shard.sha256: [0]})
    for name, value in said.items():
        np.testing.assert_array_equal(row[name], value)
    assert spans_of(row).tolist() == [[2, 3], [6, 3]]
    assert verify(store).ok


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scored_tokens_are_counted_alike_of_a_row_and_of_a_table(samples, data):
    rows = []
    for number in range(data.draw(st.integers(0, 6))):
        total = data.draw(st.integers(2, 12))
        prompt = data.draw(st.integers(0, total))
        starts = sorted(data.draw(st.sets(st.integers(1, total - 1))))
        spans = np.array([[start, 1] for start in starts]) if starts and number % 2 else None
        rows.append(
            samples.generation_row(number)
            | {
                "token_ids": [1] * total,
                "prompt_tokens": prompt,
                "completion_tokens": total - prompt,
            }
            | {"spans": None if spans is None else flat(spans)}
        )
    table = rows_to_table("generations", [check_row("generations", row) for row in rows])
    expected = [len(positions(spans_of(row))) for row in rows]
    assert scored_tokens(table).tolist() == expected
    halves = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert scored_tokens(halves).tolist() == expected


def test_the_size_of_a_row_counts_whatever_it_holds():
    message = {"role": "user", "content": "hello"}
    row = {"messages": [message], "message_fields": ['{"a":1}', None], "values": b"x" * 100}
    assert row_bytes(row) == len("userhello") + len('{"a":1}') + 8 + 100
