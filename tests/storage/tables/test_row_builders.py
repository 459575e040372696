"""A built row has its table's columns.

It says of the text and of the targets what follows from them.
"""

import numpy as np
import pytest

from stillroom.storage.keys import content_key
from stillroom.storage.tables.invariants import check_shape
from stillroom.storage.tables.row_builders import generation_row, given_row, target_row
from stillroom.storage.tables.rows import check_row
from stillroom.storage.tables.schema import SCHEMAS
from stillroom.storage.tables.soft_targets import SoftTargets

KEYS = {name: name.encode().ljust(16, b"-") for name in ("key", "reuse_key", "tokens_key")}
PROMPT_KEY, SOURCE_KEY, GENERATION_KEY = b"p" * 16, b"s" * 16, b"g" * 16


def test_a_generated_row_counts_its_completion():
    row = generation_row(
        **KEYS,
        prompt_key=PROMPT_KEY,
        author_id="author",
        sampling_id="sampling",
        sample_index=2,
        token_ids=[5, 6, 7, 8, 9],
        prompt_tokens=2,
        text="words",
        finish_reason="length",
        max_tokens=3,
        row_seed=11,
    )
    assert sorted(row) == sorted(SCHEMAS["generations"].names)
    assert (row["prompt_tokens"], row["completion_tokens"], row["source_key"]) == (2, 3, None)
    check_shape("generations", check_row("generations", row), {})


@pytest.mark.parametrize("as_list", [True, False])
def test_a_given_row_is_named_by_author_source_and_window(as_list):
    def row(window=1):
        return given_row(
            author_id="author",
            source_key=SOURCE_KEY,
            prompt_key=PROMPT_KEY,
            window=window,
            tokens_key=KEYS["tokens_key"],
            token_ids=[1, 2, 3] if as_list else np.array([1, 2, 3], np.int32),
            prompt_tokens=0,
            text="words",
        )

    reuse_key = content_key("given", author="author", source=SOURCE_KEY, window=1)
    assert row()["reuse_key"] == reuse_key
    assert row()["key"] == content_key("generations", reuse_key=reuse_key, max_tokens=None)
    assert row()["key"] != row(window=2)["key"]
    assert (row()["sampling_id"], row()["finish_reason"]) == ("author", "given")
    assert (row()["max_tokens"], row()["row_seed"]) == (None, None)
    check_shape("generations", check_row("generations", row()), {})


def test_a_ragged_target_row_says_its_limit_and_not_its_widest_position():
    targets = SoftTargets(
        ids=np.array([[3, 1], [4, -1]], np.int32),
        logprobs=np.log(np.array([[0.5, 0.25], [0.75, 0.0]], np.float32) + 1e-30),
        tail_logprob=np.log(np.array([0.25, 0.25], np.float32)),
        token_logprob=np.log(np.array([0.5, 0.75], np.float32)),
        entropy=np.array([1.0, 0.5], np.float32),
        entries=np.array([2, 1], np.int32),
    )
    settings = {"kind": "topp", "k": 8, "p": 0.7, "k_min": 1, "draw": None, "proposal": None}
    row = target_row(
        **KEYS,
        generation_key=GENERATION_KEY,
        prompt_key=PROMPT_KEY,
        teacher_id="teacher",
        token_ids=[9, 3, 4],
        spans=np.array([[1, 2]]),
        targets=targets,
        mantissa_bits=10,
        settings=settings,
    )
    assert row.keys() == set(SCHEMAS["soft_targets"].names)
    assert {row[name] for name in ("tail_bound", "entropy_is_bound", "engine")} == {None}
    assert (row["k"], row["span_tokens"], row["label"]) == (8, 2, None)
    about = {"teacher_id": "teacher", "vocab_size": 10}
    check_shape("soft_targets", check_row("soft_targets", row), about)


def test_a_bound_is_never_rounded_down():
    bounds = np.array([0.0, 1e-7, 0.3, 1.0, np.inf])
    targets = SoftTargets(
        ids=np.full((5, 1), 3, np.int32),
        logprobs=np.log(np.full((5, 1), 0.5, np.float32)),
        tail_logprob=np.log(np.full(5, 0.5, np.float32)),
        token_logprob=np.log(np.full(5, 0.5, np.float32)),
        entropy=np.full(5, 1.0, np.float32),
    )
    row = target_row(
        **KEYS,
        generation_key=GENERATION_KEY,
        prompt_key=PROMPT_KEY,
        teacher_id="teacher",
        token_ids=[9, 3, 3, 3, 3, 3],
        spans=np.array([[1, 5]]),
        targets=targets,
        mantissa_bits=4,
        settings={"kind": "topk", "k": 1, "p": None, "k_min": None, "draw": None, "proposal": None},
        engine="vllm",
        tail_bound=bounds,
    )
    assert (row["engine"], row["entropy_is_bound"]) == ("vllm", True)
    assert (row["tail_bound"] >= bounds).all()
    np.testing.assert_allclose(row["tail_bound"], bounds, rtol=0.15)
    check_shape(
        "soft_targets", check_row("soft_targets", row), {"teacher_id": "teacher", "vocab_size": 10}
    )
