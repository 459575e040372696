"""Rows of every kind: whole ones pass, and one that contradicts itself is refused.

Verify doubts numbers.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.errors import IntegrityError
from stillroom.storage.tables.doubts import doubts
from stillroom.storage.tables.invariants import check_shape
from stillroom.storage.tables.soft_targets import SoftTargets
from stillroom.storage.tables.statistics import statistics

KINDS = ("topk", "topp", "sampled", "weighted", "full", "tempered", "hot")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    index=st.integers(0, 10**6),
    tokens=st.integers(1, 40),
    k=st.integers(2, 30),
)
def test_a_row_of_any_kind_holds_and_nothing_in_it_is_doubted(samples, kind, index, tokens, k):
    k = samples.VOCABULARY if kind == "full" else k
    row = samples.target_row(index, tokens=tokens, k=k, kind=kind)
    check_shape("soft_targets", row, samples.ABOUT)
    assert list(doubts(row, samples.ABOUT)) == []


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    data=st.data(),
    tokens=st.integers(2, 12),
    by=st.sampled_from([-1, 1]),
    k=st.integers(2, 9),
)
def test_a_row_with_a_target_too_many_or_too_few_is_refused(samples, kind, data, tokens, by, k):
    row = samples.target_row(
        5, tokens=tokens, k=samples.VOCABULARY if kind == "full" else k, kind=kind
    )
    lists = [
        "entries",
        "ids",
        "logprobs",
        "counts",
        "weights",
        "tail_logprob",
        "token_logprob",
        "entropy",
    ]
    lists += ["temperatures", "tempered_tails"]
    name = data.draw(st.sampled_from([name for name in lists if row[name] is not None]))
    longer = row[name][:-1] if by < 0 else np.append(row[name], row[name][-1:])
    with pytest.raises(IntegrityError, match=r"each scored token has its own target|expected"):
        check_shape("soft_targets", {**row, name: longer}, samples.ABOUT)
    moved = row | {"span_tokens": tokens + by, "token_ids": np.zeros(tokens + 4, np.int32)}
    with pytest.raises(IntegrityError, match="each scored token has its own target"):
        check_shape("soft_targets", moved, samples.ABOUT)


def changed(values, position, value):
    values = values.copy()
    values[position] = value
    return values


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("topk", {"kind": "best"}, "kind 'best', expected one of topk, topp, sampled, full"),
        ("topk", {"ids": None}, "kind 'topk' without ids; this kind needs it"),
        ("topk", {"p": 0.9}, "kind 'topk' with p; this kind has none"),
        ("topp", {"entries": None}, "kind 'topp' without entries"),
        ("topp", {"k_min": 3}, "entries, expected 3 to 9"),
        ("topp", {"k": 2}, "entries, expected 2 to 2"),
        ("sampled", {"draw": None}, "kind 'sampled' without draw"),
        ("sampled", {"tail_logprob": np.zeros(6, np.float32)}, "kind 'sampled' with tail_logprob"),
        ("sampled", {"counts": lambda counts: counts + 1}, "do not sum to its 9 draws"),
        ("sampled", {"counts": lambda counts: changed(counts, 0, 0)}, "do not sum to its 9 draws"),
        ("sampled", {"proposal": 0.5}, "kind 'sampled' with counts; this kind has none"),
        ("weighted", {"proposal": 1.0}, "kind 'sampled' without counts; this kind needs it"),
        (
            "weighted",
            {"weights": lambda weights: weights * np.float32(np.nan)},
            "weights holds NaN",
        ),
        ("full", {"ids": np.zeros(6 * 50, np.int32)}, "kind 'full' with ids"),
        ("full", {"kind": "topk"}, "kind 'topk' without ids"),
        (
            "full",
            {"temperatures": [2.0], "tempered_tails": np.zeros(6, np.float32)},
            r"temperatures \[2.0\]",
        ),
        (
            "hot",
            {"temperatures": [2.0, 3.0], "tempered_tails": np.zeros(12, np.float32)},
            "sampled: one at most",
        ),
        (
            "tempered",
            {"temperatures": None, "tempered_tails": None, "p": None},
            "kind 'topp' without p",
        ),
        ("tempered", {"tempered_tails": None}, "and no sums"),
        ("tempered", {"temperatures": [2.0, 0.5]}, "above 0 other than 1, ascending"),
        ("tempered", {"temperatures": [0.5, 1.0]}, "above 0 other than 1, ascending"),
        ("tempered", {"temperatures": [0.0, 2.0]}, "above 0 other than 1, ascending"),
        (
            "tempered",
            {"tempered_tails": lambda tails: tails * np.float32(np.nan)},
            "tempered_tails holds NaN",
        ),
    ],
)
def test_the_writer_refuses_a_row_that_contradicts_its_kind(store, samples, kind, change, says):
    row = samples.target_row(3, k=9, kind=kind)
    row |= {name: value(row[name]) if callable(value) else value for name, value in change.items()}
    with (
        store.writer("soft_targets", about=samples.ABOUT) as writer,
        pytest.raises(IntegrityError, match=says),
    ):
        writer.add(row)
    assert store.commits("soft_targets") == []


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("topp", {"p": 0.9999}, ("entries", "fewer entries than hold a mass of 0.9999")),
        ("topp", {"p": 0.01}, ("entries", "more entries than a mass of 0.01 needs")),
        ("topp", {"tail_logprob": lambda tail: tail - 1}, ("logprobs", "miss a sum of 1")),
        ("sampled", {"ids": lambda ids: ids * 0}, ("ids", "an id stands twice")),
        ("sampled", {"ids": lambda ids: changed(ids, 1, 50)}, ("ids", "outside the vocabulary")),
        ("weighted", {"weights": lambda weights: -weights}, ("weights", "not above 0")),
        (
            "tempered",
            {"tempered_tails": lambda tails: np.roll(tails, 1)},
            ("tempered_tails", "at temperature 0.5"),
        ),
        (
            "tempered",
            {"tempered_tails": lambda tails: tails + 3},
            ("tempered_tails", "at temperature 2"),
        ),
        (
            "hot",
            {"tempered_tails": lambda tails: tails + 3},
            ("tempered_tails", "at temperature 2"),
        ),
    ],
)
def test_verify_doubts_numbers_of_ragged_kinds(samples, kind, change, says):
    row = samples.target_row(3, tokens=40, k=9, kind=kind)
    row |= {name: value(row[name]) if callable(value) else value for name, value in change.items()}
    assert any(
        column == says[0] and says[1] in message for column, message in doubts(row, samples.ABOUT)
    )


@pytest.mark.parametrize("kind", ["topk", "topp", "sampled", "full", "hot"])
def test_targets_of_the_token_before_are_doubted(samples, kind):
    """The tokens are moved by one against the targets: every kind notices."""
    row = samples.target_row(8, tokens=120, k=20, kind=kind)
    shifted = row | {"token_ids": np.roll(row["token_ids"], 1)}
    found = [column for column, _ in doubts(shifted, samples.ABOUT)]
    assert found == ["token_logprob"]


def test_statistics_by_kind(samples):
    rows = [samples.target_row(i, tokens=30, k=9, kind=kind) for i, kind in enumerate(KINDS)]
    found = statistics(rows)
    assert {kind: x["rows"] for kind, x in found.items()} == {
        "full": 1,
        "sampled": 3,
        "topk": 1,
        "topp": 2,
    }
    assert found["topk"]["entries_per_token"] == 9
    assert found["full"]["entries_per_token"] == samples.VOCABULARY
    entries = np.concatenate([rows[1]["entries"], rows[5]["entries"]])
    assert found["topp"]["entries"]["mean"] == found["topp"]["entries_per_token"] == entries.mean()
    drawn = np.concatenate([rows[i]["entries"] for i in (2, 3, 6)])  # distinct ids
    assert found["sampled"]["entries"] == {
        "mean": pytest.approx(drawn.mean()),
        "q50": np.quantile(drawn, 0.5),
        "q99": pytest.approx(np.quantile(drawn, 0.99)),
    }
    assert found["sampled"]["entries"]["q99"] <= 9
    assert samples.P < found["topp"]["kept_mass"]["mean"] < 1
    assert "kept_mass" not in found["sampled"]
    assert found["full"]["kept_mass"]["q01"] == 1


def random_targets(kind: str, n: int, width: int, seed: int) -> SoftTargets:
    """Any numbers, in the form of a kind."""
    rng = np.random.default_rng(seed)
    entries = rng.integers(1, width + 1, n, dtype=np.int32)
    entries[rng.integers(n)] = width
    ragged = kind not in ("topk", "full")
    used = np.arange(width) < (entries if ragged else np.full(n, width))[:, None]
    floats = [rng.normal(size=shape).astype(np.float32) for shape in [(n, width), n, n, n]]
    values = {
        "ids": None
        if kind == "full"
        else np.where(used, rng.integers(0, 99, (n, width)), -1).astype(np.int32),
        "logprobs": np.where(used, floats[0], -np.inf).astype(np.float32),
        "tail_logprob": floats[1],
    }
    if kind in ("tempered", "hot"):
        values["temperatures"] = np.array([2.0] if kind == "hot" else [0.5, 2.0], np.float32)
        values["tempered_tails"] = rng.normal(size=(n, len(values["temperatures"]))).astype(
            np.float32
        )
    if kind in ("sampled", "weighted", "hot"):
        values |= {"logprobs": None, "tail_logprob": None}
        values |= (
            {"counts": np.where(used, rng.integers(1, 99, (n, width)), 0).astype(np.int32)}
            if kind in ("sampled", "hot")
            else {"weights": np.where(used, floats[0], 0)}
        )
    return SoftTargets(
        **values, token_logprob=floats[2], entropy=floats[3], entries=entries if ragged else None
    )


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 9),
    width=st.integers(1, 12),
    seed=st.integers(0, 9999),
)
def test_columns_and_back_is_the_same(kind, n, width, seed):
    targets = random_targets(kind, n, width, seed)
    columns = targets.columns(23)
    again = SoftTargets.from_row(columns | {"k": columns["k"] if targets.entries is None else 9999})
    part = targets.positions(slice(n // 2, None))
    for name in SoftTargets.__dataclass_fields__:
        before, after, later = (getattr(x, name) for x in (targets, again, part))
        np.testing.assert_array_equal(after, before)
        if before is None:
            assert later is None
        else:
            assert (after.dtype, after.shape) == (before.dtype, before.shape)
            if name in ("temperatures", "tempered_tails"):
                np.testing.assert_array_equal(
                    later, before if name == "temperatures" else before[n // 2 :]
                )
                continue
            np.testing.assert_array_equal(
                later,
                before[n // 2 :, : part.probabilities.shape[1]]
                if before.ndim == 2
                else before[n // 2 :],
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("foreign", [-1, "the first beyond"])
def test_a_scored_token_outside_the_vocabulary_is_doubted_in_words(samples, kind, foreign):
    """Looked up in a whole distribution it would be another position's, or none's."""
    k = samples.VOCABULARY if kind == "full" else 6
    row = samples.target_row(3, tokens=5, k=k, kind=kind)
    token_ids = row["token_ids"].copy()
    token_ids[row["span_start"]] = samples.VOCABULARY if foreign != -1 else foreign
    found = list(doubts(row | {"token_ids": token_ids}, samples.ABOUT))
    assert ("token_ids", f"a token id is outside the vocabulary of {samples.VOCABULARY}") in found
