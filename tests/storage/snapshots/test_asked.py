"""The order in which samples were asked for.

Whoever committed them when, the same samples come in the same order.
"""

from itertools import islice, takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.snapshots import asked
from stillroom.storage.snapshots.asked import in_asked_order
from stillroom.storage.snapshots.order import Order
from stillroom.storage.snapshots.reader import SnapshotReader
from stillroom.storage.snapshots.snapshot import (
    AskedOrder,
    Snapshot,
    SnapshotShard,
    load_snapshot,
    make_snapshot,
    save_snapshot,
    with_order,
)

SMALL = 1 << 10


def laid(pieces, names, sizes):
    """A snapshot of samples as workers may have committed them, and the sample of each row.

    `pieces`: of each shard the samples, in its order; `names`: the order in which they were asked
    for.
    """
    shards = []
    for number, piece in enumerate(pieces):
        groups = tuple(len(part) for part in np.array_split(piece, 2) if len(part))
        rows = np.arange(len(piece), dtype=np.int32)
        shards.append(SnapshotShard(f"{number:064x}", "x", groups, rows))
    lies = [sample for piece in pieces for sample in piece]
    numbers = np.array([lies.index(name) for name in names])
    plain = Snapshot("x", "soft_targets", tuple(shards), {})
    return in_asked_order(plain, numbers, np.array(sizes)), lies


def epoch(snapshot, lies, *, seed=0, number=0, window=16):
    """The samples of an epoch, in order."""
    order = Order(snapshot, window=window)
    windows = order.windows(seed=seed, start=number * order.rows)
    stop = (number + 1) * order.rows
    found = []
    for one in takewhile(lambda one: one.first < stop, windows):
        numbers = [
            int(order.numbered(group, np.array([row]))[0])
            for group, row in zip(one.groups, one.rows, strict=True)
        ]
        found += [lies[number] for number in numbers]
    return found


@st.composite
def commits(draw, samples):
    """Samples in any order, cut into any number of shards."""
    mixed = draw(st.permutations(range(samples)))
    cuts = sorted(draw(st.sets(st.integers(1, samples - 1), max_size=4)))
    return [part.tolist() for part in np.split(np.array(mixed), cuts)]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(2, 24), st.integers(0, 2), st.integers(0, 2), st.integers(1, 3))
def test_the_order_does_not_depend_on_how_rows_were_committed(data, samples, seed, number, window):
    sizes = data.draw(st.lists(st.integers(1, SMALL), min_size=samples, max_size=samples))
    one, other = data.draw(commits(samples)), data.draw(commits(samples))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asked, "ROW_GROUP_BYTES", SMALL)
        patch.setattr(asked, "MOST_READS", samples)
        found = [
            epoch(*laid(pieces, range(samples), sizes), seed=seed, number=number, window=window)
            for pieces in (one, other)
        ]
    assert found[0] == found[1]
    assert sorted(found[0]) == list(range(samples))


def test_seed_and_epoch_make_another_order():
    snapshot, lies = laid([list(range(20))], range(20), [1] * 20)
    orders = {tuple(epoch(snapshot, lies, seed=s, number=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_the_order_is_stable_across_versions():
    """Written down: if it changes, a run that resumes after an upgrade sees other batches."""
    snapshot, lies = laid([[2, 0], [1]], range(3), [1] * 3)
    assert epoch(snapshot, lies) == [2, 0, 1]
    assert [epoch(snapshot, lies, number=1), epoch(snapshot, lies, seed=1)] == [
        [0, 1, 2],
        [1, 0, 2],
    ]


@settings(deadline=None)
@given(st.lists(st.integers(1, 3 * SMALL), min_size=1, max_size=40))
def test_groups_are_as_large_as_may_be(sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asked, "ROW_GROUP_BYTES", SMALL)
        patch.setattr(asked, "GROUP_ROWS", 4)
        groups = asked._cut(np.array(sizes)).tolist()
    assert sum(groups) == len(sizes)
    edges = np.cumsum([0, *groups])
    for count, first, stop in zip(groups, edges, edges[1:], strict=False):
        assert count == 1 or (count <= 4 and sum(sizes[first:stop]) <= SMALL)
        if stop < len(sizes):  # one more would be too many
            assert count == 4 or sum(sizes[first : stop + 1]) > SMALL


def test_rows_that_lie_too_scattered_keep_the_order_of_their_commits(monkeypatch):
    """Each group would read all of the shards again, and an epoch the store so many times."""
    monkeypatch.setattr(asked, "GROUP_ROWS", 4)
    samples = range(4 * 16)
    scattered = [[s for s in samples if s % 16 == shard] for shard in range(16)]
    ordered = [[s for s in samples if s // 4 == shard] for shard in range(16)]
    monkeypatch.setattr(asked, "MOST_READS", 2)
    assert laid(scattered, samples, [1] * 64)[0].order is not None, "row groups of 2 samples each"
    monkeypatch.setattr(asked, "MOST_READS", 1)
    assert laid(scattered, samples, [1] * 64)[0].order is None
    assert laid(ordered, samples, [1] * 64)[0].order is not None


@pytest.fixture
def ordered(filled):
    places = {commit.shard.sha256: range(8) for commit in filled.commits("soft_targets")[:2]}
    plain = make_snapshot(filled, "soft_targets", places, {"for": "a test"})
    samples = np.array([15, *range(7, -1, -1), *range(8, 15)], np.int32)
    return with_order(plain, AskedOrder(samples, np.array([5, 11], np.int32)))


def test_an_order_is_a_part_of_the_name_and_is_kept(filled, ordered):
    places = {shard.sha256: shard.rows for shard in ordered.shards}
    plain = make_snapshot(filled, "soft_targets", places, {})
    other = with_order(plain, AskedOrder(np.arange(16, dtype=np.int32), np.array([16], np.int32)))
    assert len({plain.id, ordered.id, other.id}) == 3
    for snapshot in (plain, ordered):
        save_snapshot(filled, snapshot)
    assert load_snapshot(filled, plain.id).order is None
    loaded = load_snapshot(filled, ordered.id).order
    assert loaded.samples.tolist() == ordered.order.samples.tolist()
    assert loaded.groups.tolist() == [5, 11]


@pytest.mark.parametrize("start", [0, 3, 15, 18])
def test_samples_are_read_from_any_one_on(filled, ordered, start):
    reader = SnapshotReader(filled, ordered, ["key"])
    whole = [row["key"] for row in reader.samples(seed=2, stop=32)]
    assert [row["key"] for row in reader.samples(seed=2, start=start, stop=32)] == whole[start:]
    assert len(set(whole[:16])) == len(set(whole[16:])) == 16


def test_the_numbers_of_samples_are_those_of_the_shards(filled, ordered):
    """Features and other teachers' rows are found by them, with and without an order."""
    numbers = {}

    def keep(rows, found):
        return [(row["key"], int(number)) for row, number in zip(rows, found, strict=True)]

    for snapshot in (
        ordered,
        make_snapshot(filled, "soft_targets", {s.sha256: s.rows for s in ordered.shards}, {}),
    ):
        reader = SnapshotReader(filled, snapshot, ["key"], decode=keep)
        numbers[snapshot.id] = dict(islice(reader.samples(seed=0), 16))
    assert len(numbers) == 2
    first, second = numbers.values()
    assert first == second
    assert sorted(first.values()) == list(range(16))
