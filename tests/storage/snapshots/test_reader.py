"""Reading a snapshot: any ranges of it, a bounded way ahead, only the files it needs.

Damage is found by name.
"""

import threading
import weakref
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest

from stillroom.storage.errors import IntegrityError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.snapshots.order import WINDOW
from stillroom.storage.snapshots.reader import THREAD_NAME, THREADS, SnapshotReader
from stillroom.storage.snapshots.snapshot import Snapshot, make_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.rows import Rows, check_row, rows_to_table
from stillroom.storage.tables.soft_targets import LISTS, SoftTargets, normalised_targets

ROWS = 80


@pytest.fixture(scope="module")
def many(samples, tmp_path_factory):
    """80 rows in as many row groups, two to a shard: five windows an epoch."""
    store = Store.open(tmp_path_factory.mktemp("many") / "store", create=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stillroom.storage.tables.shard.ROW_GROUP_BYTES", 1)
        samples.add_targets(store, range(ROWS), commit_rows=2)
    return store


def whole(store):
    rows = {
        commit.shard.sha256: range(commit.shard.rows) for commit in store.commits("soft_targets")
    }
    return make_snapshot(store, "soft_targets", rows, {})


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that were opened."""
    names = []
    real = LocalFiles.source
    monkeypatch.setattr(
        LocalFiles, "source", lambda self, name: names.append(name) or real(self, name)
    )
    return names


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def keys(found):
    return [row["key"] for row in found]


def test_samples_are_the_same_from_any_number_on_through_epochs(many, samples, opened):
    reader = SnapshotReader(many, whole(many), ["key", "logprobs"])
    opened.clear()
    order = keys(reader.samples(seed=5, stop=3 * ROWS))
    epochs = [order[i : i + ROWS] for i in range(0, 3 * ROWS, ROWS)]
    assert all(sorted(epoch) == sorted(map(samples.target_key, range(ROWS))) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert len(opened) == 3 * ROWS  # each row group is read once an epoch
    for start in (0, 1, 15, 16, 17, 79, 80, 81, 150, 239, 240):
        assert keys(reader.samples(seed=5, start=start, stop=3 * ROWS)) == order[start:]
    assert keys(islice(reader.samples(seed=5, start=70), 30)) == order[70:100]


def test_parts_of_batches_are_parts_of_the_order(filled):
    """Ranges with gaps, within and across windows, of row groups that are only partly wanted."""
    reader = SnapshotReader(filled, whole(filled), ["key"])
    order = keys(reader.samples(seed=2, stop=200))
    ranges = [
        range(3, 5),
        range(5, 6),
        range(6, 6),
        range(30, 55),
        range(120, 121),
        range(158, 163),
    ]
    assert [keys(batch) for batch in reader.batches(ranges, seed=2)] == [
        order[r.start : r.stop] for r in ranges
    ]
    assert list(reader.batches([], seed=2)) == []
    assert (
        list(SnapshotReader(filled, Snapshot("s", "soft_targets", (), {}), ["key"]).samples(seed=0))
        == []
    )


@pytest.mark.parametrize("start", [0, 7, 100, 171])
def test_the_first_batch_opens_its_own_files_and_no_other(many, samples, opened, start):
    snapshot = whole(many)
    reader = SnapshotReader(many, snapshot, ["key"])
    names = {
        samples.target_key(2 * i + j): shard.name
        for i, shard in enumerate(snapshot.shards)
        for j in range(2)
    }
    opened.clear()
    batches = reader.batches([range(start, start + 8), range(start + 8, start + 16)], seed=3)
    batch = next(batches)
    assert sorted(opened) == sorted(names[key] for key in keys(batch))
    batches.close()


def test_the_next_window_is_read_while_this_one_is_consumed(many):
    """The consumer waits at its second batch until the thread is a window ahead of it."""
    done = threading.Semaphore(0)
    reader = SnapshotReader(
        many, whole(many), ["key"], decode=lambda rows, _: done.release() or rows
    )
    batches = reader.batches([range(4), range(4, 5), range(5, ROWS)], seed=0)
    next(batches)
    next(batches)
    for _ in range(4 + 1 + WINDOW):
        assert done.acquire(timeout=60)
    batches.close()
    assert threads() == []


def test_at_most_two_windows_are_decoded_at_once(many):
    class Group(list):
        """Samples of a row group."""

        __hash__ = object.__hash__

    alive, done, largest = weakref.WeakSet(), threading.Semaphore(0), 0

    def decode(rows, _):
        group = Group(rows[i]["key"] for i in range(len(rows)))
        alive.add(group)
        done.release()
        return group

    reader = SnapshotReader(many, whole(many), ["key"], decode=decode)
    for number, _ in enumerate(reader.samples(seed=0, stop=2 * ROWS)):
        # A row group per sample: one more is read for each that is consumed. Wait for it, that is
        # the worst there is.
        expected = 1 + WINDOW if number == 1 else 1
        for _ in range(expected if number + WINDOW < 2 * ROWS else 0):
            assert done.acquire(timeout=60)
        largest = max(largest, len(alive))
    assert WINDOW < largest <= 2 * WINDOW
    assert threads() == []


def test_the_threads_end_with_the_iterator(many):
    reader = SnapshotReader(many, whole(many), ["key"])
    found = reader.samples(seed=0)
    list(islice(found, 30))
    assert 1 <= len(threads()) <= THREADS
    found.close()
    assert threads() == []
    assert len(list(reader.samples(seed=0, stop=10))) == 10
    assert threads() == []


def test_a_flipped_bit_stops_the_reader_and_is_named(filled, samples):
    snapshot = whole(filled)
    samples.flip(filled.files.path(snapshot.shards[2].name), "ids")
    reader = SnapshotReader(filled, snapshot, ["key", "ids"])
    with pytest.raises(IntegrityError, match=f"{snapshot.shards[2].name}: column ids, row group 0"):
        list(reader.samples(seed=0, stop=40))
    assert threads() == []


def test_a_file_with_other_row_groups_than_were_chosen_is_named(filled):
    snapshot = whole(filled)
    shards = tuple(replace(shard, row_groups=(4, 4)) for shard in snapshot.shards)
    reader = SnapshotReader(filled, replace(snapshot, shards=shards), ["key"])
    with pytest.raises(
        IntegrityError, match=r"row groups of \(8,\) rows, the snapshot says \(4, 4\)"
    ):
        list(reader.samples(seed=0, stop=1))


def mixed(samples):
    """Rows of every kind, of several K and temperatures, alike ones next to each other and not."""
    kinds = [kind for kind in samples.KINDS for _ in range(4)]
    kinds += list(np.random.default_rng(0).choice(samples.KINDS, 20))
    rows = [
        samples.target_row(i, kind=kind, k=3 + i % 7 // 4, tokens=2 + i % 5)
        for i, kind in enumerate(kinds)
    ]
    for row in rows[::2]:
        if row["temperatures"] is not None:
            row["temperatures"] = row["temperatures"] + 0.25
    return [check_row("soft_targets", row) for row in rows]


@pytest.mark.parametrize("values", [1, 40, 1 << 17])
def test_targets_of_many_rows_are_those_of_each(samples, monkeypatch, values):
    """They are equal bit for bit, however many rows are read as one.

    What a sample holds does not depend on its neighbours.
    """
    monkeypatch.setattr("stillroom.storage.tables.soft_targets._VALUES", values)
    rows = mixed(samples)
    found = list(normalised_targets(Rows(rows_to_table("soft_targets", rows))))
    for row, targets in zip(rows, found, strict=True):
        alone = SoftTargets.from_row(row).normalised()
        for field in fields(SoftTargets):
            one, other = getattr(targets, field.name), getattr(alone, field.name)
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other)


def test_targets_are_normalised_as_in_float64(samples):
    rows = [row for row in mixed(samples) if row["logprobs"] is not None]
    for row, targets in zip(
        rows, normalised_targets(Rows(rows_to_table("soft_targets", rows))), strict=True
    ):
        stored = SoftTargets.from_row(row)
        entries, tail = stored.logprobs.astype(np.float64), stored.tail_logprob.astype(np.float64)
        total = np.log(np.exp(entries).sum(axis=1) + np.exp(tail))
        np.testing.assert_allclose(targets.logprobs, entries - total[:, None], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(targets.tail_logprob, tail - total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("column", LISTS[1:])
def test_lists_that_disagree_within_a_row_are_refused(samples, column):
    """Also where the surplus of a row makes up for what another lacks."""
    rows = [row for row in mixed(samples) if row[column] is not None][:3]
    rows[0][column] = rows[0][column][:-1]
    rows[1][column] = np.append(rows[1][column], rows[1][column][-1:])
    named = "tempered_tails" if column == "temperatures" else column  # so many at each position
    with pytest.raises(IntegrityError, match=f"soft_targets row: {named} has"):
        list(normalised_targets(Rows(rows_to_table("soft_targets", rows))))


def test_broken_targets_are_named_by_file_and_row_group(filled, snapshot_of_two):
    reader = SnapshotReader(filled, snapshot_of_two, ["key"], decode=broken)
    with pytest.raises(
        IntegrityError, match=rf"^{snapshot_of_two.shards[0].name}: row group 0: no probability"
    ):
        list(reader.samples(seed=0, stop=2))


@pytest.fixture
def snapshot_of_two(filled):
    first = filled.commits("soft_targets")[0]
    return make_snapshot(filled, "soft_targets", {first.shard.sha256: [1, 3]}, {})


def broken(rows, _):
    raise IntegrityError("no probability at all")
