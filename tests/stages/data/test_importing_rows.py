"""Foreign tables give the same targets however their lists stand to their tokens.

Everything that does not fit is refused.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.stages.data.importing.columns import BadRow, Columns
from stillroom.stages.data.importing.rounding import leaving_nothing, mantissa_bits
from stillroom.stages.data.importing.row import convert
from stillroom.storage.tables.doubts import doubts
from stillroom.storage.tables.soft_targets import round_mantissa

V = 30
COLUMNS = Columns(
    tokens="tokens", ids="ids", values="values", prompt_tokens="prompt", targets_at="next"
)


class Text:
    """A text, and the teacher's exact distribution of each of its tokens but the first."""

    def __init__(self, *, seed: int = 0, tokens: int = 9, prompt: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.ids = rng.integers(0, V, tokens)
        self.prompt = prompt
        logits = rng.normal(0, 3, (tokens, V))
        self.lse = np.log(np.exp(logits).sum(axis=1))
        self.logits = logits
        self.logprobs = logits - self.lse[:, None]
        """[T, V]; row t is the distribution of token t, so that row 0 is nobody's."""

    def entries(self, k: int, *, shuffled: np.random.Generator | None = None) -> list[np.ndarray]:
        best = [np.argsort(-row, kind="stable")[:k] for row in self.logprobs]
        return best if shuffled is None else [shuffled.permutation(row) for row in best]

    def record(
        self,
        k: int = 4,
        *,
        at: str = "next",
        of: str = "all",
        kind: str = "logprobs",
        forced: bool = False,
    ):
        """The row as somebody may have written it."""
        ids = self.entries(k, shuffled=np.random.default_rng(1))
        if forced:
            ids = [np.append(row, token) for row, token in zip(ids, self.ids, strict=True)]
        numbers = {
            "logprobs": self.logprobs,
            "probs": np.exp(self.logprobs),
            "logits": self.logits,
        }[kind]
        values = [numbers[t, row] for t, row in enumerate(ids)]
        lists = {
            "ids": ids,
            "values": values,
            "lse": list(self.lse),
            "token": list(self.logprobs[np.arange(len(self.ids)), self.ids]),
        }
        part = {
            "all": slice(None),
            "completion": slice(self.prompt, None),
            "without": slice(1, None),
        }[of]
        if at == "next":  # what stands at a token is about the next one: the last has nobody's
            lists = {name: [*values[1:], values[0]] for name, values in lists.items()}
            part = {
                "all": slice(None),
                "completion": slice(self.prompt, None),
                "without": slice(None, -1),
            }[of]
        found = {
            name: [np.asarray(x).tolist() for x in values[part]] for name, values in lists.items()
        }
        return found | {"tokens": self.ids.tolist(), "prompt": self.prompt}


def expected(text: Text, k: int, start: int):
    """Straight from the definition, in float64."""
    rows = []
    for t in range(start, len(text.ids)):
        order = np.argsort(-text.logprobs[t], kind="stable")
        rows.append(
            (
                order[:k],
                text.logprobs[t, order[:k]],
                np.log(np.exp(text.logprobs[t, order[k:]]).sum()),
            )
        )
    return rows


def check(text: Text, row, k: int, start: int, *, token_known: bool) -> None:
    assert row.token_ids.tolist() == text.ids.tolist()
    assert max(row.prompt_tokens, 1) == start
    targets = row.targets
    assert len(targets.token_logprob) == len(text.ids) - start
    for n, (ids, logprobs, tail) in enumerate(expected(text, k, start)):
        assert targets.ids[n].tolist() == ids.tolist()
        np.testing.assert_allclose(targets.logprobs[n], logprobs, rtol=1e-5, atol=1e-6)
        # 1 - sum, of numbers exact to 2**-24: as exact as that leaves it
        assert np.exp(targets.tail_logprob[n]) == pytest.approx(np.exp(tail), abs=3e-6)
        true = text.logprobs[start + n, text.ids[start + n]]
        if token_known or text.ids[start + n] in ids:
            assert targets.token_logprob[n] == pytest.approx(true, rel=1e-5, abs=1e-6)
        else:
            assert targets.token_logprob[n] >= true - 1e-5
        full = -(np.exp(text.logprobs[start + n]) * text.logprobs[start + n]).sum()
        assert -1e-6 <= targets.entropy[n] <= full + 1e-4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(4, 12),
    prompt=st.integers(2, 3),
    k=st.integers(1, 8),
    at=st.sampled_from(["next", "same"]),
    of=st.sampled_from(["all", "completion", "without"]),
    kind=st.sampled_from(["logprobs", "probs", "logits"]),
    forced=st.booleans(),
)
def test_however_it_was_written_it_is_the_same(seed, tokens, prompt, k, at, of, kind, forced):
    text = Text(seed=seed, tokens=tokens + 1, prompt=prompt)
    columns = replace(
        COLUMNS, targets_at=at, kind=kind, lse="lse" if kind == "logits" else None, forced=forced
    )
    row = convert(text.record(k, at=at, of=of, kind=kind, forced=forced), columns, vocab_size=V)
    # Lists at the completion's own tokens, about the next ones, have none about its first.
    start = prompt + 1 if (at, of) == ("next", "completion") else prompt
    check(text, row, k, start, token_known=forced)


@pytest.mark.parametrize("at", ["next", "same"])
def test_a_text_without_a_prompt_is_scored_from_its_second_token_on(at):
    text = Text(prompt=0)
    record = text.record(at=at)
    if at == "same":
        record["ids"][0], record["values"][0] = (
            None,
            None,
        )  # engines have nothing to say of a first token
    row = convert(record, replace(COLUMNS, targets_at=at, prompt_tokens=None), vocab_size=V)
    check(text, row, 4, 1, token_known=False)


def test_a_completion_may_be_counted_from_the_end():
    text = Text()
    record = text.record() | {"completion": len(text.ids) - text.prompt}
    row = convert(
        record, replace(COLUMNS, prompt_tokens=None, completion_tokens="completion"), vocab_size=V
    )
    check(text, row, 4, text.prompt, token_known=False)


SPANS = replace(COLUMNS, prompt_tokens=None, spans="spans")


@pytest.mark.parametrize(
    ("at", "of"), [("next", "all"), ("same", "all"), ("next", "without"), ("same", "without")]
)
def test_several_spans_are_those_parts_of_one(at, of):
    text = Text()
    spans = [[2, 3], [6, 1], [8, 1]]
    record = text.record(at=at, of=of) | {"spans": [n for span in spans for n in span]}
    row = convert(record, replace(SPANS, targets_at=at), vocab_size=V)
    whole = convert(text.record(at=at, of=of), replace(COLUMNS, targets_at=at), vocab_size=V)
    scored = [2, 3, 4, 6, 8]
    assert (row.spans.tolist(), row.prompt_tokens) == (spans, 2)
    kept = [t for t in scored if t >= whole.prompt_tokens]
    for name in ("ids", "logprobs", "tail_logprob", "token_logprob", "entropy"):
        found = getattr(row.targets, name)
        assert len(found) == len(scored)
        expected = getattr(whole.targets, name)[[t - whole.prompt_tokens for t in kept]]
        np.testing.assert_array_equal(found[len(scored) - len(kept) :], expected)


def test_lists_of_scored_tokens_alone_are_in_their_order():
    text, scored = Text(), [2, 3, 4, 6, 8]
    record = text.record(at="same") | {"spans": [2, 3, 6, 1, 8, 1]}
    columns = replace(SPANS, targets_at="same")
    whole = convert(record, columns, vocab_size=V)
    for name in ("ids", "values"):
        record[name] = [record[name][t] for t in scored]
    row = convert(record, columns, vocab_size=V)
    np.testing.assert_array_equal(row.targets.logprobs, whole.targets.logprobs)
    with pytest.raises(BadRow, match=r"5 positions, expected 9 \(one for each token\), 8\."):
        convert(record, SPANS, vocab_size=V)


def test_one_span_to_the_end_is_a_prompt():
    text = Text()
    row = convert(text.record() | {"spans": [3, 6]}, SPANS, vocab_size=V)
    check(text, row, 4, text.prompt, token_known=False)
    first = convert(text.record() | {"spans": [1, 8]}, SPANS, vocab_size=V)
    assert first.prompt_tokens == 0


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([2, 3, 4, 1], "the one at 4 starts before 5"),
        ([2, 3, 6, 0], "the one at 6 has no tokens"),
        ([0, 3], "the one at 0 starts before 1"),
        ([2, 3, 6, 4], "the one at 6 ends at 10, the row has 9 tokens"),
        ([2, 3, 6], "expected start, tokens, start, tokens"),
        ([2, 1.5], "expected start, tokens, start, tokens"),
        ([], "expected start, tokens, start, tokens"),
        (None, "column spans: nothing, expected a list"),
    ],
)
def test_spans_that_are_none_are_refused(spans, says):
    with pytest.raises(BadRow, match=says):
        convert(Text().record() | {"spans": spans}, SPANS, vocab_size=V)


def test_the_log_probability_of_the_token_that_is_there_may_have_a_column_of_its_own():
    text = Text()
    row = convert(text.record(), replace(COLUMNS, token_logprobs="token"), vocab_size=V)
    check(text, row, 4, text.prompt, token_known=True)


def test_fewer_entries_may_be_kept():
    text = Text()
    check(
        text,
        convert(text.record(8), replace(COLUMNS, k=3), vocab_size=V),
        3,
        text.prompt,
        token_known=False,
    )


@pytest.mark.parametrize("bits", [8, 11, 24])
def test_what_rounding_may_hide_is_the_tail(bits):
    """Of entries that hold all but rounding nobody knows whether 1e-5 is outside or nothing."""
    logprobs = round_mantissa(np.log(np.array([0.7, 0.2, 0.1])), bits - 1)
    record = {
        "tokens": [1, 2, 3],
        "prompt": 1,
        "ids": [[4, 5, 6]] * 3,
        "values": [logprobs.tolist()] * 3,
    }
    row = convert(record, COLUMNS, vocab_size=V)
    hidden = float((np.exp(logprobs) * np.abs(logprobs)).sum()) * 2.0**-bits + 3 * 2.0**-24
    missing = max(1 - np.exp(logprobs.astype(np.float64)).sum(), hidden)
    assert np.exp(row.targets.tail_logprob) == pytest.approx(missing, rel=1e-3)
    assert 0 < np.exp(row.targets.tail_logprob[0]) < 2.0 ** (2 - bits)
    assert np.isfinite(row.targets.token_logprob).all()


def test_rows_hold_what_verify_asks_of_them():
    for seed in range(20):
        text = Text(seed=seed)
        row = convert(
            text.record(forced=seed % 2 == 0), replace(COLUMNS, forced=seed % 2 == 0), vocab_size=V
        )
        about = {"vocab_size": V, "mantissa_bits": 10, "teacher_id": "t", "head": "lm"}
        columns = row.targets.columns(10)
        names = {
            "kind": "topk",
            "teacher_id": "t",
            "token_ids": row.token_ids,
            "span_start": row.prompt_tokens,
        }
        assert not list(doubts(columns | names, about))


def changed(of=None, **fields):
    """A change of the record, or of one list in it."""

    def change(record):
        for name, value in fields.items():
            if of is None:
                record[name] = value
            else:
                record[name][of] = value
        return record

    return change


BAD = {
    "token outside": (
        changed(4, tokens=V),
        "vocabulary",
        "column tokens: found id 30|column tokens: id 30",
    ),
    "token negative": (changed(0, tokens=-1), "vocabulary", "id -1"),
    "one token": (changed(tokens=[1]), "empty", "1 tokens"),
    "no list": (changed(ids=None), "unreadable", "nothing, expected a list"),
    "a number in place of a list": (
        changed(5, ids=7),
        "unreadable",
        "no list of numbers at position 5",
    ),
    "words": (changed(5, values=["a"] * 4), "unreadable", "position 5"),
    "positions differ": (
        changed(values=[[0.0] * 4]),
        "lengths",
        "1 positions, expected 9, as in ids",
    ),
    "entries differ": (changed(5, ids=[1, 2], values=[-1.0, -2.0]), "lengths", "2 to 4 entries"),
    "numbers differ": (
        changed(values=[[-9.0] * 3] * 9),
        "lengths",
        "3 numbers at a position, expected 4",
    ),
    "no entries": (changed(ids=[[]] * 9, values=[[]] * 9), "lengths", "0 to 0 entries"),
    "too few positions": (
        lambda r: r | {"ids": r["ids"][:4], "values": r["values"][:4]},
        "lengths",
        "4 positions, expected 9",
    ),
    "entry outside": (changed(5, ids=[1, 2, 3, V]), "vocabulary", "id 30, expected 0 to 29"),
    "no whole id": (changed(5, ids=[1, 2, 3, 4.5]), "vocabulary", "id 4.5"),
    "an id twice": (
        changed(5, ids=[1, 2, 3, 1]),
        "duplicate_id",
        "id 1 twice at position 3 of the span",
    ),
    "above 0": (
        changed(5, values=[0.5, -1, -2, -3]),
        "probability",
        "a log-probability of 0.5, expected 0 at most",
    ),
    "NaN": (changed(5, values=[float("nan"), -1, -2, -3]), "nan", "NaN or null at position 5"),
    "null": (changed(5, values=[None, -1, -2, -3]), "nan", "NaN or null at position 5"),
    "no end": (changed(5, values=[-np.inf, -1, -2, -3]), "probability", "not finite"),
    "more than all": (
        changed(5, values=[-0.1, -0.2, -2, -3]),
        "probability",
        "sum to 1.9.* at position 3 of the span",
    ),
    "all prompt": (changed(prompt=9), "empty", "all prompt"),
    "prompt longer": (changed(prompt=10), "lengths", "10, expected 0 to 9"),
    "prompt no number": (changed(prompt="3"), "lengths", "'3'"),
}


@pytest.mark.parametrize(("change", "reason", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(change, reason, message):
    with pytest.raises(BadRow, match=message) as refused:
        convert(change(Text().record()), COLUMNS, vocab_size=V)
    assert refused.value.reason == reason


def test_entries_that_sum_to_too_little_are_refused():
    """No id outside the K best has more than the least of them.

    So (V - K) p_K bounds what may be missing.
    """
    text = Text()

    def less(record, by):
        return record | {"values": [[value - by for value in row] for row in record["values"]]}

    for columns in (
        COLUMNS,
        replace(COLUMNS, k=2),
    ):  # also where fewer are kept: the bound is that of all
        with pytest.raises(
            BadRow, match=r"entries that sum to 0\.00\d+ at .* at least.*--values"
        ) as refused:
            convert(less(text.record(5), 5), columns, vocab_size=V)
        assert refused.value.reason == "probability"
    flat = {
        "tokens": [1, 2, 3],
        "prompt": 1,
        "ids": [[4, 5, 6]] * 3,
        "values": [[-np.log(V)] * 3] * 3,
    }
    convert(flat, COLUMNS, vocab_size=V)  # as little as can be: every id has the same
    with pytest.raises(BadRow, match="at least, as no other of 29 ids"):
        convert(less(flat, 0.03), COLUMNS, vocab_size=V - 1)
    rounded = round_mantissa(np.full(3, -np.log(V)), 7)  # of bfloat16 the error is in the bound
    convert(flat | {"values": [rounded.tolist()] * 3}, COLUMNS, vocab_size=V)


def test_one_prompt_token_can_be_read_two_ways_and_is_refused():
    with pytest.raises(BadRow, match="8 positions, expected 9"):
        convert(Text(prompt=1).record(of="without"), COLUMNS, vocab_size=V)


def test_numbers_of_another_kind_are_refused():
    text = Text()
    with pytest.raises(BadRow, match=r"a log-probability of .*--values probs"):
        convert(text.record(kind="probs"), COLUMNS, vocab_size=V)
    with pytest.raises(BadRow, match="a probability of -"):
        convert(text.record(), replace(COLUMNS, kind="probs"), vocab_size=V)
    with pytest.raises(BadRow, match="log-probability of"):
        convert(
            text.record() | {"lse": [-9.0] * 9},
            replace(COLUMNS, kind="logits", lse="lse"),
            vocab_size=V,
        )


def test_a_forced_token_says_whether_the_lists_are_in_place():
    text = Text(tokens=12)
    with pytest.raises(BadRow, match=r"twice.*give --forced"):
        convert(text.record(20, forced=True), COLUMNS, vocab_size=V)
    with pytest.raises(BadRow, match=r"last entry .*the token that is there"):
        convert(
            text.record(forced=True), replace(COLUMNS, forced=True, targets_at="same"), vocab_size=V
        )
    with pytest.raises(
        BadRow,
        match=r"log-probability .* of the token at position.*count from the first scored position",
    ):
        convert(
            text.record(), replace(COLUMNS, token_logprobs="token", targets_at="same"), vocab_size=V
        )


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 24), (np.float16, 11)])
def test_how_exact_numbers_are_is_seen_in_them(dtype, bits):
    values = np.random.default_rng(0).normal(0, 3, 1000).astype(dtype).astype(np.float64)
    assert mantissa_bits(values) == bits
    assert mantissa_bits(np.array([1.0, -2.0])) == 1


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_entries_normalised_over_themselves_are_told_from_those_of_a_sure_teacher(dtype):
    """At most positions of a real table the next id would be seen.

    A sure teacher's positions tell nothing.
    """
    text = Text(tokens=60)
    real = text.record(kind="probs")
    real["values"] = np.array(real["values"]).astype(dtype).tolist()
    columns = replace(COLUMNS, kind="probs")
    found = convert(real, columns, vocab_size=V).nothing_left
    assert len(found) > 20
    assert found.mean() < 0.2
    values = np.array(real["values"])
    again = real | {"values": (values / values.sum(axis=1, keepdims=True)).astype(dtype).tolist()}
    assert convert(again, columns, vocab_size=V).nothing_left.mean() > 0.95
    sure = np.sort(1e-9 / np.arange(1, 5))[::-1]
    sure[0] = 1 - sure[1:].sum()
    assert len(leaving_nothing(np.log(np.tile(sure, (9, 1))), np.full((9, 4), 2.0**-24))) == 0
    every = text.record(V, kind="probs")
    assert len(convert(every, columns, vocab_size=V).nothing_left) == 0, (
        "the whole vocabulary does sum to 1"
    )
