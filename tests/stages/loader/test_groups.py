"""Groups of samples.

The step alone says which, a pass never splits one, and without groups nothing changes.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import V, make_samples

from stillroom.stages.loader.classification import ClassPasses
from stillroom.stages.loader.packing import Packing
from stillroom.stages.loader.passes import Passes
from stillroom.stages.loader.samples import Sample
from stillroom.stages.models.classification import Inputs
from stillroom.storage.errors import UsageError

KINDS: dict[str, dict[str, Any]] = {
    "rows": {},
    "short rows": {"row_tokens": 40},
    "rows of their own": {"shared_rows": False},
    "flat": {"flat": True},
    "texts": {},
}

BEFORE = {
    "rows": [[4, 7], [0, 2, 6, 8], [1, 3, 5]],
    "short rows": [[4, 7], [0, 2, 6, 8], [1, 3, 5]],
    "rows of their own": [[7], [5, 2], [0, 3, 6, 1, 8], [4]],
    "flat": [[4, 7], [1, 3, 5], [0, 2, 6, 8]],
    "texts": [[7], [5, 2], [0, 3, 6, 1, 8], [4]],
}
"""Samples of each pass of 48 tokens."""


def passes(kind: str, tokens: int, group: int | None) -> Passes:
    how = {"tokens_per_pass": tokens, "vocab_size": V, "group": group}
    if kind == "texts":
        return ClassPasses(**how, inputs=Inputs(padding=0, separator=None))
    return Packing(**how, **KINDS[kind])


def texts_of(batch: Any) -> list[tuple[int, ...]]:
    """The samples of a pass, as they lie in it."""
    if hasattr(batch, "inputs") and not hasattr(batch, "position_ids"):
        mask = batch.inputs["attention_mask"]
        rows = zip(batch.inputs["input_ids"], mask, strict=True)
        return [tuple(ids[seen.bool()].tolist()) for ids, seen in rows]
    found = []
    for ids, positions in zip(batch.token_ids, batch.position_ids, strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        found += [
            tuple(ids[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)
        ]
    return [text for text in found if any(text)]  # padding is zeros


def texts(samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    return [tuple(sample.token_ids.tolist()) for sample in samples]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=24),
    group=st.integers(2, 9),
    tokens=st.integers(1, 300),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_a_pass_holds_whole_groups_in_the_order_of_the_step(
    lengths: list[int], group: int, tokens: int, kind: str
) -> None:
    """So each sample is in one group, and which it is in depends on neither passes nor rows."""
    samples = make_samples(lengths, k=0)
    batches = list(passes(kind, tokens, group).batches(samples, None))
    found = [texts_of(batch) for batch in batches]
    assert [text for batch in found for text in batch] == texts(samples)
    for before, batch in zip(found, batches, strict=True):
        whole = len(before) % group == 0
        assert whole or before is found[-1], "the last group of a step may be smaller"
        assert len(before) <= group or batch.positions <= tokens, "more than one, if they fit"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=16),
    tokens=st.integers(1, 200),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_where_there_is_room_groups_share_a_pass(
    lengths: list[int], tokens: int, kind: str
) -> None:
    """No pass could have taken the first group of the next one too."""
    samples = make_samples(lengths, k=0)
    how = passes(kind, tokens, 2)
    sizes = [len(texts_of(batch)) for batch in how.batches(samples, None)]
    start = 0
    for size in sizes[:-1]:
        more = samples[start : start + size + 2]
        (batch,) = passes(kind, tokens, len(more)).batches(more, None)
        assert batch.positions > tokens
        start += size


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_without_groups_passes_are_what_they_were(kind: str) -> None:
    """Written down before there were groups."""
    samples = make_samples([9, 5, 14, 7, 3, 20, 6, 30, 4], k=0)
    number = {text: n for n, text in enumerate(texts(samples))}
    found = [
        [number[text] for text in texts_of(batch)]
        for batch in passes(kind, 48, None).batches(samples, None)
    ]
    assert found == BEFORE[kind]


def test_a_group_larger_than_a_pass_makes_the_pass_larger() -> None:
    samples = make_samples([10] * 6, k=0)
    sizes = [b.positions for b in passes("flat", 16, 3).batches(samples, None)]
    assert sizes == [30, 30]


def test_a_student_that_reads_each_sample_alone_has_no_groups() -> None:
    with pytest.raises(UsageError, match="a group of 4 in one pass, and each sample gets a pass"):
        Packing(tokens_per_pass=9, vocab_size=V, alone=True, group=4)


def test_the_samples_of_a_pass_do_not_see_each_other_any_more_than_without() -> None:
    """Positions restart at each of them."""
    samples = make_samples([9, 5, 14, 7], k=0)
    (batch,) = passes("rows", 100, 4).batches(samples, None)
    assert int((batch.position_ids == 0).sum()) >= 4
    assert torch.equal(batch.token_ids.flatten()[batch.predicting + 1], batch.targets.labels)
