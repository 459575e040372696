"""Samples into steps.

Every sample comes once per epoch, never over the limit, and the same from any cursor on.
"""

from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from tiny_store import in_spans, make_store, random_texts, snapshot_of

from stillroom.stages.loader.samples import Cursor, Lengths, Samples, in_company, steps
from stillroom.storage.errors import UsageError

TEXTS = random_texts(40)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("samples")
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=24, **sizes)).save_pretrained(folder / "teacher")
    return make_store(folder / "store", folder / "teacher", texts=TEXTS)


SPANS = {n: [[2, 1], [4, len(text) - 5]] for n, text in enumerate(TEXTS) if n % 3 == 0}


@pytest.fixture(scope="module")
def several(store):
    """Every third row has two spans."""
    folder = store.root.parent
    return make_store(folder / "several", folder / "teacher", texts=TEXTS, spans=SPANS)


@pytest.mark.parametrize("table", ["soft_targets", "generations"])
def test_rows_of_one_and_of_several_spans_lie_beside_one_another(several, store, table):
    soft = table == "soft_targets"
    found = list(Samples(several, snapshot_of(several, table), soft=soft).read(0, 40))
    whole = Samples(store, snapshot_of(store, table), soft=soft).read(0, 40)
    of_text = {tuple(sample.token_ids.tolist()): sample for sample in whole}
    numbers = {tuple(text): number for number, text in enumerate(TEXTS)}
    assert len(found) == 40
    for sample in found:
        text = tuple(sample.token_ids.tolist())
        spans = SPANS.get(numbers[text], [[2, len(text) - 2]])
        assert sample.spans.tolist() == spans
        assert sample.spans.dtype == np.int64
        assert sample.scored_tokens == sum(n for _, n in spans)
        if soft:
            same = of_text[text].targets.positions(np.array(in_spans(spans)) - 2)
            np.testing.assert_array_equal(sample.targets.ids, same.ids)
            np.testing.assert_allclose(sample.targets.logprobs, same.logprobs, atol=1e-6)
    scored = sum(sum(n for _, n in s) for s in SPANS.values())
    scored += sum(len(t) - 2 for n, t in enumerate(TEXTS) if n not in SPANS)
    lengths = Samples(several, snapshot_of(several, table), soft=False).lengths()
    assert (lengths.scored_tokens, lengths.tokens) == (scored, sum(map(len, TEXTS)))


@pytest.fixture
def samples(store):
    return Samples(store, snapshot_of(store), soft=True, seed=3)


def texts_of(step):
    return [tuple(sample.token_ids.tolist()) for sample in step.samples]


def test_lengths_are_those_of_the_texts(store):
    for table in ("soft_targets", "generations"):
        found = Samples(store, snapshot_of(store, table), soft=False).lengths()
        assert asdict(found) == {
            "samples": 40,
            "tokens": sum(map(len, TEXTS)),
            "scored_tokens": sum(len(t) - 2 for t in TEXTS),
            "longest": max(map(len, TEXTS)),
            "shortest": min(map(len, TEXTS)),
        }


def test_lengths_that_the_snapshot_states_are_taken(store):
    stated = Lengths(samples=40, tokens=7, scored_tokens=5, longest=3)
    snapshot = replace(snapshot_of(store), about={"lengths": asdict(stated)})
    assert Samples(store, snapshot, soft=False).lengths() == stated
    old = {"samples": 40, "tokens": 7, "scored_tokens": 5, "longest": 3}
    for about, shortest in (({}, 1), ({"shortest": 2}, 2)):
        snapshot = replace(snapshot, about={"lengths": old} | about)
        assert Samples(store, snapshot, soft=False).lengths().shortest == shortest


@pytest.mark.parametrize("limit", [1, 30, 97, 10_000])
def test_an_epoch_holds_every_sample_once_and_no_step_is_too_long(samples, limit):
    found = list(steps(samples, Cursor(), tokens_per_step=limit, stop_samples=40))
    assert sorted(text for step in found for text in texts_of(step)) == sorted(map(tuple, TEXTS))
    assert all(step.tokens <= limit or len(step.samples) == 1 for step in found)
    for step, following in pairwise(found):  # no step could have held one more
        assert step.tokens + len(following.samples[0]) > limit
    assert found[-1].after == Cursor(
        epoch=0, sample=40, step=len(found), tokens=sum(map(len, TEXTS))
    )


def test_targets_belong_to_their_sample_and_sum_to_one(samples):
    for step in steps(samples, Cursor(), tokens_per_step=200, stop_samples=40):
        for sample in step.samples:
            mass = np.exp(sample.targets.logprobs).sum(-1) + np.exp(sample.targets.tail_logprob)
            assert len(mass) == sample.scored_tokens == len(sample.token_ids) - 2
            assert mass == pytest.approx(np.ones_like(mass), abs=1e-6)


def test_the_same_steps_follow_from_any_cursor(samples):
    whole = list(steps(samples, Cursor(), tokens_per_step=90, stop_samples=100))
    assert whole[-1].after.epoch == 2
    for number in (0, 3, 11, len(whole) - 2):
        rest = list(steps(samples, whole[number].after, tokens_per_step=90, stop_samples=100))
        assert [texts_of(s) for s in rest] == [texts_of(s) for s in whole[number + 1 :]]
        assert [s.after for s in rest] == [s.after for s in whole[number + 1 :]]


def test_a_single_sample_that_is_left_over_joins_the_step_before(samples):
    """Whatever is left over, and from whichever cursor one goes on."""
    joined = 0
    for stop in range(30, 41):
        plain = list(steps(samples, Cursor(), tokens_per_step=90, stop_samples=stop))
        found = list(in_company(steps(samples, Cursor(), tokens_per_step=90, stop_samples=stop)))
        alone = [step for step in plain[1:] if len(step.samples) == 1]
        assert len(found) == len(plain) - len(alone)
        assert [step.after.step for step in found] == list(range(1, len(found) + 1))
        each, other = ([t for step in some for t in texts_of(step)] for some in (found, plain))
        assert each == other
        assert [s.after.tokens for s in found][-1] == plain[-1].after.tokens
        rest = in_company(steps(samples, found[-2].after, tokens_per_step=90, stop_samples=stop))
        assert [texts_of(step) for step in rest] == [texts_of(found[-1])]
        joined += len(alone)
    assert joined
    with pytest.raises(UsageError, match="one sample in all"):
        list(in_company(steps(samples, Cursor(), tokens_per_step=90, stop_samples=1)))


def test_epochs_differ_in_order_and_seeds_too(store, samples):
    def order(source, epoch):
        return [tuple(s.token_ids.tolist()) for s in source.read(epoch * 40, (epoch + 1) * 40)]

    assert order(samples, 0) == order(samples, 0)
    assert order(samples, 0) != order(samples, 1)
    assert order(samples, 0) != order(Samples(store, snapshot_of(store), soft=True, seed=4), 0)


@pytest.mark.parametrize("limit", [1, 300, 2000])
def test_stops_at_the_first_step_that_reaches_the_tokens(samples, limit):
    found = list(steps(samples, Cursor(), tokens_per_step=90, stop_tokens=limit))
    assert found[-1].after.tokens >= limit
    assert all(step.after.tokens < limit for step in found[:-1])
    assert list(steps(samples, found[-1].after, tokens_per_step=90, stop_tokens=limit)) == []


def test_black_box_rows_have_no_targets(store):
    blackbox = Samples(store, snapshot_of(store, "generations"), soft=False, seed=3)
    step = next(steps(blackbox, Cursor(), tokens_per_step=90, stop_samples=40))
    assert all(sample.targets is None for sample in step.samples)
    assert {int(sample.spans[0, 0]) for sample in step.samples} == {2}


def test_soft_targets_are_not_asked_of_plain_text(store):
    with pytest.raises(
        UsageError, match=r"holds generations, which have no soft targets\..*loss\.soft_weight"
    ):
        Samples(store, snapshot_of(store, "generations"), soft=True)


def test_nothing_to_train_on_is_said(store):
    with pytest.raises(UsageError, match="holds no rows"):
        Samples(store, snapshot_of(store, rows=slice(0)), soft=True)
