"""From stored targets to what the loss takes: fewer entries, other temperatures.

They are compared with a softmax over all ids.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stillroom.stages.targets.batch import joined
from stillroom.stages.targets.spec import Kept
from stillroom.stages.targets.stored import Reading, soft_part
from stillroom.storage.errors import UsageError
from stillroom.storage.tables.soft_targets import SoftTargets

pytestmark = pytest.mark.numeric

N, V = 7, 12
LABELS = torch.arange(N)
Z = np.random.default_rng(0).normal(scale=1.5, size=(N, V))


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def stored(k=None, temperatures=()):
    """The K best with exact tails, at 1 and at these temperatures; k = None: full."""
    logprobs = log_softmax(Z)
    order = np.argsort(-logprobs, axis=1)
    best = np.take_along_axis(logprobs, order, 1)
    nothing = np.zeros(N, np.float32)
    if k is None:
        tail = np.full(N, -np.inf, np.float32)
        return SoftTargets(None, logprobs.astype(np.float32), tail, nothing, nothing)
    outside = [
        np.log(np.exp(best[:, k:] / t).sum(1)) if k < V else np.full(N, -np.inf)
        for t in (1.0, *temperatures)
    ]
    return SoftTargets(
        ids=order[:, :k].astype(np.int32),
        logprobs=best[:, :k].astype(np.float32),
        tail_logprob=outside[0].astype(np.float32),
        token_logprob=nothing,
        entropy=nothing,
        temperatures=np.array(temperatures, np.float32) if temperatures else None,
        tempered_tails=np.stack(outside[1:], 1).astype(np.float32) if temperatures else None,
    )


def sampled(temperature=None, ids=((3, 1),) * N, counts=((3, 1),) * N):
    entries = np.array([sum(c > 0 for c in row) for row in counts], np.int32)
    return SoftTargets(
        ids=np.array(ids, np.int32),
        logprobs=None,
        tail_logprob=None,
        token_logprob=np.zeros(len(ids), np.float32),
        entropy=np.full(len(ids), 1.5, np.float32),
        entries=entries,
        counts=np.array(counts, np.int32),
        temperatures=None if temperature is None else np.array([temperature], np.float32),
        tempered_tails=None if temperature is None else np.zeros((len(ids), 1), np.float32),
    )


def read(targets, labels=LABELS, **how):
    return soft_part(targets, labels, Reading(**how))


def topk(k):
    return Kept(kind="topk", k=k)


def assert_is_softmax(batch, temperature, widths):
    """The best of softmax(z / T), so many of each position, and the rest in the tail."""
    truth = np.exp(log_softmax(Z / temperature))
    for n, width in enumerate(widths):
        ids, logprobs = batch.ids[n], batch.logprobs[n].double().exp()
        best = np.argsort(-truth[n])[:width]
        assert ids.tolist() == [*best.tolist(), *[-1] * (len(ids) - width)]
        np.testing.assert_allclose(logprobs[:width], truth[n][best], rtol=1e-5)
        assert (logprobs[width:] == 0).all()
        rest = truth[n].sum() - truth[n][best].sum()
        assert float(batch.tail_logprob[n].double().exp()) == pytest.approx(
            rest, rel=1e-4, abs=1e-7
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("asked", [1, 4, 8])
@pytest.mark.parametrize("have", [8, 12, None])
def test_fewer_entries_at_any_stored_temperature(temperature, asked, have):
    targets = stored(have, (0.5, 2.0))
    assert_is_softmax(
        read(targets, kept=topk(asked), temperature=temperature), temperature, [asked] * N
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("have", [9, None])
def test_topp_of_what_is_stored_as_topk_or_full(temperature, have):
    """The fewest best entries that reach the mass at temperature 1 are kept, within bounds.

    The bounds are met somewhere.
    """
    p = np.sort(np.exp(log_softmax(Z)), axis=1)[:, ::-1]
    widths = [int(np.clip((row.cumsum() < 0.7).sum() + 1, 2, 4)) for row in p]
    assert {2, 4} <= set(widths)
    targets = stored(have, (2.0,))
    kept = Kept(kind="topp", k=4, p=0.7, k_min=2)
    assert_is_softmax(read(targets, kept=kept, temperature=temperature), temperature, widths)


def test_a_narrower_topp_of_a_wider_one():
    wide = read(stored(9), kept=Kept(kind="topp", k=9, p=0.9, k_min=1))
    entries = (wide.ids >= 0).sum(-1).numpy().astype(np.int32)
    as_stored = replace(
        stored(9),
        ids=wide.ids.numpy().astype(np.int32),
        logprobs=wide.logprobs.numpy(),
        tail_logprob=wide.tail_logprob.numpy(),
        entries=entries,
    )
    narrow = Kept(kind="topp", k=5, p=0.6, k_min=2)
    found, direct = read(as_stored, kept=narrow), read(stored(9), kept=narrow)
    assert torch.equal(found.ids, direct.ids)
    torch.testing.assert_close(found.logprobs, direct.logprobs)
    torch.testing.assert_close(found.tail_logprob, direct.tail_logprob)


@pytest.mark.parametrize("kept", [None, Kept(kind="full", k=V), Kept(kind="topk", k=20)])
def test_what_is_not_cut_stays_as_it_is(kept):
    full = read(stored(None), kept=kept)
    assert full.ids is None
    assert torch.equal(full.logprobs, torch.from_numpy(stored(None).logprobs))
    best = read(stored(5), kept=kept)
    assert torch.equal(best.logprobs, torch.from_numpy(stored(5).logprobs))
    assert torch.equal(best.tail_logprob, torch.from_numpy(stored(5).tail_logprob))


@pytest.mark.parametrize("temperature", [2.0, 0.3])
def test_full_targets_serve_every_temperature(temperature):
    found = read(stored(None), temperature=temperature)
    np.testing.assert_allclose(
        found.logprobs.numpy(), log_softmax(Z / temperature), rtol=1e-5, atol=1e-5
    )
    assert (found.tail_logprob == -math.inf).all()


def test_entries_that_are_all_ids_serve_every_temperature():
    assert_is_softmax(read(stored(V), temperature=1.7), 1.7, [V] * N)


def test_a_temperature_that_is_not_stored_is_refused():
    with pytest.raises(
        UsageError,
        match=r"loss\.temperature: 3 is not stored .* have 1, 0\.5, 2\. Score with it in",
    ):
        read(stored(5, (0.5, 2.0)), temperature=3.0)
    with pytest.raises(UsageError, match=r"which have 1\. .*unstored_temperature to approximate"):
        read(stored(5), temperature=2.0)


@pytest.mark.parametrize("temperature", [3.0, 0.5])
def test_or_approximated_with_the_tail_as_one_id(temperature):
    found = read(stored(5), temperature=temperature, unstored="approximate")
    p = np.exp(
        np.concatenate([stored(5).logprobs, stored(5).tail_logprob[:, None]], 1, dtype=np.float64)
    )
    expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum(1, keepdims=True)
    outcomes = torch.cat([found.logprobs, found.tail_logprob[:, None]], 1).double().exp()
    np.testing.assert_allclose(outcomes.numpy(), expected, rtol=1e-5)
    exact = read(stored(5, (temperature,)), temperature=temperature, unstored="approximate")
    assert_is_softmax(exact, temperature, [5] * N)  # what is stored is not approximated
    too_heavy = (found.logprobs > exact.logprobs).all()
    assert bool(too_heavy) == (temperature > 1)


class TestSampled:
    def test_draws_are_shares_and_the_entropy_comes_along(self):
        found = read(
            sampled(ids=((3, 1), (5, -1)), counts=((3, 1), (4, 0))), labels=torch.tensor([0, 1])
        )
        assert found.ids.tolist() == [[3, 1], [5, -1]]
        assert found.probabilities.tolist() == [[0.75, 0.25], [1.0, 0.0]]
        assert found.entropy.tolist() == [1.5, 1.5]
        assert found.logprobs is None

    @pytest.mark.parametrize(("drawn", "asked"), [(None, 2.0), (2.0, 1.0), (2.0, 3.0)])
    def test_no_temperature_but_the_one_they_were_drawn_at(self, drawn, asked):
        message = (
            rf"loss\.temperature: is {asked:g}, "
            rf"but the sampled targets were drawn at {drawn or 1:g}"
        )
        with pytest.raises(UsageError, match=message):
            read(sampled(drawn), temperature=asked)

    @pytest.mark.parametrize("drawn", [None, 1.0, 2.0])
    def test_which_serves(self, drawn):
        assert read(sampled(drawn), temperature=drawn or 1.0).probabilities is not None

    def test_weights_stay_as_they_are(self):
        drawn = replace(sampled(), counts=None, weights=np.tile(np.float32([0.6, 0.5]), (N, 1)))
        drawn.weights.flags.writeable = False  # as it comes from a file
        torch.testing.assert_close(
            read(drawn).probabilities, torch.tensor([[0.6, 0.5]]).expand(N, 2)
        )


class TestJoined:
    def test_sampled_of_different_widths(self):
        narrow = read(sampled(ids=((5,),), counts=((4,),)), labels=torch.tensor([2]))
        both = joined([read(sampled()), narrow])
        assert both.ids[-1].tolist() == [5, -1]
        assert both.probabilities[-1].tolist() == [1.0, 0.0]
        assert both.labels.tolist() == [*range(N), 2]
        assert both.entropy.shape == (N + 1,)

    def test_sampled_and_other_targets_are_refused(self):
        with pytest.raises(UsageError, match=r"train\.snapshot: .*expected one kind"):
            joined([read(sampled()), read(stored(4))])

    def test_full_and_topk(self):
        both = joined([read(stored(None)), read(stored(3))])
        assert both.ids[:N].tolist() == [list(range(V))] * N
        assert (both.ids[N:, 3:] == -1).all()
