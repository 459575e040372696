"""Snapshots and the order of samples: named by content, a permutation, and pure.

The order is the same from any sample on.
"""

import shutil
import subprocess
import sys
from itertools import chain, islice, takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.keys import content_id, seal, unseal
from stillroom.storage.snapshots.order import Order
from stillroom.storage.snapshots.snapshot import (
    Snapshot,
    SnapshotShard,
    load_snapshot,
    make_snapshot,
    save_snapshot,
)
from stillroom.storage.store.store import Store


@pytest.fixture
def snapshot(filled):
    places = {
        commit.shard.sha256: range(0, 8, 1 + i % 2)
        for i, commit in enumerate(filled.commits("soft_targets"))
    }
    return make_snapshot(filled, "soft_targets", places, {"recipe": "test"})


def test_a_snapshot_is_named_by_what_it_chooses(filled, snapshot):
    assert snapshot.rows == 8 + 4 + 8 + 4 + 8
    places = {shard.sha256: list(shard.rows)[::-1] for shard in reversed(snapshot.shards)}
    assert make_snapshot(filled, "soft_targets", places, {"recipe": "other"}).id == snapshot.id
    assert [shard.sha256 for shard in snapshot.shards] == [
        c.shard.sha256 for c in filled.commits("soft_targets")
    ]
    places[snapshot.shards[0].sha256] = [0]
    assert make_snapshot(filled, "soft_targets", places, {}).id != snapshot.id
    assert filled.files.names("snapshots") == []
    with pytest.raises(UsageError, match="no commit has the shard xyz"):
        make_snapshot(filled, "soft_targets", {"xyz": [0]}, {})
    with pytest.raises(UsageError, match=r"has 8 rows \(asked: 8\)"):
        make_snapshot(filled, "soft_targets", {snapshot.shards[0].sha256: [8]}, {})


def test_a_snapshot_is_kept_and_later_commits_do_not_change_it(filled, snapshot, samples):
    save_snapshot(filled, snapshot)
    save_snapshot(filled, snapshot)
    samples.add_targets(filled, range(40, 60))
    loaded = load_snapshot(filled, snapshot.id)
    assert (loaded.id, loaded.table, loaded.about) == (snapshot.id, snapshot.table, snapshot.about)
    for found, made in zip(loaded.shards, snapshot.shards, strict=True):
        assert (found.sha256, found.name, found.row_groups) == (
            made.sha256,
            made.name,
            made.row_groups,
        )
        assert found.rows.tolist() == made.rows.tolist()
    with pytest.raises(UsageError, match=f"no snapshot nope. Known: {snapshot.id}"):
        load_snapshot(filled, "nope")


def test_a_snapshot_that_is_not_the_one_its_name_says(filled, snapshot):
    save_snapshot(filled, snapshot)
    path = filled.files.path(f"snapshots/{snapshot.id}.json")
    record = unseal(path.read_bytes(), "x")
    record["shards"][0]["rows"] = [[0, 3]]
    path.write_bytes(seal(record))
    with pytest.raises(IntegrityError, match="not the one its name says"):
        load_snapshot(filled, snapshot.id)


@given(st.lists(st.sets(st.integers(0, 7), min_size=1), min_size=1, max_size=5))
@settings(deadline=None)
def test_an_id_is_the_hash_of_shards_and_runs(filled_once, chosen):
    """The id is written here a second time, by hand.

    Snapshots that are kept must stay what their names say.
    """
    places = dict(
        zip([c.shard.sha256 for c in filled_once.commits("soft_targets")], chosen, strict=False)
    )
    snapshot = make_snapshot(
        filled_once, "soft_targets", {k: np.array(sorted(v)) for k, v in places.items()}, {}
    )
    runs = []
    for sha256, rows in places.items():
        pairs = []
        for row in sorted(rows):
            if pairs and pairs[-1][1] == row:
                pairs[-1][1] = row + 1
            else:
                pairs.append([row, row + 1])
        runs.append([sha256, pairs])
    assert snapshot.id == content_id("snapshot", table="soft_targets", shards=runs)
    save_snapshot(filled_once, snapshot)
    loaded = load_snapshot(filled_once, snapshot.id)
    assert [shard.rows.tolist() for shard in loaded.shards] == [
        sorted(rows) for rows in places.values()
    ]


@pytest.fixture(scope="module")
def filled_once(template, tmp_path_factory):
    return Store.open(shutil.copytree(template, tmp_path_factory.mktemp("order") / "store"))


def shard_of(name, row_groups, rows):
    return SnapshotShard(name, name, tuple(row_groups), np.array(rows, np.int32))


@st.composite
def snapshots(draw):
    shards = []
    for number in range(draw(st.integers(0, 4))):
        groups = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        rows = draw(st.sets(st.integers(0, sum(groups) - 1), min_size=1))
        shards.append(shard_of(f"{number:064x}", groups, sorted(rows)))
    return Snapshot("s", "soft_targets", tuple(shards), {})


def places(snapshot, *, seed, epoch, window=16):
    """(shard, row) of each sample of an epoch, window by window."""
    order = Order(snapshot, window=window)
    starts = [np.cumsum([0, *shard.row_groups]) for shard in snapshot.shards]
    windows = order.windows(seed=seed, start=epoch * order.rows)
    return [
        [
            (shard := int(order.shards[group]), int(starts[shard][order.numbers[group]] + row))
            for group, row in zip(found.groups, found.rows, strict=True)
        ]
        for found in takewhile(lambda found: found.first < (epoch + 1) * order.rows, windows)
    ]


@settings(deadline=None)
@given(snapshots(), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4))
def test_the_order_is_a_permutation_in_windows(snapshot, seed, epoch, window):
    windows = places(snapshot, seed=seed, epoch=epoch, window=window)
    chosen = [
        (index, row) for index, shard in enumerate(snapshot.shards) for row in shard.rows.tolist()
    ]
    assert sorted(sample for part in windows for sample in part) == chosen
    assert windows == places(snapshot, seed=seed, epoch=epoch, window=window)

    def group(index, row):
        starts = [
            sum(snapshot.shards[index].row_groups[:i])
            for i in range(len(snapshot.shards[index].row_groups))
        ]
        return index, max(i for i, start in enumerate(starts) if start <= row)

    groups = [{group(*sample) for sample in part} for part in windows]
    assert all(len(part) == window for part in groups[:-1])
    assert sum(len(part) for part in groups) == len(set().union(*groups))


@settings(deadline=None)
@given(snapshots(), st.integers(0, 100), st.integers(1, 4))
def test_windows_start_with_the_one_that_holds_the_sample(snapshot, start, window):
    order = Order(snapshot, window=window)
    for found in islice(order.windows(seed=1, start=start), 3):
        whole = order.windows(seed=1)
        same = next(other for other in whole if other.first == found.first)
        assert found.first <= max(start, found.first) < found.stop
        np.testing.assert_array_equal(found.groups, same.groups)
        np.testing.assert_array_equal(found.rows, same.rows)
        start = found.stop


def test_the_order_depends_on_seed_and_epoch_and_nothing_else(filled, snapshot):
    def order(seed, epoch):
        return list(chain(*places(snapshot, seed=seed, epoch=epoch)))

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    save_snapshot(filled, snapshot)
    script = f"""
from itertools import islice
from stillroom.storage.snapshots.order import Order
from stillroom.storage.snapshots.snapshot import load_snapshot
from stillroom.storage.store.store import Store
order = Order(load_snapshot(Store.open({str(filled.root)!r}), {snapshot.id!r}))
(window,) = islice(order.windows(seed=1, start=2 * order.rows), 1)
print([*zip(order.shards[window.groups].tolist(), window.rows.tolist())])
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output == f"{order(1, 2)}\n"


def test_the_order_is_stable_across_versions():
    # Written down: if it changes, a run that resumes after an upgrade sees other batches.
    snapshot = Snapshot("s", "soft_targets", (shard_of("a", (2, 2), (0, 1, 3)),), {})
    assert places(snapshot, seed=0, epoch=0) == [[(0, 3), (0, 1), (0, 0)]]
