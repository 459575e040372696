"""Vacuum removes what nothing names, once it is old, and never what is named or about to be."""

import os

import pytest

from stillroom.storage.errors import IntegrityError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.snapshots.snapshot import make_snapshot, save_snapshot
from stillroom.storage.store.commits import record_name
from stillroom.storage.store.segments import Segments, complete
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits


def age(files, hours, folder=""):
    for name, _, changed in list(files.walk(folder)):
        os.utime(files.path(name), (changed - hours * 3600,) * 2)


def litter(store):
    """Files that nothing names."""
    names = [
        "data/soft_targets/.tmp-1",
        "data/soft_targets/ab/orphan.parquet",
        "commits/rejects/.tmp-2",
    ]
    names += ["claims/score/abc/00000001.0.json", "cache/index/prompts/x-y.parquet", ".probe-1"]
    for name in names:
        store.files.path(name).parent.mkdir(parents=True, exist_ok=True)
        store.files.path(name).write_bytes(b"12")
    return set(names)


def tree(store):
    return {name for name, _, _ in store.files.walk()}


def test_what_nothing_names_goes_when_it_is_old(filled):
    before = tree(filled)
    useless = litter(filled)
    young = vacuum(filled)
    assert (young.files, young.waiting) == ({}, len(useless))
    age(filled.files, 25)
    planned = vacuum(filled, dry_run=True)
    assert tree(filled) == before | useless
    done = vacuum(filled)
    assert set(done.files) == set(planned.files) == useless
    assert done.bytes == 2 * len(useless)
    assert tree(filled) == before
    assert verify(filled).notes == []
    assert vacuum(filled).files == {}


@pytest.mark.parametrize("days", [-400, 400])
def test_the_stores_clock_counts(template, tmp_path, days):
    """The filesystem's clock may be a year off this machine's."""

    class Elsewhere(LocalFiles):
        def walk(self, folder=""):
            for name, size, changed in super().walk(folder):
                yield name, size, changed + days * 86400

    store = Store.open(tmp_path / "store", create=True)
    useless = litter(store)
    elsewhere = Store.from_files(Elsewhere(store.root))
    assert vacuum(elsewhere).waiting == len(useless)
    age(store.files, 25)
    assert set(vacuum(elsewhere).files) == useless


def test_withdrawn_shards_go_unless_a_snapshot_or_a_live_commit_names_them(filled, samples):
    commits = filled.commits("soft_targets")
    shards = [commit.shard.name for commit in commits]
    save_snapshot(filled, make_snapshot(filled, "soft_targets", {commits[1].shard.sha256: [3]}, {}))
    for commit in commits[:3]:
        filled.retire(commit, reason="test")
    age(filled.files, 25, "data")
    assert (
        vacuum(filled).files == {}
    )  # somebody who read the records an hour ago may be reading the rows
    assert vacuum(filled, older_than_hours=0, dry_run=True).files.keys() == {shards[0], shards[2]}
    age(filled.files, 25, "retired")
    assert vacuum(filled).files.keys() == {shards[0], shards[2]}
    assert verify(filled).problems == []
    assert samples.add_targets(filled, range(40)) == 24
    assert verify(filled).problems == []


def test_index_segments_in_use_stay(store, samples, monkeypatch):
    monkeypatch.setattr("stillroom.storage.store.segments.SEGMENT", 4)
    samples.add_targets(store, range(6), commit_rows=1)
    segments = Segments(store.files, "soft_targets")
    first = segments.put(next(complete(store.commits("soft_targets"))))
    age(store.files, 25)
    assert vacuum(store).files == {}
    store.retire(store.commits("soft_targets")[2], reason="test")
    assert vacuum(store).files.keys() == {first}


def test_nothing_goes_while_a_record_cannot_be_read(filled):
    litter(filled)
    age(filled.files, 25)
    path = filled.files.path(record_name("soft_targets", 1))
    path.write_bytes(path.read_bytes()[:-5])
    before = tree(filled)
    with pytest.raises(IntegrityError, match=r"nothing was removed.*stillroom repair"):
        vacuum(filled)
    assert tree(filled) == before


@pytest.mark.parametrize("moment", ["_now", "walk", "remove"])
def test_a_writer_makes_an_old_orphan_again_at_any_moment(tmp_path, samples, moment):
    """A writer died between shard and record, long ago.

    Its rows are made again just as vacuum comes to the orphan.
    """

    class Racing(LocalFiles):
        raced = False

        def race(self):
            if not self.raced:
                self.raced = True
                samples.add_targets(Store.open(self.root), range(8))

        def walk(self, folder=""):
            if moment == "walk" and folder == "":
                self.race()
            found = list(super().walk(folder))
            if moment == "_now":
                self.race()
            return iter(found)

        def remove(self, name):
            if moment == "remove" and name.startswith("data/"):
                self.race()
            super().remove(name)

    plain = Store.open(tmp_path / "store", create=True)
    samples.add_targets(plain, range(8))
    orphan = plain.commits("soft_targets")[0].shard.name
    plain.files.remove(record_name("soft_targets", 0))
    age(plain.files, 25)

    racing = Racing(plain.root)
    done = vacuum(Store.from_files(racing))
    assert racing.raced
    assert done.files.keys() == {orphan}
    again = Store.open(plain.root)
    assert verify(again).problems == []
    assert again.index("soft_targets", ["key"]).num_rows == 8


def test_a_writer_between_shard_and_record_is_not_robbed(store, samples):
    """Vacuum comes when the shard is there and its record is not."""

    class Interrupted(LocalFiles):
        def put_if_absent(self, name, data):
            if name.startswith("commits/"):
                assert vacuum(store).waiting > 0
            return super().put_if_absent(name, data)

    slow = Store.from_files(Interrupted(store.root))
    with slow.writer("soft_targets", about=samples.ABOUT, limits=CommitLimits(rows=4)) as writer:
        for index in range(8):
            writer.add(samples.target_row(index))
    assert verify(store).problems == []
    assert verify(store).tables["soft_targets"].rows == 8


def test_claims_of_a_stage_at_work_stay_whole(filled):
    """Workers number their claims by those that are there."""
    litter(filled)
    age(filled.files, 25)
    filled.files.put_if_absent("claims/score/abc/00000001.1.json", b"{}")
    assert "claims/score/abc/00000001.0.json" not in vacuum(filled).files
    age(filled.files, 25)
    assert "claims/score/abc/00000001.0.json" in vacuum(filled).files
