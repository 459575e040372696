"""The two passes over the vocabulary, in torch.

They are tested against float64 autograd of what they say they are.
"""

import math
from itertools import product

import pytest
import torch

from stillroom.stages.losses import vocabulary as passes
from stillroom.stages.losses.vocabulary import Asked, Slopes, look, spread

pytestmark = pytest.mark.numeric

N, V = 5, 40


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def asked_of(k, *, temperature=1.0, scale=1.0, softcap=None, absent=False, v=V):
    """The label of row 1 is an entry, those of the others may be.

    With `absent`, row 0 has no entry at all.
    """
    generator = torch.Generator().manual_seed(k)
    ids = torch.stack([torch.randperm(v, generator=generator)[:k] for _ in range(N)])
    labels = torch.randint(v, (N,), generator=generator)
    if absent and k:
        ids[torch.rand(N, k, generator=generator) < 0.4] = -1
        ids[0] = -1
    if k:
        labels[1] = ids[1].amax().clamp_min(0)
    return Asked(ids=ids, labels=labels, temperature=temperature, scale=scale, softcap=softcap)


def definition(raw, asked):
    """Entries, label, normaliser and rest, in float64.

    They are sums over the ids that are asked for.
    """
    z = raw * asked.scale
    z = z if asked.softcap is None else asked.softcap * torch.tanh(z / asked.softcap)
    rest = []
    for row, ids in zip(z, asked.ids.tolist(), strict=True):
        others = [j for j in range(len(row)) if j not in ids]
        rest.append(
            (row[others] / asked.temperature).logsumexp(-1) if others else row.new_tensor(-math.inf)
        )
    entries = z.gather(-1, asked.ids.clamp_min(0)).masked_fill(asked.ids < 0, -math.inf)
    return entries, z.gather(-1, asked.labels[:, None])[:, 0], z.logsumexp(-1), torch.stack(rest)


def values(seen):
    return seen.entries, seen.label, seen.normaliser, seen.rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 3, V])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_seen_and_the_way_back(k, temperature, dtype, monkeypatch):
    """Both at any scale and cap, with entries that are none, a few rows at a time."""
    monkeypatch.setattr(passes, "CACHE_BYTES", 2 * 4 * V)  # two rows
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for scale, softcap, absent in product((1.0, 0.5), (None, 3.0), (False, True)):
        asked = asked_of(k, temperature=temperature, scale=scale, softcap=softcap, absent=absent)
        raw = (3 * normal(N, V, seed=1)).to(dtype)
        leaf = raw.double().requires_grad_()
        expected = definition(leaf, asked)
        slopes = [
            normal(*part.shape, seed=seed).masked_fill(part == -math.inf, 0.0)
            for seed, part in enumerate(expected)
        ]
        sums = [
            (slope * part.masked_fill(part == -math.inf, 0.0)).sum()
            for slope, part in zip(slopes, expected, strict=True)
        ]
        (right,) = torch.autograd.grad(sum(sums), leaf)
        memory = raw.data_ptr()
        seen = look(raw, asked)
        for found, part in zip(values(seen), expected, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), part.detach(), rtol=1e-5, atol=1e-5)
        entries, label, normaliser, rest = slopes
        found = spread(
            raw, asked, seen, Slopes(entries=entries, label=label, normaliser=normaliser, rest=rest)
        )
        assert (found.data_ptr(), found.dtype) == (memory, dtype)
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)


def test_the_rest_does_not_cancel():
    """Entries hold all mass but e^-60.

    One minus their sum is nothing in float32, and so would be its gradient.
    """
    asked = asked_of(2)
    raw = normal(N, V, seed=1).scatter_add(-1, asked.ids, torch.full((N, 2), 60.0))
    expected = definition(raw.double(), asked)[3]
    seen = look(raw, asked)
    torch.testing.assert_close(seen.rest.double(), expected, rtol=1e-6, atol=1e-6)
    nothing = torch.zeros(N)
    slopes = Slopes(
        entries=torch.zeros(N, 2), label=nothing, normaliser=nothing, rest=torch.ones(N)
    )
    torch.testing.assert_close(spread(raw, asked, seen, slopes).sum(-1), torch.ones(N))


def test_great_logits_do_not_overflow():
    asked = asked_of(3)
    raw = 1e4 * normal(N, V, seed=1)
    expected = definition(raw.double(), asked)
    for found, right in zip(values(look(raw, asked)), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_ids_that_cannot_be_drawn_get_no_gradient_and_make_no_nan(scale, temperature, dtype):
    """A bias of -inf makes such ids.

    Row 0 has others that are no entry, in the rest of the rows the rest is empty.
    """
    ids = torch.tensor([[0, 7, 9]]).expand(N, 3)
    labels = torch.zeros(N, dtype=torch.long)
    asked = Asked(ids=ids, labels=labels, temperature=temperature, scale=scale, softcap=None)
    masked = torch.ones(N, V, dtype=torch.bool).scatter_(-1, ids, False)
    masked[0, 20:] = False
    raw = (3 * normal(N, V, seed=1)).masked_fill(masked, -math.inf).to(dtype)
    expected = definition(raw.double(), asked)
    seen = look(raw, asked)
    for found, part in zip(values(seen), expected, strict=True):
        torch.testing.assert_close(found.double(), part, rtol=1e-5, atol=1e-5)
    assert (seen.rest == -math.inf).tolist() == [False, *[True] * (N - 1)]
    ones = torch.ones(N)
    slopes = Slopes(entries=torch.zeros(N, 3), label=-ones, normaliser=ones, rest=torch.zeros(N))
    gradient = spread(raw, asked, seen, slopes)
    assert not gradient[masked].any()
    torch.testing.assert_close(gradient.float().sum(-1), torch.zeros(N), rtol=0, atol=1e-2)
