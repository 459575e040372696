"""Read-only sources: a published folder is the store it came from, as far as it goes.

Several stores are read as one.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from published import HELD_OUT, ROWS, TEACHER, make_store, samples, snapshots_of

from stillroom.pipeline.publish.export import PublishRequest, export
from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.files.base import file_sha256
from stillroom.storage.files.opening import open_files
from stillroom.storage.integrity.checked import Memory, check_file, files_of
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.joined import Joined, Source, at_commit, open_store
from stillroom.storage.published import export_files
from stillroom.storage.published.choice import Choice
from stillroom.storage.published.folder import Published
from stillroom.storage.snapshots.reader import SnapshotReader
from stillroom.storage.snapshots.snapshot import load_snapshot, make_snapshot, save_snapshot
from stillroom.storage.store.index import Index
from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store
from stillroom.storage.tables.spans import spans_of

COLUMNS = ["key", "token_ids", "ids", "logprobs"]


def published(store, folder, **choice):
    asked = PublishRequest(store=str(store.root), license="cc0-1.0", choice=Choice(**choice))
    export(asked, folder, say=lambda text: None)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store whose shards have several row groups, and what was published of it.

    Some rows are left out.
    """
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stillroom.storage.tables.shard.ROW_GROUP_BYTES", 1200)
        store = make_store(folder / "store", commit_rows=5)
    snapshots = snapshots_of(store, left_out=(0, 6, 7, 13))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_files, "ROW_GROUP_BYTES", 4000)
        published(store, folder / "out")
    return store, snapshots, folder / "out"


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[2], tmp_path / "copy")


def contents(folder: Path) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def places_of(snapshot):
    return {shard.sha256: shard.rows for shard in snapshot.shards}


def order(store, snapshot, **how):
    reader = SnapshotReader(store, snapshot, COLUMNS)
    rows = reader.samples(stop=3 * snapshot.rows, **how)
    return [
        (row["key"], *(None if row[name] is None else row[name].tobytes() for name in COLUMNS[1:]))
        for row in rows
    ]


def test_the_same_choice_is_the_same_snapshot_in_the_same_order(made, tmp_path):
    store, snapshots, folder = made
    joined = open_store(tmp_path / "new", [str(folder)])
    assert not (tmp_path / "new").exists()
    for snapshot in snapshots.values():
        again = make_snapshot(joined, "soft_targets", places_of(snapshot), {})
        assert again.id == snapshot.id
        assert max(len(shard.row_groups) for shard in again.shards) > 1
        for seed in (0, 1):
            assert order(joined, again, seed=seed) == order(store, snapshot, seed=seed)
    assert order(store, snapshots["train"], seed=0) != order(store, snapshots["train"], seed=1)
    assert load_snapshot(joined, snapshots["train"].id).rows == ROWS - HELD_OUT - 4


def test_a_row_that_was_not_published_is_not_there(made, tmp_path):
    store, _, folder = made
    joined = open_store(tmp_path / "new", [str(folder)])
    first = next(iter(store.commits("soft_targets"))).shard.sha256
    with pytest.raises(IntegrityError, match="row 0 was asked for and was not published"):
        list(joined.rows("soft_targets", {first: [0]}))
    found = joined.index("soft_targets", ["key"])
    assert found.num_rows == ROWS - 4
    for row in found.to_pylist():
        ((again),) = joined.rows("soft_targets", {row["shard"]: [row["row"]]}, ["key"])
        assert again["key"] == row["key"]
        ((original),) = store.rows("soft_targets", {row["shard"]: [row["row"]]}, ["key"])
        assert original["key"] == row["key"]


def test_rows_of_a_source_are_checked_in_the_files_that_hold_them(made, tmp_path):
    store, snapshots, folder = made
    copy = shutil.copytree(folder, tmp_path / "copy")
    files = files_of(open_store(tmp_path / "new", [str(copy)]), snapshots["train"])
    assert {Path(file.name).name.split("-")[0] for file in files} == {"train"}
    memory = Memory(None)
    rows = sum(check_file(file, "soft_targets", memory)[0].rows for file in files)
    assert rows == snapshots["train"].rows < sum(s.rows for s in store.shards("soft_targets"))
    path = Path(files[0].files.path(files[0].name))
    path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    with pytest.raises(IntegrityError, match=files[0].name):
        check_file(files[0], "soft_targets", memory)


def test_the_index_names_each_row_by_its_place(made, tmp_path):
    _, _, folder = made
    joined = open_store(tmp_path / "new", [str(folder)])
    index = Index(joined)
    try:
        for table in ("soft_targets", "generations"):
            rows = index.rows(f"SELECT place, tokens_key::BLOB FROM {table}")
            assert len(rows) == ROWS - 4
            for place, key in rows:
                sha256 = index.commits[table][place >> 32].shard.sha256
                ((row),) = joined.rows(table, {sha256: [place & 0xFFFFFFFF]}, ["tokens_key"])
                assert row["tokens_key"] == key
    finally:
        index.close()


def test_rows_that_were_cut_on_their_way_out_train_in_an_order_of_their_own(made, tmp_path):
    store, snapshots, _ = made
    joined = open_store(tmp_path / "new", [str(published(store, tmp_path / "cut", min_k=2))])
    source = joined.parts[1][0]
    assert not any(split.whole for split in source.manifest.splits.values())
    rows = joined.index("soft_targets", ["key", "k"])
    train = [row for row in rows.to_pylist() if row["k"] == 2]
    places = {}
    for row in train:
        places.setdefault(row["shard"], []).append(row["row"])
    snapshot = make_snapshot(joined, "soft_targets", places, {})
    assert snapshot.id not in {s.id for s in snapshots.values()}
    found = order(joined, snapshot, seed=0)
    assert {key for key, *_ in found} == {row["key"] for row in train}


def test_a_snapshot_of_a_source_is_not_the_stores_to_prove(made, tmp_path):
    _, snapshots, folder = made
    own = Store.open(tmp_path / "new", create=True)
    joined = open_store(own.root, [str(folder)])
    snapshot = make_snapshot(joined, "soft_targets", places_of(snapshots["train"]), {})
    save_snapshot(own, snapshot)
    kept = json.loads((own.root / "snapshots" / f"{snapshot.id}.json").read_text())
    assert {shard["source"] for shard in kept["shards"]} == {
        f"{folder}/{joined.parts[1][0].manifest.version}"
    }
    assert verify(own).ok
    assert not vacuum(own, older_than_hours=0.0).files
    assert order(joined, load_snapshot(own, snapshot.id), seed=0) == order(joined, snapshot, seed=0)


def test_nothing_is_written_into_a_source(made, tmp_path):
    store, snapshots, folder = made
    before = contents(folder) | contents(store.root)
    own = Store.open(tmp_path / "new", create=True)
    joined = open_store(own.root, [str(folder), str(store.root)])
    Index(joined, write=True).close()
    with joined.writer("prompts", about={}) as writer:
        writer.add(samples.prompt_row(99))
    save_snapshot(joined, make_snapshot(joined, "soft_targets", places_of(snapshots["test"]), {}))
    query(joined, "SELECT count(*) FROM generations")
    assert contents(folder) | contents(store.root) == before
    assert Store.open(own.root).index("prompts", ["key"]).num_rows == 1
    assert joined.index("prompts", ["key"]).num_rows == ROWS + 1


def test_rows_that_several_have_count_once(tmp_path):
    """Own rows first; a copy of a shard, or of a row in another shard, adds nothing to a plan."""
    first = make_store(tmp_path / "first", rows=12)
    shutil.copytree(first.root, tmp_path / "second")
    other = make_store(tmp_path / "other", rows=12, commit_rows=5)
    joined = open_store(first.root, [str(tmp_path / "second"), str(other.root)])
    assert len(joined.commits("generations")) == len(first.commits("generations")) + len(
        other.commits("generations")
    )
    index = Index(joined)
    try:
        for table in ("prompts", "generations"):
            assert index.rows(
                f"SELECT count(*), count(DISTINCT key), max(place) >> 32 FROM {table}"
            ) == [(12, 12, 1)]
    finally:
        index.close()
    sha256 = other.commits("soft_targets")[0].shard.sha256
    assert joined.source_of("soft_targets", sha256) == str(other.root)
    assert joined.source_of("soft_targets", first.commits("soft_targets")[0].shard.sha256) == ""


def test_sql_sees_all_of_them(made, tmp_path):
    store, _, folder = made
    joined = open_store(tmp_path / "new", [str(folder)])
    rows = query(
        joined, "SELECT key, text FROM generations WHERE row_seed % 2 = 1 ORDER BY key"
    ).to_pylist()
    assert rows == [
        row
        for row in query(
            store, "SELECT key, text FROM generations WHERE row_seed % 2 = 1 ORDER BY key"
        ).to_pylist()
        if row["key"]
        in {found["key"] for found in joined.index("generations", ["key"]).to_pylist()}
    ]
    assert len(rows) > 5
    with pytest.raises(UsageError, match="query: "):
        query(joined, f"SELECT * FROM read_parquet('{store.root}/data/prompts/*/*.parquet')")


@pytest.mark.parametrize(
    "which", ["soft_targets/train", "generations/test", "snapshots/", "teachers/"]
)
def test_damage_is_found_at_first_use_and_named(copy, tmp_path, which):
    file = next(path for path in sorted(copy.rglob("*")) if which in str(path) and path.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    joined = open_store(tmp_path / "new", [str(copy)])
    with pytest.raises(IntegrityError, match=f"{file.name}: the file is damaged"):
        joined.prove(file_sha256)


def test_a_file_that_is_cut_short_or_missing_is_named(copy, tmp_path):
    file = next(copy.rglob("soft_targets/train-*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=f"{file.name}: .* bytes, MANIFEST.json says"):
        open_store(tmp_path / "new", [str(copy)])
    file.unlink()
    with pytest.raises(IntegrityError, match=f"{file.name}: the file is missing"):
        open_store(tmp_path / "new", [str(copy)])


def test_a_page_that_changed_after_the_first_use_is_found_while_reading(made, copy, tmp_path):
    _, snapshots, _ = made
    joined = open_store(tmp_path / "new", [str(copy)])
    snapshot = make_snapshot(joined, "soft_targets", places_of(snapshots["train"]), {})
    file = next(copy.rglob("soft_targets/train-*"))
    group = pq.ParquetFile(file).metadata.row_group(0)
    column = next(
        c
        for i in range(group.num_columns)
        if (c := group.column(i)).path_in_schema.startswith("logprobs")
    )
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 9] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(
        IntegrityError, match=f"{file.name}: column logprobs, row group 0 is damaged"
    ):
        order(joined, snapshot, seed=0)


def test_a_manifest_that_was_changed_is_refused(copy, tmp_path):
    manifest = next(copy.rglob("MANIFEST.json"))
    manifest.write_text(manifest.read_text().replace('"rows": 16', '"rows": 15', 1))
    with pytest.raises(IntegrityError, match=r"MANIFEST[.]json: the record was changed"):
        open_store(tmp_path / "new", [str(copy)])


def test_what_is_no_source_is_refused_by_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("notes")
    for name, what in (
        ("folder", "neither STORE.json nor README.md"),
        ("nothing", "nothing is there"),
    ):
        with pytest.raises(
            UsageError,
            match=f"storage.sources: .*{name} is no store and no published folder.*{what}",
        ):
            open_store(tmp_path / "new", [str(tmp_path / name)])
    with pytest.raises(UsageError, match="hf://datasets/USER/NAME"):
        open_store(tmp_path / "new", ["hf://models/a/b"])


def test_a_dataset_of_the_hub_is_read_from_its_commit(made, tmp_path, monkeypatch):
    """The cache as huggingface_hub keeps it; the commit is what is recorded."""
    _, snapshots, folder = made
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    repo = cache / "datasets--alice--targets"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob, link = (
            repo / "blobs" / file_sha256(path),
            repo / "snapshots" / commit / path.relative_to(folder),
        )
        for made_folder in (blob.parent, link.parent):
            made_folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for name in ("hf://datasets/alice/targets", f"hf://datasets/alice/targets@{commit}"):
        joined = open_store(tmp_path / "new", [name], update=True)
        snapshot = make_snapshot(joined, "soft_targets", places_of(snapshots["train"]), {})
        assert snapshot.id == snapshots["train"].id
        assert len(order(joined, snapshot, seed=0)) == 3 * snapshot.rows
        assert query(joined, "SELECT key FROM generations").num_rows == ROWS - 4
        joined.prove(file_sha256)
        version = joined.parts[1][0].manifest.version
        assert {shard.source for shard in snapshot.shards} == {
            f"hf://datasets/alice/targets@{commit}/{version}"
        }
    # Another process downloads a newer commit: who is told what was opened reads that one still.
    newer = "f" * 40
    shutil.copytree(repo / "snapshots" / commit, repo / "snapshots" / newer, symlinks=True)
    (repo / "refs" / "main").write_text(newer)
    names = ["hf://datasets/alice/targets", str(folder)]
    pinned = {
        names[0]: f"hf://datasets/alice/targets@{commit}/{version}",
        names[1]: f"{folder}/{version}",
    }
    again = open_store(tmp_path / "new", at_commit(names, pinned))
    assert [*again.pinned.values()] == [*pinned.values()]
    assert at_commit(names, {}) == names
    with pytest.raises(UsageError, match="hf://datasets/alice/others could not be downloaded"):
        open_store(tmp_path / "new", ["hf://datasets/alice/others"], update=True)


def test_sources_may_lie_on_an_object_store(made, s3, tmp_path):
    """A store and a published folder in a bucket, beside a local store."""
    store, snapshots, folder = made
    places = {f"{s3.root}/whole": Path(store.root), f"{s3.root}/published": folder}
    for root, local in places.items():
        files = open_files(root)
        for path in sorted(local.rglob("*")):
            if path.is_file():
                files.put_if_absent(str(path.relative_to(local)), path.read_bytes())
    sql = "SELECT count(*) AS n, count(DISTINCT key) AS keys FROM generations"
    for roots, rows, keys in (
        ([*places], 2 * ROWS - 4, ROWS),
        ([f"{s3.root}/published"], ROWS - 4, ROWS - 4),
    ):
        joined = open_store(tmp_path / "own", roots)
        joined.prove(file_sha256)
        snapshot = make_snapshot(joined, "soft_targets", places_of(snapshots["train"]), {})
        assert snapshot.id == snapshots["train"].id
        assert order(joined, snapshot, seed=0) == order(store, snapshots["train"], seed=0)
        assert query(joined, sql).to_pylist() == [{"n": rows, "keys": keys}]
        index = Index(joined)
        assert index.rows("SELECT count(*) FROM generations") == [(keys,)]
        index.close()
        assert joined.teacher_dir(TEACHER).joinpath("tokenizer.json").is_file()


def test_black_box_rows_are_published_and_read_alike(tmp_path):
    store = make_store(tmp_path / "store")
    index = store.index("generations", ["key"])
    places = {}
    for row in index.to_pylist()[3:]:
        places.setdefault(row["shard"], []).append(row["row"])
    snapshot = make_snapshot(store, "generations", places, {"split": "train"})
    save_snapshot(store, snapshot)
    joined = open_store(tmp_path / "new", [str(published(store, tmp_path / "out"))])
    assert joined.parts[1][0].table == "generations"
    again = make_snapshot(joined, "generations", places, {})
    assert again.id == snapshot.id
    columns = ["key", "token_ids"]
    readers = [SnapshotReader(s, snapshot, columns) for s in (store, joined)]
    ours, theirs = ([row["key"] for row in reader.samples(seed=0, stop=40)] for reader in readers)
    assert ours == theirs
    assert {row["key"] for row in joined.index("generations", ["key"]).to_pylist()} == set(ours)
    samples_of = joined.parts[1][0].samples()
    rows = list(store.rows("generations", places))
    assert samples_of["tokens"].to_pylist() == [len(row["token_ids"]) for row in rows]
    assert samples_of["scored"].to_pylist() == [int(spans_of(row)[:, 1].sum()) for row in rows]


def test_samples_are_told_by_split(made):
    store, snapshots, folder = made
    found = Published.open_folder(folder).samples()
    rows = [
        row
        for split in ("train", "test")
        for row in store.rows("soft_targets", places_of(snapshots[split]))
    ]
    assert found["key"].to_pylist() == [row["generation_key"] for row in rows]
    assert found["tokens"].to_pylist() == [len(row["token_ids"]) for row in rows]
    assert found["scored"].to_pylist() == [row["span_tokens"] for row in rows]
    assert found.num_rows == sum(snapshot.rows for snapshot in snapshots.values())
    assert sum(found["held_out"].to_pylist()) == HELD_OUT


def test_a_store_without_sources_is_itself(tmp_path):
    store = make_store(tmp_path / "store", rows=6)
    assert not isinstance(open_store(store.root), Joined)
    assert Source.open(str(store.root)).pinned == str(store.root)
