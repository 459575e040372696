"""Embeddings of tokens against their definition, and one vector a text."""

import feature_references as definition
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stillroom.stages.losses.features.embeddings import embedding_mse
from stillroom.stages.targets.features.pooling import pooled
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric

IDS = torch.tensor([2, 0, 2, 5, 2])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrices():
    """The teacher's, the student's with a row more, and the map."""
    return normal(6, 4), normal(7, 3, seed=1), normal(4, 3, seed=2)


def with_gradients(function, *parts):
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    value = function(*leaves)
    weights = torch.arange(1.0, len(value) + 1, dtype=value.dtype)
    return value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)


def test_embeddings_are_their_definition():
    teacher, student, weight = matrices()
    found = with_gradients(
        lambda s, w: embedding_mse(teacher, s, IDS, to_teacher=lambda x: x @ w.T), student, weight
    )
    expected = with_gradients(
        lambda s, w: definition.embedding_mse(teacher.double(), s, IDS.tolist(), w),
        student.double(),
        weight.double(),
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    rows = found[1].abs().sum(-1) > 0
    assert rows.tolist() == [True, False, True, False, False, True, False]


def test_equal_embeddings_are_at_zero_without_a_map():
    teacher, *_ = matrices()
    value, gradient = with_gradients(lambda s: embedding_mse(teacher, s, IDS), teacher)
    assert (value == 0).all()
    assert (gradient == 0).all()


def test_embeddings_in_passes_of_any_size_make_the_same_sum():
    teacher, student, weight = matrices()
    how = {"to_teacher": lambda x: x @ weight.T}
    whole = embedding_mse(teacher, student, IDS, **how)
    parts = [embedding_mse(teacher, student, ids, **how) for ids in IDS.split(2)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_float16_and_autocast_are_computed_in_float32():
    teacher, student, weight = matrices()
    linear = nn.Linear(3, 4, bias=False)
    linear.weight.data = weight
    plain = embedding_mse(teacher, student, IDS, to_teacher=linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedding_mse(teacher, student, IDS, to_teacher=linear), plain)
    large = torch.full((6, 4), 65504.0).half()
    found = with_gradients(lambda s: embedding_mse(large, s, IDS), -large.float())
    assert all(part.isfinite().all() for part in found)


lengths_of_samples = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@settings(max_examples=15, deadline=None)
@given(lengths=lengths_of_samples, how=st.sampled_from(["cls", "mean", "last"]))
def test_a_text_is_pooled_from_its_own_tokens(lengths, how):
    states = normal(sum(lengths), 3).half()
    found = pooled(states, lengths, how)
    assert found.dtype == torch.float32
    rows, start = states.double().tolist(), 0
    for vector, size in zip(found.double(), lengths, strict=True):
        own = rows[start : start + size]
        mean = [sum(column) / size for column in zip(*own, strict=True)]
        right = {"cls": own[0], "mean": mean, "last": own[-1]}[how]
        torch.testing.assert_close(
            vector, torch.tensor(right, dtype=torch.float64), atol=1e-6, rtol=1e-6
        )
        start += size


@pytest.mark.parametrize("how", ["cls", "mean", "last"])
def test_a_padded_batch_is_pooled_as_its_texts_are(how):
    """Padding on either side, and whatever stands in it."""
    states = normal(3, 4, 2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    found = pooled(states[mask], mask.sum(1).tolist(), how)
    alone = [
        pooled(row[seen], [int(seen.sum())], how) for row, seen in zip(states, mask, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone))


def test_a_sample_without_tokens_is_refused():
    with pytest.raises(UsageError, match="sample 1 has no token"):
        pooled(normal(3, 2), [3, 0], "mean")
