"""Repair withdraws what is damaged and nothing else.

A retirement races with writers and loses nothing.
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest

from stillroom.storage.errors import IntegrityError, StillroomError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.repair import repair
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.keys import canonical_json, content_id, content_key, seal, unseal
from stillroom.storage.snapshots.snapshot import load_snapshot, make_snapshot, save_snapshot
from stillroom.storage.store.commits import read_commit, record_name, retire
from stillroom.storage.store.inputs import INPUTS_SCHEMA
from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
from stillroom.storage.tables.features import NARROWED

RECORD = "commits/soft_targets/00000002.json"


def flip_anywhere(path):
    data = bytearray(path.read_bytes())
    bit = random.randrange(len(data) * 8)
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def forge(path, **changes):
    path.write_bytes(seal(unseal(path.read_bytes(), path.name) | changes))


def shard_path(store, seq=2):
    return store.files.path(read_commit(store.files, "soft_targets", seq)[0].shard.name)


DAMAGE = {
    "flipped bit": lambda store: flip_anywhere(shard_path(store)),
    "cut short": lambda store: shard_path(store).write_bytes(shard_path(store).read_bytes()[:-9]),
    "another shard": lambda store: shutil.copy(shard_path(store, 1), shard_path(store)),
    "no shard": lambda store: shard_path(store).unlink(),
    "flipped record": lambda store: flip_anywhere(store.files.path(RECORD)),
    "no record": lambda store: store.files.path(RECORD).unlink(),
    "forged record": lambda store: forge(store.files.path(RECORD), tokens=47),
    "copied record": lambda store: shutil.copy(
        store.files.path(record_name("soft_targets", 1)), store.files.path(RECORD)
    ),
}


def keys_once(store, samples, rows=40):
    keys = store.index("soft_targets", ["key"])["key"].to_pylist()
    assert sorted(keys) == sorted(samples.target_key(index) for index in range(rows))
    assert verify(store).problems == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_exactly_the_damaged_commit_is_withdrawn(filled, samples, damage):
    DAMAGE[damage](filled)
    done = repair(filled)
    assert [commit.record for commit in done.withdrawn] == [RECORD]
    assert (done.removed, done.rewritten, done.left) == ([], [], [])
    store = Store.open(filled.root)
    assert verify(store).problems == []
    assert [commit.seq for commit in store.commits("soft_targets")] == [0, 1, 3, 4]
    assert repair(store).withdrawn == []

    assert samples.add_targets(store, range(40)) == 8
    keys_once(store, samples)


def test_a_key_in_two_commits_is_kept_in_the_first(filled, samples):
    record = unseal(filled.files.read(record_name("soft_targets", 1)), "")
    filled.files.put_if_absent(record_name("soft_targets", 5), seal(record | {"seq": 5}))
    (problem,) = verify(filled).problems
    assert "is in commit 1 already (and 7 more)" in problem.message
    assert [commit.record for commit in repair(filled).withdrawn] == [
        record_name("soft_targets", 5)
    ]
    keys_once(Store.open(filled.root), samples)


def test_a_damaged_withdrawal_is_written_again(filled):
    filled.retire(filled.commits("soft_targets")[1], reason="test")
    name = record_name("soft_targets", 1, folder="retired")
    flip_anywhere(filled.files.path(name))
    done = repair(filled)
    assert (done.rewritten, done.withdrawn, done.ok) == ([name], [], True)
    assert len(Store.open(filled.root).commits("soft_targets")) == 4
    assert verify(filled).ok


def put_a_teacher(store):
    parts = {
        "tokenizer": {"tokenizer.json": "", "config": {"a": 1}},
        "config": {"b": [2]},
        "chat_template": "{{x}}",
    }
    files = {
        "tokenizer.json": b'{"model": 1}',
        "tokenizer_config.json": b'{"a": 1}',
        "config.json": b'{"b": [2]}',
        "chat_template.jinja": b"{{x}}",
        "generation_config.json": b'{"temperature": 0.6}',
    }
    parts["tokenizer"]["tokenizer.json"] = hashlib.sha256(files["tokenizer.json"]).hexdigest()
    teacher = content_id("model", **parts)
    store.put_teacher(teacher, files | {"identity.json": canonical_json(parts)})
    return teacher, files | {"identity.json": canonical_json(parts)}


def test_every_file_kept_of_a_teacher_is_verified(filled):
    """Also where no identity says what is in it: a generation config; and one that is gone."""
    teacher, files = put_a_teacher(filled)
    folder = filled.files.path(f"teachers/{teacher}")
    for name in [*files, "files.json"]:
        whole = (folder / name).read_bytes()
        for damage in (whole[: len(whole) // 2], None):
            (folder / name).unlink()
            if damage is not None:
                (folder / name).write_bytes(damage)
            if name == "files.json" and damage is None:  # as of a store that has none
                assert "stored before the hashes of its files" in verify(filled).notes[0]
            else:
                (problem,) = verify(filled).problems
                assert problem.file == f"teachers/{teacher}/{name}"
        (folder / name).write_bytes(whole)
    assert verify(filled).ok
    assert not verify(filled).notes


def test_a_file_planted_beside_a_teacher_is_a_problem_and_goes(filled):
    """Its tokenizer would read it; what the identity proves may lack a recorded hash."""
    teacher, files = put_a_teacher(filled)
    folder = filled.files.path(f"teachers/{teacher}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "!"}')
    (problem,) = verify(filled).problems
    assert problem.file == f"teachers/{teacher}/special_tokens_map.json"
    assert f"teachers/{teacher}/special_tokens_map.json" in repair(filled).removed
    filled.put_teacher(teacher, files)
    hashes = unseal((folder / "files.json").read_bytes(), "files.json")["files"]
    (folder / "files.json").write_bytes(
        seal({"files": {name: sha for name, sha in hashes.items() if name != "config.json"}})
    )
    assert verify(filled).ok


def put_some_inputs(store, data_id="d"):
    columns = {
        "key": [b"k" * 16],
        "prompt_key": [b"p" * 16],
        "split": ["train"],
        "windows": [None],
        "first": [True],
    }
    store.put_inputs(
        data_id, pa.table({n: columns[n] for n in INPUTS_SCHEMA.names}, schema=INPUTS_SCHEMA), {}
    )


def test_other_records_are_removed_so_that_they_are_made_again(filled):
    teacher, files = put_a_teacher(filled)
    for name in [*files, "files.json"]:
        assert verify(filled).ok
        flip_anywhere(filled.files.path(f"teachers/{teacher}/{name}"))
        removed = repair(filled).removed
        expected = {"identity.json", "files.json", name}
        assert set(removed) == {f"teachers/{teacher}/{file}" for file in expected}
        assert verify(filled).ok
        filled.put_teacher(teacher, files)

    put_some_inputs(filled)
    filled.files.put_if_absent("bindings/b/00000000.json", seal({"teacher_id": "old"}))
    filled.files.put_if_absent("bindings/b/00000001.json", seal({"teacher_id": "new"}))
    snapshot = make_snapshot(
        filled, "soft_targets", {filled.commits("soft_targets")[0].shard.sha256: [0, 1]}, {}
    )
    save_snapshot(filled, snapshot)
    kept = f"snapshots/{snapshot.id}.json"
    assert verify(filled).ok
    for name in ("inputs/d.json", "bindings/b/00000001.json", kept):
        flip_anywhere(filled.files.path(name))
    done = repair(filled)
    assert set(done.removed) == {
        "inputs/d.json",
        "bindings/b/00000000.json",
        "bindings/b/00000001.json",
        kept,
    }
    assert done.ok
    put_some_inputs(filled)
    save_snapshot(filled, snapshot)
    assert filled.inputs("d").num_rows == load_snapshot(filled, snapshot.id).rows - 1 == 1
    assert verify(filled).ok


def test_damaged_inputs_are_made_again_under_another_name(filled):
    put_some_inputs(filled)
    shard = filled.files.path(json.loads(filled.files.read("inputs/d.json"))["shard"]["name"])
    shard.write_bytes(shard.read_bytes()[:-1])
    assert repair(filled).removed == ["inputs/d.json"]
    put_some_inputs(filled)
    assert verify(filled).ok
    assert filled.inputs("d").num_rows == 1


def test_a_snapshot_of_a_damaged_shard_is_left_until_the_same_bytes_are_made_again(filled, samples):
    commit = filled.commits("soft_targets")[2]
    snapshot = make_snapshot(filled, "soft_targets", {commit.shard.sha256: range(8)}, {})
    save_snapshot(filled, snapshot)
    shard_path(filled).unlink()
    for withdrawn in ([RECORD], []):
        done = repair(filled)
        assert [c.record for c in done.withdrawn] == withdrawn
        assert [(p.file, p.mend) for p in done.left] == [(f"snapshots/{snapshot.id}.json", ())]
        assert commit.shard.name in done.left[0].message
    samples.add_targets(filled, range(40))
    keys_once(filled, samples)


def test_rows_that_cannot_be_right_are_left(store, samples):
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        writer.add(samples.target_row(0) | {"kept_mass": 0.1})
    done = repair(store)
    assert (done.withdrawn, len(done.left)) == ([], 1)
    assert "says 0.1000" in done.left[0].message


def test_two_repairs_at_once_withdraw_each_commit_once(filled, samples):
    for seq in (0, 2, 3):
        flip_anywhere(shard_path(filled, seq))
    stores = [Store.open(filled.root) for _ in range(3)]
    done = []
    threads = [
        threading.Thread(target=lambda store=store: done.append(repair(store))) for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(c.record for d in done for c in d.withdrawn) == [
        record_name("soft_targets", n) for n in (0, 2, 3)
    ]
    assert samples.add_targets(filled, range(40)) == 24
    keys_once(filled, samples)


def test_rejects_are_tried_again_by_reason(store):
    def reject(index, reason):
        key = content_key("test_reject", index=index)
        return {"key": key, "stage": "score", "reason": reason, "message": "", "attempts": 1}

    with store.writer("rejects", about={"stage": "score"}, limits=CommitLimits(rows=2)) as writer:
        for index, reason in enumerate(
            ["too_long", "empty", "engine", "too_long", "out_of_memory", "engine"]
        ):
            writer.add(reject(index, reason))
    done = repair(store, retry=["engine", "never_heard_of"])
    assert done.retried == {"engine": 2, "too_long": 1, "out_of_memory": 1}
    assert [commit.seq for commit in store.commits("rejects")] == [0]
    assert (repair(store, retry=["engine"]).retried, verify(store).ok) == ({}, True)


def test_what_the_data_stage_rejected_stays(store):
    """Its inputs record makes it done: nothing would try them again."""
    row = {
        "key": content_key("r"),
        "stage": "data",
        "reason": "too_long",
        "message": "",
        "attempts": 1,
    }
    with store.writer("rejects", about={"stage": "data"}) as writer:
        writer.add(row)
    assert repair(store, retry=["too_long"]).retried == {}
    assert len(store.commits("rejects")) == 1


@pytest.mark.parametrize("folder", ["snapshots", "inputs", "commits", "data"])
def test_a_read_that_fails_is_no_damage(filled, folder):
    """A disk or a network that fails for a moment must not make repair remove anything.

    Nor is anything withdrawn.
    """
    save_snapshot(filled, make_snapshot(filled, "soft_targets", {}, {}))
    columns = {
        "key": [b"k" * 16],
        "prompt_key": [b"p" * 16],
        "split": ["train"],
        "windows": [1],
        "first": [True],
    }
    filled.put_inputs("d", pa.table(columns).cast(INPUTS_SCHEMA), {})
    before = sorted(filled.files.walk())

    class Failing(LocalFiles):
        def read(self, name):
            return self._fail(name) or super().read(name)

        def sha256(self, name):
            return self._fail(name) or super().sha256(name)

        def _fail(self, name):
            if name.startswith(folder):
                raise StillroomError(f"{name}: the disk reported an input/output error")

    with pytest.raises(StillroomError, match="input/output"):
        repair(Store.from_files(Failing(filled.root)))
    assert sorted(filled.files.walk()) == before


class Baton:
    """Lets one of several threads make its next step, chosen at random, while the others wait."""

    def __init__(self, seed: int, parties: int) -> None:
        self._random = random.Random(seed)
        self._turn = threading.Condition()
        self._parties = parties
        self._waiting: list[object] = []
        self._chosen: object = None

    def step(self) -> None:
        me = object()
        with self._turn:
            self._waiting.append(me)
            self._choose()
            self._turn.wait_for(lambda: self._chosen is me)
            self._chosen = None

    def leave(self) -> None:
        with self._turn:
            self._parties -= 1
            self._choose()

    def _choose(self) -> None:
        if self._waiting and len(self._waiting) == self._parties:
            self._chosen = self._waiting.pop(self._random.randrange(len(self._waiting)))
            self._turn.notify_all()


class SteppedFiles(LocalFiles):
    """Every look at the disk and every change of it is a step of a baton."""

    def __init__(self, root, baton):
        super().__init__(root)
        self._baton = baton

    def _sync_file(self, path):
        pass

    def _sync_folder(self, folder):
        pass

    def exists(self, name):
        self._baton.step()
        return super().exists(name)

    def read(self, name):
        self._baton.step()
        return super().read(name)

    def names(self, folder, prefix=""):
        self._baton.step()
        return super().names(folder, prefix)

    def _link(self, temp, final):
        self._baton.step()
        super()._link(temp, final)


def write_all(files, samples, order):
    store = Store.from_files(files)
    with store.writer("soft_targets", about=samples.ABOUT, limits=CommitLimits(rows=2)) as writer:
        for index in order:
            writer.add(samples.target_row(index, tokens=2))


def withdraw_some(files, rng):
    """Withdraw live commits, and numbers whose records are lost, as `repair` does."""
    for _ in range(3):
        store = Store.from_files(files)
        if commits := store.commits("soft_targets"):
            commit = rng.choice(commits)
            if rng.random() < 0.5:
                files.remove(record_name("soft_targets", commit.seq))
            store.retire(commit, reason="test")


@pytest.mark.parametrize("part", range(4))
def test_commits_that_race_with_retirements_lose_nothing(tmp_path, samples, part):
    """Two writers of the same rows and somebody who withdraws commits interleave at random.

    They do so step by step.
    """
    withdrawn = 0
    for seed in range(part * 10, part * 10 + 10):
        root, rng = tmp_path / str(seed), random.Random(seed)
        Store.open(root, create=True)
        orders = [rng.sample(range(8), 8) for _ in range(2)]
        baton, errors = Baton(seed, 3), []

        def party(work, *arguments, baton=baton, errors=errors):
            try:
                work(*arguments)
            except Exception as raised:
                errors.append(raised)
            finally:
                baton.leave()

        files = [SteppedFiles(root, baton) for _ in range(3)]
        work = [
            (write_all, files[0], samples, orders[0]),
            (write_all, files[1], samples, orders[1]),
        ]
        threads = [
            threading.Thread(target=party, args=words)
            for words in [*work, (withdraw_some, files[2], rng)]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Who reads while a record vanishes may stop; that is what the next pass is for.
        assert all(isinstance(error, IntegrityError) for error in errors), errors
        store = Store.open(root)
        repair(store)
        write_all(LocalFiles(root), samples, range(8))
        keys_once(Store.open(root), samples, rows=8)
        withdrawn += len(store.files.names("retired/soft_targets"))
    assert withdrawn > 10


def test_a_writer_does_not_take_a_number_that_was_given_up(store, samples):
    """The record is lost, its number withdrawn, and a writer that saw neither comes to it."""
    with store.writer("soft_targets", about=samples.ABOUT) as late:
        late.add(samples.target_row(0))
        samples.add_targets(store, range(10, 18))
        store.files.remove(record_name("soft_targets", 0))
        retire(store.files, "soft_targets", 0, reason="its record is lost")
    assert late.rows == 1
    assert samples.add_targets(store, range(10, 18)) == 8
    keys = store.index("soft_targets", ["key"])["key"].to_pylist()
    assert sorted(keys) == sorted(samples.target_key(index) for index in [0, *range(10, 18)])
    assert verify(store).problems == []


def test_a_snapshot_of_a_withdrawn_but_intact_shard_goes_on_working(filled, samples):
    commit = filled.commits("soft_targets")[2]
    snapshot = make_snapshot(filled, "soft_targets", {commit.shard.sha256: [1, 5]}, {})
    save_snapshot(filled, snapshot)
    filled.retire(commit, reason="test")
    samples.add_targets(filled, range(40))
    vacuum(filled, older_than_hours=0)
    chosen = load_snapshot(filled, snapshot.id).shards[0]
    rows = list(filled.shard("soft_targets", chosen.sha256).take([int(row) for row in chosen.rows]))
    assert [row["key"] for row in rows] == [samples.target_key(17), samples.target_key(21)]
    np.testing.assert_array_equal(rows[0]["token_ids"], samples.target_row(17)["token_ids"])
    keys_once(filled, samples)


def test_nothing_is_withdrawn_or_deleted_under_a_writer(store, samples):
    """verify, repair and vacuum again and again while another process writes."""
    words = [sys.executable, samples.__file__, str(store.root), "0", "160"]
    writer = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    writer.stdin.write("go\n")
    writer.stdin.flush()
    looks = 0
    while writer.poll() is None:
        done = repair(store)
        assert (done.withdrawn, done.removed, done.left) == ([], [], [])
        assert vacuum(store).files == {}
        looks += 1
    assert writer.communicate()[0].endswith("committed 160\n")
    assert looks > 1
    keys_once(store, samples, rows=160)


def test_features_are_a_table_like_the_others(store, samples):
    """Read, proved and mended."""
    row = {
        "key": b"f" * 16,
        "reuse_key": b"r" * 16,
        "text_key": b"t" * 16,
        "teacher_id": "teacher",
        "kind": "hidden",
        "layer": 3,
        "positions": [1, 4],
        "vectors": 2,
        "width": 40,
        "dtype": "float16",
        "values": np.random.default_rng(0).normal(size=(2, 40)).astype("<f2").tobytes(),
        "scale": None,
        "rounding_error": 0.0,
        **dict.fromkeys(("heads", "score_scale", "causal", "window", *NARROWED)),
    }
    with store.writer("features", about={"stage": "score", "teacher_id": "teacher"}) as writer:
        writer.add(row)
    (commit,) = store.commits("features")
    (found,) = store.rows("features", {commit.shard.sha256: [0]})
    np.testing.assert_array_equal(found.pop("positions"), row["positions"])
    assert found == {name: value for name, value in row.items() if name != "positions"}
    assert query(store, "SELECT kind, layer FROM features").to_pylist() == [
        {"kind": "hidden", "layer": 3}
    ]
    assert verify(store).ok
    assert commit.shard.name not in vacuum(store, older_than_hours=0).files

    samples.flip(store.files.path(commit.shard.name), "values")
    assert [problem.column for problem in verify(store).problems] == [None, "values"]
    assert [one.rows for one in repair(store).withdrawn] == [1]
    assert store.commits("features") == []
    assert verify(store).ok
