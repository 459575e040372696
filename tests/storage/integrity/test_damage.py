"""Damage is never read as data.

Reading names file, column and row group, and verify finds all of it.
"""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.storage.errors import IntegrityError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.keys import seal, unseal
from stillroom.storage.snapshots.snapshot import make_snapshot, save_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import SCHEMAS, encodings
from stillroom.storage.tables.shard import METADATA_KEY


def shard_of(store, number: int = 0):
    commit = store.commits("soft_targets")[number]
    return commit, store.files.path(commit.shard.name)


@pytest.mark.parametrize(
    "column", ["logprobs", "ids", "token_ids", "tail_logprob", "key", "kept_mass", "spans"]
)
def test_a_flipped_bit_is_detected_on_read_and_by_verify(filled, samples, column):
    commit, path = shard_of(filled, 2)
    samples.flip(path, column)
    says = rf"{commit.shard.name}: column {column}, row group 0 is damaged"
    places = {commit.shard.sha256: range(8)}
    with pytest.raises(IntegrityError, match=says):
        list(filled.rows("soft_targets", places))
    with pytest.raises(IntegrityError, match=says):
        filled.index("soft_targets", [column])
    others = [name for name in SCHEMAS["soft_targets"].names if name != column]
    assert len(list(filled.rows("soft_targets", places, others))) == 8

    problems = verify(filled).problems
    assert [(p.file, p.column, p.row_group) for p in problems] == [
        (commit.shard.name, None, None),
        (commit.shard.name, column, 0),
    ]
    assert "sha256 is not the one that was committed" in problems[0].message


def rows_or_error(store, sha256):
    try:
        return list(store.rows("soft_targets", {sha256: range(8)})), None
    except IntegrityError as error:
        return [], str(error)


def test_no_flipped_bit_gives_wrong_rows(filled, samples):
    commit, path = shard_of(filled)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    expected = list(filled.rows("soft_targets", {commit.shard.sha256: range(8)}))
    detected = 0
    for bit in rng.choice(len(data) * 8, 100, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        rows, error = rows_or_error(filled, commit.shard.sha256)
        detected += error is not None
        assert error is None or commit.shard.name in error
        for row, right in zip(
            rows, expected, strict=not error
        ):  # a bit of the footer that means nothing to these rows
            for name, value in right.items():
                np.testing.assert_array_equal(row[name], value)
    assert detected > 50


def chunks_of(path):
    """(first byte, end, row group, column) of every column chunk."""
    metadata = pq.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            starts = [
                s for s in (chunk.dictionary_page_offset, chunk.data_page_offset) if s is not None
            ]
            yield (
                min(starts),
                min(starts) + chunk.total_compressed_size,
                group,
                chunk.path_in_schema.split(".")[0],
            )


def flipped(data: bytes, count: int):
    """`count` copies of some bytes, a different bit flipped in each, and the flipped bit's byte."""
    for bit in np.random.default_rng(count).permutation(len(data) * 8)[:count]:
        copy = bytearray(data)
        copy[bit // 8] ^= 1 << (bit % 8)
        yield int(bit) // 8, bytes(copy)


def test_single_bit_flips_in_a_shard_and_its_record(store, samples, monkeypatch):
    """Of 800 flips in rows of every kind 800 are found, and the file is named.

    Column and row group are named wherever a page's checksum tells.
    """
    monkeypatch.setattr("stillroom.storage.tables.shard.ROW_GROUP_BYTES", 40_000)
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        for index in range(8):
            writer.add(
                samples.target_row(
                    index, tokens=60, k=16, kind=samples.KINDS[index % len(samples.KINDS)]
                )
            )
    commit, path = shard_of(store)
    assert len(commit.shard.row_groups) > 1
    chunks = list(chunks_of(path))
    whole = path.read_bytes()
    in_pages = named = 0
    for byte, damaged in flipped(whole, 400):
        path.write_bytes(damaged)
        problems = verify(store).problems
        assert problems, f"byte {byte} of the shard"
        assert {p.file for p in problems} == {commit.shard.name}
        assert all(p.mend == ("commits/soft_targets/00000000.json",) for p in problems)
        if place := next(
            ((group, column) for start, end, group, column in chunks if start <= byte < end), None
        ):
            in_pages += 1
            found = place in {(p.row_group, p.column) for p in problems}
            named += found
            assert (
                found or "every page holds, so the damage is outside them" in problems[0].message
            ), place
    assert in_pages > 100
    assert (
        named > 0.8 * in_pages
    )  # the rest are page headers: no checksum covers them, the file's hash does
    path.write_bytes(whole)

    record = store.files.path("commits/soft_targets/00000000.json")
    for byte, damaged in flipped(record.read_bytes(), 400):
        record.write_bytes(damaged)
        (problem,) = verify(store).problems
        assert problem.file == problem.mend[0] == "commits/soft_targets/00000000.json", byte


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_shard(filled, keep):
    commit, path = shard_of(filled)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match=f"{commit.shard.name}: not a readable Parquet file"):
        filled.index("soft_targets", ["key"])
    problems = verify(filled).problems
    assert {problem.file for problem in problems} == {commit.shard.name}
    assert f"bytes, {commit.shard.bytes} were committed" in problems[0].message


def test_a_missing_shard(filled):
    commit, path = shard_of(filled, 1)
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{commit.shard.name}: the file is missing"):
        filled.index("soft_targets", ["key"])
    assert [(p.file, p.message) for p in verify(filled).problems] == [
        (commit.shard.name, "the file is missing")
    ]


def test_another_shard_in_its_place(filled):
    commit, path = shard_of(filled, 0)
    shutil.copy(shard_of(filled, 1)[1], path)
    messages = [p.message for p in verify(filled).problems if p.file == commit.shard.name]
    assert any("sha256" in message or "bytes" in message for message in messages)
    assert "the keys are not those of commits/soft_targets/00000000.json" in messages

    generations = filled.files.path(filled.commits("generations")[0].shard.name)
    shutil.copy(generations, path)
    with pytest.raises(
        IntegrityError, match="holds generations, which do not belong in this folder"
    ):
        filled.index("soft_targets", ["key"])
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(IntegrityError, match="not a shard"):
        filled.index("soft_targets", ["key"])
    assert not verify(filled).ok


def test_a_shard_of_another_format_version(filled):
    _, path = shard_of(filled)
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[METADATA_KEY]) | {"format_version": 4}
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), path)
    with pytest.raises(
        IntegrityError, match="format version 4, this Stillroom reads soft_targets up to version 3"
    ):
        filled.index("soft_targets", ["key"])


def test_foreign_files_are_notes(filled):
    foreign = [
        "data/soft_targets/ab/foreign.parquet",
        "data/soft_targets/.tmp-1",
        "commits/soft_targets/old.json",
    ]
    for name in foreign:
        filled.files.path(name).parent.mkdir(exist_ok=True)
        filled.files.path(name).write_bytes(b"x")
    report = verify(filled)
    assert report.ok
    assert sorted(note.split(":")[0] for note in report.notes) == sorted(foreign)
    assert filled.index("soft_targets", ["key"]).num_rows == 40


def test_a_forged_record(filled):
    name = "commits/soft_targets/00000003.json"
    path = filled.files.path(name)
    original = path.read_bytes()
    path.write_bytes(original.replace(b'"tokens": 48', b'"tokens": 49'))
    with pytest.raises(IntegrityError, match=f"{name}: the record was changed"):
        Store.open(filled.root).commits("soft_targets")
    assert [p.file for p in verify(filled).problems] == [name]

    record = unseal(original, name)
    path.write_bytes(seal(record | {"tokens": 49}))  # a forger who knows how to seal
    (problem,) = verify(filled).problems
    assert (problem.file, problem.message) == (
        record["shard"]["name"],
        "48 tokens, 49 were committed",
    )

    other = unseal(filled.files.read("commits/soft_targets/00000002.json"), name)
    path.write_bytes(seal(record | {"keys": other["keys"]}))
    problems = verify(filled).problems
    assert {p.column for p in problems} == {"key"}
    assert any("is in commit 2 already" in p.message for p in problems)

    for change, says in (
        ({"seq": 2}, "copied or renamed"),
        ({"format_version": 9}, "format version 9"),
    ):
        path.write_bytes(seal(record | change))
        with pytest.raises(IntegrityError, match=says):
            Store.open(filled.root).commits("soft_targets")
    path.write_bytes(seal(record | {"shard": record["shard"] | {"rows": 7}}))
    with pytest.raises(IntegrityError, match="row groups of 8 rows together, the shard has 7"):
        Store.open(filled.root).commits("soft_targets")
    path.write_bytes(seal({k: v for k, v in record.items() if k != "keys"}))
    with pytest.raises(IntegrityError, match="not a commit record"):
        Store.open(filled.root).commits("soft_targets")

    path.unlink()
    assert [(p.file, p.message) for p in verify(filled).problems] == [
        (name, "the record is missing, but later ones exist")
    ]


def test_a_damaged_withdrawal_stops_reading(filled):
    """Its rows may have been made again, so they do not come back with the next flipped bit."""
    filled.retire(filled.commits("soft_targets")[1], reason="test")
    name = "retired/soft_targets/00000001.json"
    filled.files.path(name).write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=name):
        Store.open(filled.root).commits("soft_targets")
    report = verify(filled)
    assert [p.file for p in report.problems] == [name]
    assert report.tables["soft_targets"].rows == 32


def test_damaged_inputs_and_snapshots(filled, samples):
    inputs = pa.table(
        {
            "key": [b"k" * 16],
            "prompt_key": [b"p" * 16],
            "split": ["train"],
            "windows": [None],
            "first": [True],
        }
    )
    filled.put_inputs(
        "d",
        inputs.cast(
            pa.schema(
                [
                    ("key", pa.binary(16)),
                    ("prompt_key", pa.binary(16)),
                    ("split", pa.string()),
                    ("windows", pa.int32()),
                    ("first", pa.bool_()),
                ]
            )
        ),
        {},
    )
    commit, path = shard_of(filled)
    snapshot = make_snapshot(filled, "soft_targets", {commit.shard.sha256: [0, 1]}, {})
    save_snapshot(filled, snapshot)
    assert verify(filled).ok

    record = filled.files.path("inputs/d.json")
    shard = filled.files.path(json.loads(record.read_bytes())["shard"]["name"])
    samples.flip(shard, "split")
    with pytest.raises(IntegrityError, match="column split, row group 0"):
        filled.inputs("d")
    record.write_bytes(record.read_bytes().replace(b'"d"', b'"e"'))
    path.unlink()
    kept = filled.files.path(f"snapshots/{snapshot.id}.json")
    assert {p.file for p in verify(filled).problems} == {
        "inputs/d.json",
        commit.shard.name,
        kept.relative_to(filled.root).as_posix(),
    }
    kept.write_bytes(b"")
    assert kept.relative_to(filled.root).as_posix() in {p.file for p in verify(filled).problems}


@pytest.mark.parametrize(
    ("column", "change", "says"),
    [
        (
            "token_ids",
            lambda row: np.roll(row["token_ids"], 1),
            "disagree with the entries about the token that follows",
        ),
        (
            "token_logprob",
            lambda row: np.roll(row["token_logprob"], 1),
            "disagree with the entries",
        ),
        ("token_ids", lambda row: row["token_ids"] + 50, "outside the vocabulary of 50"),
        ("ids", lambda row: row["ids"] * 0, "an id stands twice"),
        ("ids", lambda row: row["ids"] + 50, "an entry is outside the vocabulary"),
        ("logprobs", lambda row: row["logprobs"][::-1].copy(), "not in descending order"),
        ("logprobs", lambda row: row["logprobs"] - 0.1, "miss a sum of 1"),
        ("logprobs", lambda row: row["logprobs"] * 0 + 0.1, "above 0"),
        ("tail_logprob", lambda row: row["tail_logprob"] * 0, "miss a sum of 1"),
        ("entropy", lambda row: row["entropy"] + 5, "outside 0 to log"),
        ("entropy", lambda row: row["entropy"] - 5, "outside 0 to log"),
        ("kept_mass", lambda row: 0.1, "says 0.1000, the entries hold"),
    ],
)
def test_verify_doubts_numbers_that_cannot_be(store, samples, column, change, says):
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        for index in range(4):
            row = samples.target_row(index)
            writer.add({**row, column: change(row)} if index > 1 else row)
    problems = verify(store).problems
    found = [p for p in problems if says in p.message]
    assert found, problems
    assert "row 2 (" in found[0].message
    assert "(and 1 more)" in found[0].message
    assert found[0].row_group == 0


def test_verify_finds_a_row_whose_shape_is_wrong(filled):
    """A shard made by other hands: nothing refused its rows when it was written."""
    name = "commits/soft_targets/00000000.json"
    record = unseal(filled.files.read(name), name)
    table = pq.read_table(filled.files.path(record["shard"]["name"]))
    starts = pa.array([0] * 8, pa.int32())
    table = table.set_column(
        table.column_names.index("span_start"), SCHEMAS["soft_targets"].field("span_start"), starts
    )
    shard = filled.files.put_content(
        "data/soft_targets",
        lambda path: pq.write_table(table, path, **encodings(table.schema)),
        suffix=".parquet",
    )
    new = record["shard"] | {"name": shard.name, "sha256": shard.sha256, "bytes": shard.bytes}
    filled.files.path(name).write_bytes(seal(record | {"shard": new}))
    (problem,) = verify(filled).problems
    assert problem.file == shard.name
    assert "the one at 0 starts before 1" in problem.message
    assert "(and 7 more)" in problem.message
