"""Packing: samples in a row do not see each other.

How a step is packed and split never changes its gradient.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import objective_of
from references import DIVERGENCES
from tiny_models import CONFIGS, LENGTHS, V, build, make_sample, make_samples
from transformers import AutoModelForCausalLM, MambaConfig

from stillroom.stages.loader.packing import Packing, mixes_packed, pack
from stillroom.stages.loader.samples import Sample
from stillroom.stages.losses.definition import logits_distillation
from stillroom.stages.losses.fused_linear import linear_distillation
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.attention.flat import NAME, attend_apart
from stillroom.stages.models.head import hidden_states, split_head
from stillroom.stages.targets.batch import TargetBatch
from stillroom.stages.targets.spec import Kept
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric


# of 50 float32 losses, added up in another order: 50 eps, and a few for products of other shapes
SUMS = 1e-5


def packing(**changes):
    return Packing(**{"tokens_per_pass": 64, "row_tokens": None, "vocab_size": V} | changes)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_separate(name, attention):
    """Hidden states of every scored position are those of each sample alone.

    Samples are packed two rows deep and more.
    """
    model = build(CONFIGS[name], attn_implementation=attention)
    samples = make_samples([*LENGTHS, *LENGTHS])
    (rows,) = packing(tokens_per_pass=1000, row_tokens=24)._groups(samples)
    assert len(rows) > 1
    assert max(map(len, rows)) > 2
    (batch,) = packing(tokens_per_pass=1000, row_tokens=24).batches(samples)
    with torch.no_grad():
        together = hidden_states(model, input_ids=batch.token_ids, position_ids=batch.position_ids)
        alone = []
        for sample in (sample for row in rows for sample in row):
            states = hidden_states(model, input_ids=torch.from_numpy(sample.token_ids[None]).long())
            alone.append(states[0, sample.spans[0, 0] - 1 : -1])
    found = together.flatten(0, 1)[batch.predicting]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert mixes_packed(model) is None


def test_a_model_that_lets_samples_see_each_other_is_noticed():
    sizes = {"vocab_size": V, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)

    class Careless(torch.nn.Module):
        """Passes no position ids on, as a model without positions would."""

        def __init__(self):
            super().__init__()
            self.inner = AutoModelForCausalLM.from_config(MambaConfig(**sizes)).eval()

        def get_base_model(self):
            outer = self

            class View:
                get_output_embeddings = outer.inner.get_output_embeddings
                config = outer.inner.config

                @staticmethod
                def base_model(input_ids, position_ids, use_cache):
                    return outer.inner.base_model(input_ids=input_ids, use_cache=use_cache)

            return View

    assert mixes_packed(Careless()) == "its architecture mixes packed samples"


def test_a_row_that_cannot_be_read_is_no_mixture():
    """Learned positions end: the row is too long for them."""
    model = build(CONFIGS["gpt2"])
    said = mixes_packed(model, (5, 10 * model.config.max_position_embeddings))
    assert "tokens could not be read (IndexError" in said


def gradient(model, samples, how, *, chunk_tokens=None, objective=objective_of()):  # noqa: B008
    """Gradient of the step's mean loss, and the loss, however the step is packed."""
    model.zero_grad()
    scored, total = sum(s.scored_tokens for s in samples), 0.0
    for batch in how.batches(samples, objective.temperature):
        hidden = hidden_states(model, **batch.inputs)
        states = hidden.flatten(0, 1)[batch.predicting]
        aim = Aim(objective=objective, soft_weight=1.0 / scored, hard_weight=0.1 / scored)
        loss = linear_distillation(
            states, split_head(model), batch.targets, aim=aim, chunk_tokens=chunk_tokens
        ).total
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("k", [5, None, 0])
def test_the_gradient_does_not_depend_on_packing_and_passes(k):
    model = build(CONFIGS["llama"])
    samples = make_samples(LENGTHS, k=k)
    ways = [
        packing(tokens_per_pass=1000, row_tokens=64),
        packing(tokens_per_pass=1000, row_tokens=20),
        packing(tokens_per_pass=40, row_tokens=20),
        packing(tokens_per_pass=1),
        packing(shared_rows=False),
        packing(shared_rows=False, tokens_per_pass=30),
        packing(flat=True, tokens_per_pass=1000),
        packing(flat=True, tokens_per_pass=30),
    ]
    loss, expected = gradient(model, samples, ways[0])
    for way in ways[1:]:
        if way.flat and model.config._attn_implementation != NAME:
            assert attend_apart(model, max(LENGTHS), torch.float32) is None
        again, found = gradient(model, samples, way, chunk_tokens=7)
        assert again == pytest.approx(loss, rel=SUMS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [5, None, 0])
def test_a_sample_of_three_spans_is_learnt_from_as_three_samples(k):
    """Loss and gradient are the sums over the prefixes that end with each span.

    Packing keeps samples apart.
    """
    model = build(CONFIGS["llama"])
    spans = [[2, 3], [7, 1], [11, 6]]
    several = [make_sample(20, spans=spans, k=k, seed=seed) for seed in (0, 1)]
    alone = [
        Sample(
            token_ids=one.token_ids[: start + n],
            spans=np.array([[start, n]]),
            targets=one.targets and one.targets.positions(slice(before, before + n)),
        )
        for one in several
        for (start, n), before in zip(spans, (0, 3, 4), strict=True)
    ]
    others = make_samples((9, 14), k=k)
    one_by_one = packing(shared_rows=False, tokens_per_pass=1)
    loss, expected = gradient(model, alone + others, one_by_one)
    ways = [one_by_one, packing(tokens_per_pass=1000, row_tokens=64)]
    for way in [*ways, packing(flat=True, tokens_per_pass=1000)]:
        if way.flat and model.config._attn_implementation != NAME:
            assert attend_apart(model, 20, torch.float32) is None
        again, found = gradient(model, several + others, way)
        assert again == pytest.approx(loss, rel=SUMS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_divergence_depends_on_packing_and_passes(divergence):
    """One batch of all samples against a pass for each, at a temperature."""
    model, samples = build(CONFIGS["llama"]), make_samples(LENGTHS)
    objective = objective_of(divergence=divergence, temperature=2.0)
    how = packing(tokens_per_pass=1000, row_tokens=64, unstored_temperature="approximate")
    loss, expected = gradient(model, samples, how, objective=objective)
    again, found = gradient(
        model, samples, replace(how, tokens_per_pass=1), objective=objective, chunk_tokens=7
    )
    assert again == pytest.approx(loss, rel=SUMS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_sampled_targets_do_not_depend_on_packing_and_passes():
    model, samples = build(CONFIGS["llama"]), [drawn(sample) for sample in make_samples(LENGTHS)]
    loss, expected = gradient(model, samples, packing(tokens_per_pass=1000, row_tokens=64))
    again, found = gradient(model, samples, packing(tokens_per_pass=1), chunk_tokens=7)
    assert again == pytest.approx(loss, rel=SUMS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def drawn(sample):
    """The sample with a draw in place of its entries.

    The best id is drawn twice, the next once or not at all.
    """
    targets = sample.targets
    entries = 2 - np.arange(sample.scored_tokens, dtype=np.int32) % 2
    counts = np.tile(np.int32([2, 1]), (sample.scored_tokens, 1))
    counts[entries == 1, 1] = 0
    ids = np.where(counts > 0, targets.ids[:, :2], -1).astype(np.int32)
    estimate = replace(
        targets,
        ids=ids,
        logprobs=None,
        tail_logprob=None,
        entries=entries,
        counts=counts,
        entropy=targets.entropy + 1,
    )
    return replace(sample, targets=estimate)


def test_hard_targets_alone_read_nothing_of_the_soft_ones():
    """Without a temperature nothing soft is read, whatever the store holds.

    Here it holds draws, which no temperature but their own could serve.
    """
    (batch,) = packing(tokens_per_pass=1000).batches([drawn(make_sample(9))], None)
    assert batch.targets.ids is None
    assert batch.targets.probabilities is None
    assert len(batch.targets.labels) == 7


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=12),
    tokens_per_pass=st.integers(1, 120),
    row_tokens=st.one_of(st.none(), st.integers(40, 90)),
    kind=st.sampled_from([{}, {"shared_rows": False}, {"flat": True}]),
)
def test_every_sample_is_whole_in_one_row(lengths, tokens_per_pass, row_tokens, kind):
    samples = make_samples(lengths, k=0)
    if "flat" in kind:
        row_tokens = None
    how = packing(tokens_per_pass=tokens_per_pass, row_tokens=row_tokens, **kind)
    found, scored = [], 0
    for batch in how.batches(samples):
        assert batch.token_ids.numel() <= max(tokens_per_pass, *lengths)
        assert row_tokens is None or batch.token_ids.shape[1] <= row_tokens
        if how.flat:
            starts = (batch.position_ids[0] == 0).nonzero().flatten().tolist()
            assert batch.edges.tolist() == [*starts, batch.positions]
            assert batch.longest == max(batch.edges.diff())
        for ids, positions in zip(batch.token_ids, batch.position_ids, strict=True):
            starts = (positions == 0).nonzero().flatten().tolist()
            pieces = zip(starts, [*starts[1:], len(ids)], strict=True)
            found += [tuple(ids[a:b].tolist()) for a, b in pieces]
            assert all(
                positions[i] == positions[i - 1] + 1 for i in range(1, len(ids)) if i not in starts
            )
        flat = batch.token_ids.flatten()
        assert torch.equal(flat[batch.predicting + 1], batch.targets.labels)
        scored += len(batch.predicting)
    expected = [tuple(sample.token_ids.tolist()) for sample in samples]
    for text in expected:
        found.remove(text)
    assert not any(any(padding) for padding in found)
    assert scored == sum(n - 2 for n in lengths)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    rows=st.integers(0, 12),
    more=st.integers(0, 60),
)
def test_rows_hold_about_the_same(lengths, rows, more):
    """Every sample is there once, and no row is empty or beyond the limit.

    None could give its least sample to another and gain.
    """
    samples, limit = make_samples(lengths, k=0), max(lengths) + more
    made = pack(samples, rows=rows, limit=limit)
    assert sorted(map(id, (s for row in made for s in row))) == sorted(map(id, samples))
    held = [sum(map(len, row)) for row in made]
    assert 0 < min(held) <= max(held) <= limit
    assert len(made) >= min(max(rows, 1), len(lengths))
    assert all(
        total - min(map(len, row)) <= min(held) for total, row in zip(held, made, strict=True)
    )


def test_a_flat_pass_has_no_padding_and_rows_have_little():
    """Lengths as of short stories: a row of the longest is what first-fit would fill, and pad."""
    lengths = np.random.default_rng(0).lognormal(5.2, 0.4, 600).astype(int) + 3
    samples, total = make_samples(lengths.tolist(), k=0), int(lengths.sum())

    def share(**how):
        positions = [
            b.positions for b in packing(tokens_per_pass=8192, **how).batches(samples, None)
        ]
        return 1 - total / sum(positions), len(positions)

    (flat, passes), (rows, _), (alone, _) = share(flat=True), share(), share(shared_rows=False)
    assert flat == 0
    assert passes <= total / 8192 + 2
    assert 0 < rows < 0.02 < alone


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(
        UsageError,
        match=r"train\.row_tokens: 16 is shorter than a sample of 20 tokens\. Set it to 20",
    ):
        list(packing(row_tokens=16).batches(make_samples(LENGTHS)))


def test_a_prompt_token_that_the_student_does_not_know_is_refused():
    sample = make_sample(8, start=4, k=0)
    sample.token_ids[0] = V
    with pytest.raises(UsageError, match=rf"has {V} ids, but the text has token {V}"):
        list(packing().batches([sample]))


class TestEntries:
    def only(self, samples, **changes):
        (batch,) = packing(**changes).batches(samples)
        return batch.targets

    @pytest.mark.parametrize("stored", [9, None])
    def test_more_entries_than_asked_for_are_cut(self, stored):
        """What else the store holds does not change what is trained on."""
        cut = self.only([make_sample(9, k=stored)], kept=Kept(kind="topk", k=4))
        asked = self.only([make_sample(9, k=4)], kept=Kept(kind="topk", k=4))
        assert torch.equal(cut.ids, asked.ids)
        torch.testing.assert_close(cut.logprobs, asked.logprobs)
        torch.testing.assert_close(cut.tail_logprob, asked.tail_logprob)

    def test_different_numbers_of_entries_go_together(self):
        samples = [
            make_sample(9, k=3),
            make_sample(12, k=7, seed=1),
            make_sample(8, k=None, seed=2),
        ]
        together = self.only(samples)
        assert together.ids.shape == (7 + 10 + 6, V)
        assert (together.ids[:7, 3:] == -1).all()
        hidden = torch.randn(23, 16, generator=torch.Generator().manual_seed(1))
        head = split_head(build(CONFIGS["llama"]))
        logits, objective = head.logits(hidden), objective_of(divergence="reverse_kl")
        whole = logits_distillation(logits, together, objective=objective).soft
        start = 0
        for sample in samples:
            part = logits[start : start + sample.scored_tokens]
            alone = logits_distillation(part, self.only([sample]), objective=objective).soft
            torch.testing.assert_close(whole[start : start + sample.scored_tokens], alone)
            start += sample.scored_tokens

    @pytest.mark.parametrize("k", [0, 5, None])
    def test_its_bytes_are_those_of_all_that_is_copied(self, k):
        copied = []
        (batch,) = packing(flat=True).batches(make_samples([9, 6], k=k), 1.0 if k != 0 else None)
        batch._map(lambda part: part if isinstance(part, TargetBatch) else copied.append(part))
        batch.targets._map(copied.append)
        assert batch.nbytes == sum(part.numel() * part.element_size() for part in copied)
        assert batch.nbytes > 11 * (V if k is None else k) * 4

    def test_full_targets_stay_without_ids(self):
        targets = self.only(make_samples([9, 6], k=None))
        assert targets.ids is None
        assert targets.logprobs.shape == (11, V)


def test_a_shared_row_is_no_longer_than_the_model_reads():
    """GPT-Neo has a table of which position sees which.

    It is for as many positions as its context has.
    """
    samples = make_samples([9, 9, 9, 9, 5])
    for context, widest in ((None, 23), (20, 18), (5, 9)):
        batches = packing(context=context, row_tokens=24).batches(samples)
        assert max(batch.token_ids.shape[1] for batch in batches) == widest
