"""Attention and relations against their definitions, in value and gradient.

Samples apart, extremes and memory are tested too.
"""

from itertools import pairwise

import feature_references as definition
import pytest
import torch
from allocations import allocated
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.stages.losses.features import kl_of_maps as module
from stillroom.stages.losses.features.attention import attention_kl
from stillroom.stages.losses.features.relations import relation_kl
from stillroom.stages.models.attention.maps import Scores, maps
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric

LENGTHS = [4, 1, 3]
SIGHTS = {
    "full": ({}, lambda i, j: True),
    "causal": ({"causal": True}, lambda i, j: j <= i),
    "window": ({"causal": True, "window": 2}, lambda i, j: i - 1 <= j <= i),
    "window around": ({"window": 2}, lambda i, j: abs(i - j) < 2),
}


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def side(*, heads=4, keys=2, tokens=8, width=3, seed=0, dtype=torch.float32, **sight):
    x = normal(heads, tokens, width, seed=seed, dtype=dtype)
    y = normal(keys, tokens, width, seed=seed + 1, dtype=dtype)
    return Scores(x=x, y=y, scale=0.7, **sight)


def leaves(scores):
    x, y = (part.detach().clone().requires_grad_() for part in (scores.x, scores.y))
    return Scores(x=x, y=y, scale=scores.scale, causal=scores.causal, window=scores.window)


def with_gradient(function, scores):
    """Value, and the gradient of a sum in which no two tokens weigh the same."""
    own = leaves(scores)
    value = function(own)
    weights = torch.arange(1.0, len(value) + 1, dtype=value.dtype)
    return value.detach(), *torch.autograd.grad((value * weights).sum(), (own.x, own.y))


def doubled(scores):
    return Scores(x=scores.x.double(), y=scores.y.double(), scale=scores.scale)


def cut(tensor, lengths=LENGTHS):
    return tensor.split(lengths, dim=1)


def defined_attention(teacher, lengths, sees, average=False):
    def of(scores):
        return [
            definition.attention(q, k, scores.scale, sees)
            for q, k in zip(cut(scores.x, lengths), cut(scores.y, lengths), strict=True)
        ]

    def function(student):
        found = []
        for t, s in zip(of(doubled(teacher)), of(student), strict=True):
            if average:
                t, s = definition.mean_over_heads(t), definition.mean_over_heads(s)
            found += definition.kl_of_maps(t, s)
        return torch.stack(found)

    return function


def assert_same(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sight", SIGHTS)
def test_attention_is_its_definition(sight):
    how, sees = SIGHTS[sight]
    teacher, student = side(**how), side(seed=5, width=2, keys=4, **how)
    found = with_gradient(lambda s: attention_kl(teacher, s, LENGTHS), student)
    assert_same(found, with_gradient(defined_attention(teacher, LENGTHS, sees), doubled(student)))


def test_averaged_attention_is_its_definition_with_any_number_of_heads():
    teacher, student = side(causal=True), side(heads=2, keys=1, seed=5, causal=True)
    found = with_gradient(lambda s: attention_kl(teacher, s, LENGTHS, heads="average"), student)
    defined = defined_attention(teacher, LENGTHS, lambda i, j: j <= i, average=True)
    assert_same(found, with_gradient(defined, doubled(student)))


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_relations_are_their_definition_for_any_number_of_parts(parts):
    """Teacher: two heads of 6. Student: three heads of 2."""
    teacher, student = normal(2, 8, 6), normal(3, 8, 2, seed=1)

    def defined(leaf):
        pairs = zip(cut(teacher.double()), cut(leaf), strict=True)
        return torch.stack(
            [
                one
                for t, s in pairs
                for one in definition.kl_of_maps(
                    definition.relations(t, parts), definition.relations(s, parts)
                )
            ]
        )

    def both(function, vectors):
        leaf = vectors.clone().requires_grad_()
        value = function(leaf)
        weights = torch.arange(1.0, len(value) + 1, dtype=value.dtype)
        return value.detach(), *torch.autograd.grad((value * weights).sum(), leaf)

    found = both(lambda s: relation_kl(teacher, s, LENGTHS, heads=parts), student)
    assert_same(found, both(defined, student.double()))


def test_relations_of_projected_vectors_are_divided_by_the_width_before():
    """A teacher of 12 numbers stands in 5, and the temperature is that of 12.

    The student has three heads of 2.
    """
    whole, matrix = normal(8, 12), normal(12, 5, seed=2)
    student = normal(3, 8, 2, seed=1)

    def defined(leaf):
        pairs = zip(whole.double().split(LENGTHS), cut(leaf), strict=True)
        each = (
            definition.kl_of_maps(
                definition.projected_relations(t, matrix.double()), definition.relations(s, 1)
            )
            for t, s in pairs
        )
        return torch.stack([one for sample in each for one in sample])

    def both(function, vectors):
        leaf = vectors.clone().requires_grad_()
        value = function(leaf)
        weights = torch.arange(1.0, len(value) + 1, dtype=value.dtype)
        return value.detach(), *torch.autograd.grad((value * weights).sum(), leaf)

    def found(leaf, **how):
        return relation_kl((whole @ matrix)[None], leaf, LENGTHS, heads=1, **how)

    right = both(defined, student.double())
    assert_same(both(lambda s: found(s, projected_from=12), student), right)
    assert not torch.allclose(both(found, student)[0].double(), right[0], rtol=1e-2)


def test_maps_of_packed_samples_are_the_blocks_of_one_masked_softmax():
    scores = side(causal=True)
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    here = torch.arange(len(sample))
    seen = (sample[:, None] == sample) & (here <= here[:, None])
    products = scores.scale * scores.x @ scores.y.repeat_interleave(2, 0).transpose(1, 2)
    whole = products.masked_fill(~seen, -torch.inf).softmax(-1)
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for found, (start, stop) in zip(maps(scores, LENGTHS), pairwise(edges), strict=True):
        torch.testing.assert_close(found, whole[:, start:stop, start:stop])


lengths_of_samples = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(lengths=lengths_of_samples, causal=st.booleans(), seed=st.integers(0, 99))
def test_a_sample_has_the_same_values_alone_and_among_others(lengths, causal, seed):
    teacher, student = (side(tokens=sum(lengths), seed=s, causal=causal) for s in (seed, seed + 50))
    together = attention_kl(teacher, student, lengths)
    related = relation_kl(teacher.x, student.x, lengths, heads=6)
    edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for start, stop in pairwise(edges):
        t, s = (
            Scores(x=x.x[:, start:stop], y=x.y[:, start:stop], scale=x.scale, causal=causal)
            for x in (teacher, student)
        )
        alone = attention_kl(t, s, [stop - start])
        torch.testing.assert_close(together[start:stop], alone, rtol=1e-5, atol=1e-6)
        alone = relation_kl(t.x, s.x, [stop - start], heads=6)
        torch.testing.assert_close(related[start:stop], alone, rtol=1e-5, atol=1e-6)
    assert (together > -1e-6).all()
    assert (related > -1e-6).all()


def test_at_equality_value_and_gradient_are_zero():
    teacher = side(causal=True)
    for heads in ("each", "average"):
        found = with_gradient(
            lambda s, h=heads: attention_kl(teacher, s, LENGTHS, heads=h), teacher
        )
        assert all(part.abs().max() < 1e-5 for part in found)
    leaf = teacher.x.clone().requires_grad_()
    value = relation_kl(teacher.x, leaf, LENGTHS, heads=3)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert leaf.grad.abs().max() < 1e-5


def test_relations_are_blind_to_a_rotation_of_each_part_and_see_one_across_parts():
    teacher, student = normal(2, 8, 6), normal(3, 8, 4, seed=1)
    turned = torch.linalg.qr(normal(4, 4, seed=2)).Q
    plain = relation_kl(teacher, student, LENGTHS, heads=3)
    torch.testing.assert_close(relation_kl(teacher, student @ turned, LENGTHS, heads=3), plain)
    assert not torch.allclose(relation_kl(teacher, student @ turned, LENGTHS, heads=6), plain)
    across = torch.linalg.qr(normal(12, 12, seed=3)).Q
    mixed = (student.transpose(0, 1).reshape(8, 12) @ across).reshape(8, 3, 4).transpose(0, 1)
    whole = relation_kl(teacher, student, LENGTHS, heads=1)
    torch.testing.assert_close(relation_kl(teacher, mixed, LENGTHS, heads=1), whole)
    assert not torch.allclose(relation_kl(teacher, mixed, LENGTHS, heads=3), plain)


def test_of_grouped_keys_only_those_that_are_there_are_related():
    """Repeating them for every query head and cutting as often gives the same relations again."""
    teacher, student = normal(2, 8, 4), normal(2, 8, 4, seed=1)
    repeated = [side.repeat_interleave(3, 0) for side in (teacher, student)]
    torch.testing.assert_close(
        relation_kl(*repeated, LENGTHS, heads=6), relation_kl(teacher, student, LENGTHS, heads=2)
    )


@pytest.mark.parametrize("largest", [1, 40, 10**6])
def test_blocks_of_rows_change_nothing(largest, monkeypatch):
    teacher, student = side(causal=True, window=3), side(seed=5, causal=True, window=3)
    whole = with_gradient(lambda s: attention_kl(teacher, s, LENGTHS), student)
    monkeypatch.setattr(module, "LARGEST", largest)
    parts = with_gradient(lambda s: attention_kl(teacher, s, LENGTHS), student)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_no_map_of_a_whole_sample_or_of_several_is_held(monkeypatch):
    """Forward and backward, in blocks of a sixteenth of the map of one sample."""
    heads, tokens, samples = 4, 256, 4
    block = heads * tokens * tokens // 16
    monkeypatch.setattr(module, "LARGEST", block)
    one = side(heads=heads, tokens=samples * tokens, width=4)
    other = leaves(side(heads=heads, tokens=samples * tokens, width=4, seed=5))
    most, _ = allocated(lambda: attention_kl(one, other, [tokens] * samples).sum().backward())
    assert most < 4 * (10 * block + 10 * other.x.numel())
    assert 4 * (10 * block + 10 * other.x.numel()) < 4 * samples * heads * tokens * tokens


@pytest.mark.parametrize("heads", ["each", "average"])
def test_the_largest_float16_vectors_have_finite_values_and_gradients(heads):
    """Signs of the largest float16, so scores of 10^10; and zeros, where all rows are uniform."""
    largest = torch.finfo(torch.float16).max
    stored, live = (
        Scores(x=(x.x.sign() * largest).to(dtype), y=(x.y.sign() * largest).to(dtype), scale=1.0)
        for x, dtype in ((side(), torch.float16), (side(seed=5), torch.float32))
    )
    found = with_gradient(lambda s: attention_kl(stored, s, LENGTHS, heads=heads), live)
    assert found[0].max() > 1e9
    assert all(part.isfinite().all() for part in found)
    zeros = Scores(x=torch.zeros(4, 8, 3), y=torch.zeros(2, 8, 3), scale=1.0)
    found = with_gradient(lambda s: attention_kl(zeros, s, LENGTHS, heads=heads), zeros)
    assert all((part == 0).all() for part in found)


def test_autocast_changes_nothing():
    """The forward pass alone is under it, as in training."""
    teacher, student = side(causal=True), side(seed=5, causal=True)

    def both(enabled):
        own = leaves(student)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = attention_kl(teacher, own, LENGTHS)
            related = relation_kl(teacher.x, own.x, LENGTHS, heads=3)
        return found, related, *torch.autograd.grad((found + related).sum(), (own.x, own.y))

    assert all(torch.equal(a, b) for a, b in zip(both(True), both(False), strict=True))


def test_the_teacher_gets_no_gradient():
    teacher, student = leaves(side()), leaves(side(seed=5))
    attention_kl(teacher, student, LENGTHS).sum().backward()
    relation_kl(teacher.x, student.x, LENGTHS, heads=2).sum().backward()
    assert teacher.x.grad is None
    assert teacher.y.grad is None


def test_other_heads_are_refused_unless_averaged():
    with pytest.raises(UsageError, match="the teacher has 4 and the student 2"):
        attention_kl(side(), side(heads=2), LENGTHS)


@pytest.mark.parametrize(
    ("of_teacher", "of_student", "said"),
    [
        ({}, {"causal": True}, "the student tokens up to its own"),
        ({}, {"window": 3}, "the student all tokens less than 3 away"),
        ({"causal": True, "window": 4}, {"causal": True, "window": 3}, "less than 4 away"),
    ],
)
def test_a_student_that_sees_less_than_the_teacher_is_refused(of_teacher, of_student, said):
    with pytest.raises(UsageError, match=said):
        attention_kl(side(**of_teacher), side(**of_student), LENGTHS)


def test_a_student_may_see_more_and_a_window_that_no_sample_fills_is_none():
    near, far = side(causal=True, window=2), side(seed=5, causal=True)
    assert attention_kl(near, far, LENGTHS).isfinite().all()
    wide = Scores(x=far.x, y=far.y, scale=far.scale, causal=True, window=max(LENGTHS))
    found = attention_kl(side(causal=True), wide, LENGTHS)
    torch.testing.assert_close(found, attention_kl(side(causal=True), far, LENGTHS))


@pytest.mark.parametrize("parts", [0, 5])
def test_parts_that_do_not_divide_the_width_are_refused(parts):
    with pytest.raises(UsageError, match=f"2 x 3 numbers of the teacher's heads .* {parts} parts"):
        relation_kl(normal(2, 8, 3), normal(2, 8, 5), LENGTHS, heads=parts)
