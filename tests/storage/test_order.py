"""Snapshots and the order of samples: named by content, a permutation, pure, and resumable anywhere."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.keys import seal, unseal
from stillroom.storage.order import SnapshotReader, epoch_order
from stillroom.storage.shard import ShardFile
from stillroom.storage.snapshot import Snapshot, SnapshotShard, load_snapshot, make_snapshot, save_snapshot


@pytest.fixture
def snapshot(filled):
    places = {commit.shard.sha256: range(0, 8, 1 + i % 2) for i, commit in enumerate(filled.commits("soft_targets"))}
    return make_snapshot(filled, "soft_targets", places, {"recipe": "test"})


def test_a_snapshot_is_named_by_what_it_chooses(filled, snapshot):
    assert snapshot.rows == 8 + 4 + 8 + 4 + 8
    places = {shard.sha256: list(shard.rows)[::-1] for shard in reversed(snapshot.shards)}
    assert make_snapshot(filled, "soft_targets", places, {"recipe": "other"}).id == snapshot.id
    assert [shard.sha256 for shard in snapshot.shards] == [c.shard.sha256 for c in filled.commits("soft_targets")]
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
    assert load_snapshot(filled, snapshot.id) == snapshot
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


@st.composite
def snapshots(draw):
    shards = []
    for number in range(draw(st.integers(0, 4))):
        groups = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        rows = draw(st.sets(st.integers(0, sum(groups) - 1)))
        shards.append(SnapshotShard(f"{number:064x}", f"data/{number}", tuple(groups), tuple(sorted(rows))))
    return Snapshot("s", "soft_targets", tuple(shards), {})


@settings(deadline=None)
@given(snapshots(), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4))
def test_the_order_is_a_permutation_in_windows(snapshot, seed, epoch, window):
    windows = list(epoch_order(snapshot, seed=seed, epoch=epoch, window=window))
    chosen = [(index, row) for index, shard in enumerate(snapshot.shards) for row in shard.rows]
    assert sorted(sample for part in windows for sample in part) == chosen
    assert windows == list(epoch_order(snapshot, seed=seed, epoch=epoch, window=window))

    def group(index, row):
        starts = [sum(snapshot.shards[index].row_groups[:i]) for i in range(len(snapshot.shards[index].row_groups))]
        return index, max(i for i, start in enumerate(starts) if start <= row)

    groups = [{group(*sample) for sample in part} for part in windows]
    assert all(len(part) == window for part in groups[:-1])
    assert sum(len(part) for part in groups) == len(set().union(*groups))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else(filled, snapshot):
    def order(seed, epoch):
        return [sample for part in epoch_order(snapshot, seed=seed, epoch=epoch) for sample in part]

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    save_snapshot(filled, snapshot)
    script = f"""
from stillroom.storage.order import epoch_order
from stillroom.storage.snapshot import load_snapshot
from stillroom.storage.store import Store
snapshot = load_snapshot(Store.open({str(filled.root)!r}), {snapshot.id!r})
print([sample for part in epoch_order(snapshot, seed=1, epoch=2) for sample in part])
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output == f"{order(1, 2)}\n"


def test_the_order_is_stable_across_versions():
    # Written down: if it changes, a run that resumes after an upgrade sees other batches.
    snapshot = Snapshot("s", "soft_targets", (SnapshotShard("a", "a", (2, 2), (0, 1, 3)),), {})
    assert list(epoch_order(snapshot, seed=0, epoch=0)) == [[(0, 3), (0, 1), (0, 0)]]


def test_samples_start_anywhere_and_windows_before_are_not_read(store, samples, monkeypatch):
    monkeypatch.setattr("stillroom.storage.shard.ROW_GROUP_BYTES", 1)  # a row group per row: 40 of them, in 3 windows
    samples.add_targets(store, range(40))
    places = {commit.shard.sha256: range(8) for commit in store.commits("soft_targets")}
    snapshot = make_snapshot(store, "soft_targets", places, {})
    reader = SnapshotReader(store, snapshot, ["key", "logprobs"])
    order = [sample for part in epoch_order(snapshot, seed=5, epoch=1) for sample in part]
    keys = [samples.target_key(8 * index + row) for index, row in order]

    reads = []
    real = ShardFile.read
    monkeypatch.setattr(ShardFile, "read", lambda self, *rest: reads.append(self.name) or real(self, *rest))
    for start in (0, 1, 15, 16, 17, 31, 32, 39, 40, 41):
        reads.clear()
        assert [sample["key"] for sample in reader.samples(seed=5, epoch=1, start=start)] == keys[start:]
        assert len(reads) == len(keys[start:])


def test_damage_stops_the_reader(filled, snapshot, samples):
    samples.flip(filled.files.path(snapshot.shards[2].name), "ids")
    reader = SnapshotReader(filled, snapshot, ["key", "ids"])
    with pytest.raises(IntegrityError, match=f"{snapshot.shards[2].name}: column ids, row group 0"):
        list(reader.samples(seed=0, epoch=0))
