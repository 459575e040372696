"""The store: what the commits say, rows by place, inputs, teachers.

The writer refuses what does not fit.
"""

import json

import numpy as np
import pyarrow as pa
import pytest

from stillroom.storage.errors import IntegrityError, StillroomError, Stopped, UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
from stillroom.storage.tables.schema import SCHEMAS, TABLES
from stillroom.storage.tables.shard import METADATA_KEY
from stillroom.storage.tables.soft_targets import SoftTargets


def test_open_finds_the_store_or_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"no store here \(no STORE.json found\)"):
        Store.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    made = Store.open(tmp_path / "a" / "b", create=True)
    assert (
        Store.open(tmp_path / "a" / "b").id
        == Store.open(tmp_path / "a" / "b", create=True).id
        == made.id
    )

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty and not a store"):
        Store.open(tmp_path / "full", create=True)

    (tmp_path / "a" / "b" / "STORE.json").write_text(
        json.dumps({"format_version": 99, "store_id": "x"})
    )
    with pytest.raises(IntegrityError, match="format version 99, this Stillroom reads up to 2"):
        Store.open(tmp_path / "a" / "b")


def test_rows_come_back_by_place(filled, samples):
    index = filled.index("soft_targets", ["key", "k"])
    assert index.column_names == ["key", "k", "shard", "row"]
    places: dict[str, list[int]] = {}
    for shard, row in zip(index["shard"].to_pylist(), index["row"].to_pylist(), strict=True):
        places.setdefault(shard, []).append(row)
    assert [len(rows) for rows in places.values()] == [8] * 5

    for number, row in enumerate(filled.rows("soft_targets", places)):
        expected = samples.target_row(number)
        assert [row[name] for name in row.keys() - expected.keys()] == [None] * 7
        for name, value in expected.items():
            np.testing.assert_array_equal(
                row[name], np.float32(value) if name == "kept_mass" else value
            )
            if isinstance(value, np.ndarray):
                assert row[name].dtype == value.dtype
                assert row[name].flags.writeable
    shard = next(iter(places))
    picked = list(filled.rows("soft_targets", {shard: [5, 1, 5]}, columns=["key"]))
    assert picked == [{"key": samples.target_key(i)} for i in (5, 1, 5)]
    with pytest.raises(IntegrityError, match="row 8 was asked for, the shard has 8"):
        list(filled.rows("soft_targets", {shard: [8]}))
    with pytest.raises(IntegrityError, match="no column colour"):
        list(filled.rows("soft_targets", {shard: [0]}, columns=["colour"]))


def test_other_tables_come_back(filled, samples):
    for table, make in (("generations", samples.generation_row), ("prompts", samples.prompt_row)):
        (commit,) = filled.commits(table)
        rows = list(filled.rows(table, {commit.shard.sha256: range(5)}))
        for index, row in enumerate(rows):
            for name, value in make(index).items():
                assert list(row[name]) == value if isinstance(value, list) else row[name] == value
        assert commit.tokens == (10 if table == "generations" else 0)


def test_an_empty_table_has_an_index(store):
    for table in TABLES:
        assert store.commits(table) == []
        assert store.index(table, ["key"]).schema.types == [pa.binary(16), pa.string(), pa.int32()]
    assert verify(store).ok


def test_shards_describe_themselves(filled, samples):
    about = filled.shard("soft_targets", filled.commits("soft_targets")[0].shard.sha256).about
    assert about.items() >= samples.ABOUT.items()
    assert about["format_version"] == 2
    assert about["table"] == "soft_targets"
    assert about["head"] == "lm"
    statistics = about["statistics"]["topk"]
    assert (statistics["rows"], statistics["tokens"], statistics["entries_per_token"]) == (
        8,
        48,
        4.0,
    )
    row_masses = [samples.target_row(i)["kept_mass"] for i in range(8)]
    assert statistics["kept_mass"]["mean"] == pytest.approx(np.mean(row_masses), abs=1e-3)
    with pytest.raises(
        ValueError, match="needs teacher_id, tokenizer_id, vocab_size, mantissa_bits"
    ):
        filled.writer("soft_targets", about={})


def test_full_targets_and_large_rows(store, samples, monkeypatch):
    monkeypatch.setattr("stillroom.storage.tables.shard.ROW_GROUP_BYTES", 2000)
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        for index in range(6):
            writer.add(samples.target_row(index, k=50, kind="full" if index < 3 else "topk"))
    (commit,) = store.commits("soft_targets")
    assert commit.shard.row_groups == (1, 1, 1, 1, 1, 1)
    rows = list(store.rows("soft_targets", {commit.shard.sha256: range(6)}))
    assert [row["ids"] is None for row in rows] == [True] * 3 + [False] * 3
    assert SoftTargets.from_row(rows[0]).logprobs.shape == (6, 50)
    assert verify(store).ok


def test_a_writer_commits_by_rows_bytes_and_time(store, samples):
    limits = CommitLimits(rows=3, bytes=1 << 30, seconds=1e9)
    with store.writer("soft_targets", about=samples.ABOUT, limits=limits) as writer:
        for index in range(7):
            assert writer.add(samples.target_row(index))
            writer.tick()
    assert (writer.rows, writer.tokens) == (7, 42)
    assert [commit.shard.rows for commit in store.commits("soft_targets")] == [3, 3, 1]
    for limits in CommitLimits(bytes=1), CommitLimits(seconds=0):
        before = len(store.commits("soft_targets"))
        with store.writer("soft_targets", about=samples.ABOUT, limits=limits) as writer:
            for index in range(3):
                writer.add(samples.target_row(10 * before + index))
        assert [commit.shard.rows for commit in store.commits("soft_targets")[before:]] == [1, 1, 1]


def test_a_known_key_is_skipped(store, samples):
    samples.add_targets(store, range(10))
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        assert not writer.add(samples.target_row(3))
        assert writer.add(samples.target_row(10))
        assert not writer.add(samples.target_row(10))
    assert (writer.rows, writer.skipped) == (1, 2)
    assert store.index("soft_targets", ["key"]).num_rows == 11


@pytest.mark.parametrize("error", [Stopped("stopped"), KeyboardInterrupt(), ValueError("a bug")])
def test_leaving_by_an_exception_commits_what_is_finished(store, samples, error):
    writer = store.writer("soft_targets", about=samples.ABOUT)

    def stage():
        with writer:
            writer.add(samples.target_row(0))
            raise error

    with pytest.raises(type(error)):
        stage()
    assert writer.rows == 1
    assert store.index("soft_targets", ["key"])["key"].to_pylist() == [samples.target_key(0)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda row: {"logprobs": row["logprobs"][:-4]},
            r"logprobs has 20 values, expected 24 \(span_tokens 6, k 4\)",
        ),
        (lambda row: {"ids": row["ids"][1:]}, "ids has 23 values, expected 24"),
        (lambda row: {"entropy": row["entropy"][1:]}, "entropy has 5 values, expected 6"),
        (lambda row: {"token_logprob": row["token_logprob"][1:]}, "token_logprob has 5 values"),
        (
            lambda row: {"tail_logprob": np.append(row["tail_logprob"], 0)},
            "tail_logprob has 7 values",
        ),
        (lambda row: {"span_start": 0}, "position t predicts token t"),
        (
            lambda row: {"span_start": 3},
            "the one at 3 ends at 9, the row has 8 tokens",
        ),
        (
            lambda row: {"token_ids": row["token_ids"][:-1]},
            "the one at 2 ends at 8, the row has 7 tokens",
        ),
        (lambda row: {"span_tokens": 0}, "the one at 2 has no tokens"),
        (lambda row: {"ids": None}, "kind 'topk' without ids"),
        (lambda row: {"kind": "full"}, "kind 'full' with ids"),
        (lambda row: {"kind": "full", "ids": None}, "kind 'full' with k 4, the vocabulary has 50"),
        (lambda row: {"teacher_id": "other"}, "teacher other in a shard of t"),
        (lambda row: {"entropy": row["entropy"] * np.nan}, "entropy holds NaN"),
        (lambda row: {"colour": 1}, "no such column: colour"),
        (lambda row: {"reuse_key": None}, r"column reuse_key \(hash of teacher"),
        (lambda row: {"key": b"short"}, "the key has 5 bytes, not 16"),
        (lambda row: {"ids": row["ids"] * 1.5}, "ids holds float64, expected list<item: int32>"),
        (
            lambda row: {"logprobs": row["logprobs"].reshape(6, 4)},
            r"logprobs has shape \(6, 4\), lists are flat",
        ),
    ],
)
def test_the_writer_refuses_rows_that_do_not_fit(store, samples, change, says):
    row = samples.target_row(0)
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        writer.add(samples.target_row(1))
        with pytest.raises(IntegrityError, match=says):
            writer.add({**row, **change(row)})
    assert store.index("soft_targets", ["key"])["key"].to_pylist() == [samples.target_key(1)]


def test_a_generation_whose_parts_do_not_add_up_is_refused(store, samples):
    with store.writer("generations", about=samples.GENERATIONS_ABOUT) as writer:
        writer.add(
            samples.generation_row(0)
            | {"token_ids": [1, 2], "prompt_tokens": 2, "completion_tokens": 0}
        )
        with pytest.raises(
            IntegrityError, match="3 prompt tokens and 2 completion tokens are not 4 token ids"
        ):
            writer.add(samples.generation_row(1) | {"prompt_tokens": 3})
    assert writer.rows == 1


def test_a_failing_disk_stops_the_writer_and_the_rows_can_be_made_again(tmp_path, samples):
    class Full(LocalFiles):
        full = False

        def _sync_file(self, path):
            if self.full:
                raise OSError(28, "No space left on device", str(path))
            super()._sync_file(path)

    files = Full(tmp_path / "store")
    store = Store.from_files(files, create=True)
    files.full = True
    with pytest.raises(StillroomError, match="the disk is full"):
        samples.add_targets(store, range(5), commit_rows=2)
    assert store.commits("soft_targets") == []
    files.full = False
    assert samples.add_targets(store, range(5)) == 5
    assert verify(store).ok


def test_retired_rows_are_gone_and_can_be_made_again(filled, samples):
    first = filled.commits("soft_targets")[0]
    assert filled.retire(first, reason="test")
    assert not filled.retire(first, reason="again")
    assert filled.index("soft_targets", ["key"]).num_rows == 32
    assert samples.add_targets(filled, range(40)) == 8
    assert sorted(filled.index("soft_targets", ["key"])["key"].to_pylist()) == sorted(
        samples.target_key(i) for i in range(40)
    )
    assert verify(filled).ok
    again = filled.commits("soft_targets")[-1]
    assert again.seq == 5
    assert again.shard.rows == first.shard.rows


def test_a_withdrawn_number_is_not_used_again(filled, samples):
    """The last record is lost with a backup, its withdrawal is not: no new row is under it."""
    last = filled.commits("soft_targets")[-1]
    filled.retire(last, reason="test")
    filled.files.path("commits/soft_targets/00000004.json").unlink()
    store = Store.open(filled.root)
    assert samples.add_targets(store, range(40)) == 8
    assert store.commits("soft_targets")[-1].seq == 5
    assert store.index("soft_targets", ["key"]).num_rows == 40
    assert verify(store).problems == []


def test_another_process_s_commits_are_seen(filled, samples):
    other = Store.open(filled.root)
    assert len(other.commits("soft_targets")) == 5
    samples.add_targets(filled, range(40, 48))
    assert len(other.commits("soft_targets")) == 6


def test_inputs(store):
    table = pa.table(
        {
            "key": pa.array([bytes([i]) * 16 for i in range(3)], pa.binary(16)),
            "prompt_key": pa.array([bytes([i]) * 16 for i in range(3)], pa.binary(16)),
            "split": ["train", "test", "train"],
            "windows": pa.array([None, 2, None], pa.int32()),
            "first": [True, True, True],
        }
    )
    assert store.inputs("d1") is None
    assert store.inputs_about("d1") is None
    store.put_inputs("d1", table, {"source": "x.jsonl"})
    store.put_inputs("d1", table.slice(1), {"source": "ignored"})
    assert store.inputs("d1").to_pylist() == table.to_pylist()
    assert store.inputs_about("d1") == {"source": "x.jsonl"}
    store.put_inputs("empty", table.slice(3), {})
    assert store.inputs("empty").num_rows == 0
    assert verify(store).ok


def test_teachers(store):
    with pytest.raises(UsageError, match="does not know this teacher"):
        store.teacher_dir("t1")
    store.put_teacher(
        "t1", {"identity.json": b"{}", "tokenizer.json": b"tok", "config.json": b"conf"}
    )
    folder = store.teacher_dir("t1")
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(json.loads(found.pop("files.json"))["files"]) == set(found)
    assert found == {
        "identity.json": b"{}",
        "tokenizer.json": b"tok",
        "config.json": b"conf",
    }


def test_the_schema_on_disk_is_the_schema(filled):
    for table in ("soft_targets", "generations", "prompts"):
        shard = filled.shard(table, filled.commits(table)[0].shard.sha256)
        assert shard.schema.equals(SCHEMAS[table])
        assert (
            shard.schema.field("key").metadata[b"about"]
            == SCHEMAS[table].field("key").metadata[b"about"]
        )
        assert METADATA_KEY in shard.schema.metadata
