"""What leaves a store: which rows, in which order, cut how; and the Parquet files they leave in."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planting import unchecked_writer
from published import (
    HELD_OUT,
    ROWS,
    TEACHER,
    generation_row,
    make_store,
    samples,
    snapshots_of,
    target_row,
)

from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.keys import seal
from stillroom.storage.published import export_files
from stillroom.storage.published.choice import Choice
from stillroom.storage.published.export import make_tables
from stillroom.storage.published.export_numbers import Lengths, Spread
from stillroom.storage.published.export_rows import (
    JOINED,
    OF_SOME,
    PUBLISHED,
    chosen_columns,
    columns_of_some,
    cut,
    cut_row,
    generations_of,
    sources_of,
)
from stillroom.storage.published.manifest import (
    Manifest,
    PublishedFile,
    current_version,
    damaged_files,
    read_manifest,
)
from stillroom.storage.published.selection import find_snapshots
from stillroom.storage.snapshots.snapshot import make_snapshot, save_snapshot
from stillroom.storage.tables.rows import Rows
from stillroom.storage.tables.schema import KEY, SCHEMAS
from stillroom.storage.tables.soft_targets import SoftTargets, log_total

TRAIN = ROWS - HELD_OUT


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("export") / "store")
    return store, snapshots_of(store, left_out=(0, 5, 11))


def exported(store, snapshots, folder, **choice):
    """What was made, and the rows of each table's split in file order."""
    folder.mkdir()
    made = make_tables(store, snapshots, folder, Choice(**choice))
    files = sorted(made.files.items(), key=lambda pair: pair[1].name)
    rows = {}
    for path, file in files:
        read = pq.read_table(path, page_checksum_verification=True)
        rows.setdefault((file.table, file.split), []).extend(
            Rows(read)[n] for n in range(read.num_rows)
        )
    return made, rows


def same(found, expected):
    """Whether a row of a file is one of the store.

    Where no row of a file has an image, it has no such column.
    """
    for name, value in expected.items():
        if name == "image" and value is None:
            assert found.get(name) is None
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value, name


def test_an_export_that_needs_more_than_it_may_hold_says_so(published, monkeypatch):
    store, _ = published
    monkeypatch.setenv("STILLROOM_SQL_MEMORY", "30MB")
    monkeypatch.setenv("STILLROOM_SQL_DISK", "1MB")
    random = np.random.default_rng(0).bytes(16 * 2**21)
    keys = pa.FixedSizeBinaryArray.from_buffers(KEY, 2**21, [None, pa.py_buffer(random)])
    says = "^export: .*STILLROOM_SQL_MEMORY and STILLROOM_SQL_DISK say how much"
    for ask in (columns_of_some, sources_of, lambda *asked: list(generations_of(*asked))):
        with pytest.raises(UsageError, match=says):
            ask(store, keys)


def test_rows_are_those_of_the_snapshot_in_its_order(published, tmp_path):
    store, snapshots = published
    made, rows = exported(store, snapshots, tmp_path / "out")
    for split, snapshot in snapshots.items():
        places = {shard.sha256: shard.rows for shard in snapshot.shards}
        expected = list(store.rows("soft_targets", places))
        assert len(expected) == snapshot.rows == made.splits[split].rows
        for found, row in zip(rows["soft_targets", split], expected, strict=True):
            same(found, row)
        named = [row["generation_key"] for row in expected]
        assert [row["key"] for row in rows["generations", split]] == named
        assert made.splits[split].whole
        assert made.splits[split].scored_tokens == sum(row["span_tokens"] for row in expected)
        assert made.splits[split].tokens == sum(len(row["token_ids"]) for row in expected)
    assert [row["prompt_key"] for row in rows["generations", "train"]] != sorted(
        row["prompt_key"] for row in rows["generations", "train"]
    )


def test_a_generation_brings_its_prompt_and_not_where_it_was_read(published, tmp_path):
    store, snapshots = published
    _, rows = exported(store, snapshots, tmp_path / "out")
    for row in rows["generations", "train"]:
        number = row["row_seed"]  # of these tests: the prompt's number
        assert row["messages"] == [{"role": "user", "content": f"prompt {number}"}]
        assert row["text"] == f"text {number} of the teacher"
        assert row["prompt"] is None
    assert "source" not in PUBLISHED["generations"].names
    assert not set(JOINED.names) & set(SCHEMAS["generations"].names)


class TestColumnsOfSome:
    """What only some conversations have is published where a row has it."""

    @staticmethod
    def columns(published, folder, **choice):
        made, rows = exported(*published, folder, **choice)
        assert made.tables["generations"]["complete"] == ("columns" not in choice)
        (first, *_) = rows["generations", "train"]
        return made.tables["generations"]["columns"], first

    def test_those_that_rows_have_go_along(self, published, tmp_path):
        names, _ = self.columns(published, tmp_path / "out")
        absent = {"completion_fields", "answer", "labels"}  # of given answers and of words
        assert set(names) == set(PUBLISHED["generations"].names) - absent
        _, rows = exported(*published, tmp_path / "again")
        found = [row for row in rows["generations", "train"] if row["tools"]]
        assert found
        for row in found:
            same(row, samples.FIELDS)

    def test_plain_conversations_have_none(self, published, tmp_path):
        names, _ = self.columns(published, tmp_path / "out", where="row_seed % 3 <> 1")
        assert names == [n for n in PUBLISHED["generations"].names if n not in OF_SOME]

    def test_one_that_is_asked_for_goes_along_whatever_is_in_it(self, published, tmp_path):
        names, row = self.columns(
            published, tmp_path / "out", columns=("completion_fields", "soft_targets.key")
        )
        assert names == ["key", "completion_fields"]
        assert row["completion_fields"] is None


def test_the_first_by_key_stands_for_prompts_that_differ_in_the_reference(published, tmp_path):
    store, snapshots = (make_store(tmp_path / "store", rows=6), None)
    with store.writer("prompts", about=samples.GENERATIONS_ABOUT) as writer:
        for number in range(3):
            row = samples.prompt_row(0) | {
                "key": bytes([number]) * 16,
                "messages": None,
                "text": "p",
                "format": "prompt",
            }
            writer.add(row | {"reference": f"answer {number}"})
    snapshots = snapshots_of(store, held_out=2)
    _, rows = exported(store, snapshots, tmp_path / "out")
    assert rows["generations", "train"][0]["reference"] == "answer 0"
    assert len(rows["generations", "train"]) == 4


def test_a_document_is_not_repeated_as_the_prompt_of_its_windows(tmp_path):
    store = make_store(tmp_path / "store", rows=6)
    key = b"d" * 16
    with store.writer("prompts", about=samples.GENERATIONS_ABOUT) as writer:
        row = samples.prompt_row(0) | {
            "key": key,
            "prompt_key": key,
            "messages": None,
            "text": "long",
            "format": "text",
        }
        writer.add(row)
    given = samples.generation_row(0) | {
        "key": key,
        "prompt_key": key,
        "source_key": key,
        "finish_reason": "given",
    }
    with store.writer("generations", about=samples.GENERATIONS_ABOUT) as writer:
        writer.add(given)
    index = store.index("generations", ["key"])
    places = {
        shard: [row]
        for shard, row, k in zip(
            *(index[c].to_pylist() for c in ("shard", "row", "key")), strict=True
        )
        if k == key
    }
    snapshot = make_snapshot(store, "generations", places, {"split": "train"})
    made, rows = exported(store, {"train": snapshot}, tmp_path / "out")
    (found,) = rows["generations", "train"]
    assert (found["prompt"], found["messages"]) == (None, None)
    assert list(made.tables) == ["generations"]
    assert made.splits["train"].table == "generations"


def test_equal_rows_and_choices_give_equal_bytes(published, tmp_path):
    store, snapshots = published
    one, _ = exported(store, snapshots, tmp_path / "one")
    two, _ = exported(store, snapshots, tmp_path / "two")
    assert [f for f in one.files.values()] == [f for f in two.files.values()]


def test_how_the_store_was_committed_does_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(export_files, "ROW_GROUP_BYTES", 600)
    files = []
    for commit_rows in (3, 100):
        store = make_store(tmp_path / f"by-{commit_rows}", commit_rows=commit_rows)
        made, _ = exported(store, snapshots_of(store), tmp_path / f"out-{commit_rows}")
        files.append([(f.name, f.sha256, f.row_groups) for f in made.files.values()])
    assert files[0] == files[1]


class TestFiles:
    """What viewers and other readers ask of the files."""

    def test_the_bounds_are_within_those_of_the_hubs_viewer(self):
        """It recommends row groups of 100 to 300 MB of Arrow memory and files below 500 MB."""
        assert export_files.ROW_GROUP_BYTES <= 100_000_000
        assert export_files.FILE_BYTES + export_files.ROW_GROUP_BYTES <= 500_000_000

    def test_row_groups_and_files_are_bounded_and_lose_nothing(
        self, published, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(export_files, "ROW_GROUP_BYTES", 900)
        monkeypatch.setattr(export_files, "FILE_BYTES", 12_000)
        store, snapshots = published
        made, rows = exported(store, snapshots, tmp_path / "out")
        train = [
            (path, f)
            for path, f in made.files.items()
            if (f.table, f.split) == ("soft_targets", "train")
        ]
        assert len(train) > 1
        assert [f.name for _, f in train] == [
            f"soft_targets/train-{n:05d}-of-{len(train):05d}.parquet" for n in range(len(train))
        ]
        for path, file in train:
            opened = pq.ParquetFile(path)
            groups = [opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups)]
            assert tuple(groups) == file.row_groups
            assert sum(groups) == file.rows
            for number, count in enumerate(groups):
                sizes = export_files.row_sizes(opened.read_row_group(number))
                assert count == 1 or sizes.sum() <= 900
            assert file.tokens == sum(opened.read()["span_tokens"].to_pylist())
        places = {shard.sha256: shard.rows for shard in snapshots["train"].shards}
        keys = [row["key"] for row in store.rows("soft_targets", places, ["key"])]
        assert [row["key"] for row in rows["soft_targets", "train"]] == keys

    def test_they_have_page_index_checksums_and_the_stores_encodings(self, published, tmp_path):
        store, snapshots = published
        made, _ = exported(store, snapshots, tmp_path / "out")
        for path, file in made.files.items():
            metadata = pq.ParquetFile(path).metadata
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                columns = {
                    group.column(i).path_in_schema: group.column(i)
                    for i in range(group.num_columns)
                }
                assert all(column.has_offset_index for column in columns.values())
                assert columns["key"].has_column_index
                assert {column.compression for column in columns.values()} == {"ZSTD"}
                assert columns["token_ids.list.element"].encodings[-1] != "PLAIN"
                assert "DELTA_BINARY_PACKED" in columns["token_ids.list.element"].encodings
                if file.table == "soft_targets":
                    assert "BYTE_STREAM_SPLIT" in columns["logprobs.list.element"].encodings

    def test_a_flipped_bit_is_found_by_its_page(self, published, tmp_path):
        store, snapshots = published
        made, _ = exported(store, snapshots, tmp_path / "out")
        path = next(path for path, f in made.files.items() if f.table == "soft_targets")
        samples.flip(path, "logprobs")
        with pytest.raises(OSError, match="CRC"):
            pq.read_table(path, page_checksum_verification=True)

    def test_pages_end_where_the_content_says_so(self, tmp_path):
        """A row more at the beginning moves few pages.

        Most of a second version's bytes are those of the first.
        """
        import pyarrow as pa

        rng = np.random.default_rng(0)
        ids = rng.integers(0, 50_000, (400, 6000), dtype=np.int32)
        pages = []
        for skipped in (0, 1):
            folder = tmp_path / str(skipped)
            folder.mkdir()
            lists = pa.array(list(ids[skipped:]), pa.list_(pa.int32()))
            rows = pa.table(
                {
                    "key": pa.array([bytes(16)] * len(lists), pa.binary(16)),
                    "token_ids": lists,
                    "n": [1] * len(lists),
                }
            )
            schema = pa.schema([("key", pa.binary(16)), ("token_ids", pa.list_(pa.int32()))])
            files = export_files.TableFiles(folder, schema=schema, about={}, counted="n")
            files.add(rows)
            files.close()
            data = files.paths[0].read_bytes()
            pages.append({data[at : at + 4096] for at in content_starts(data)})
        assert len(pages[0] & pages[1]) > 0.6 * len(pages[0])

    def test_row_sizes_are_arrows_own(self, published, tmp_path):
        store, snapshots = published
        made, _ = exported(store, snapshots, tmp_path / "out")
        for path in made.files:
            table = pq.read_table(path)
            sizes = export_files.row_sizes(table)
            assert len(sizes) == table.num_rows
            assert 0.8 * table.nbytes < sizes.sum() <= 1.2 * table.nbytes


def content_starts(data: bytes) -> list[int]:
    """Where zstd frames begin: each page is one."""
    magic, found, at = b"\x28\xb5\x2f\xfd", [], 0
    while (at := data.find(magic, at)) >= 0:
        found.append(at)
        at += 4
    return found


class TestCut:
    @pytest.mark.parametrize("kind", ["topk", "topp", "tempered"])
    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_it_is_what_a_smaller_k_would_have_stored(self, kind, k):
        for index in range(20):
            found = cut_row(samples.target_row(index, k=6, kind=kind), k)
            expected = samples.target_row(index, k=k, kind=kind)
            if kind != "topk":
                expected["k_min"] = min(samples.K_MIN, k)
                if k < samples.K_MIN:
                    continue  # of these tests: two at least are stored
            for name in ("k", "ids", "entries", "temperatures", "kind", "p", "k_min"):
                same(found, {name: expected[name]})
            for name in ("logprobs", "token_logprob", "entropy"):
                np.testing.assert_array_equal(found[name], expected[name])
            for name in ("tail_logprob", "tempered_tails"):
                if (
                    expected[name] is not None
                ):  # rounded twice: each stored number by 2**-11 of itself
                    np.testing.assert_allclose(
                        np.exp(found[name]), np.exp(expected[name]), rtol=1e-2, atol=1e-6
                    )
            assert found["key"] != samples.target_key(index)
            assert found["reuse_key"] == expected["reuse_key"]

    @pytest.mark.parametrize("k", [1, 7, 49, 50])
    def test_whole_distributions_become_entries_and_a_tail(self, k):
        row = samples.target_row(3, kind="full")
        targets = SoftTargets.from_row(row)
        found = cut_row(row, k)
        logprobs = targets.logprobs.astype(np.float64)
        if k == 50:
            assert found == row
            return
        order = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(found["ids"], order.reshape(-1))
        best = np.take_along_axis(logprobs, order, axis=1)
        rest = np.exp(logprobs).sum(axis=1) - np.exp(best).sum(axis=1)
        np.testing.assert_allclose(
            np.exp(found["tail_logprob"].astype(np.float64)), rest, rtol=5e-3, atol=1e-6
        )
        assert (found["kind"], found["k"]) == ("topk", k)
        made = SoftTargets.from_row(found)
        np.testing.assert_allclose(
            np.exp(log_total(made.logprobs, made.tail_logprob)), 1.0, atol=2e-3
        )

    def test_the_tail_is_exact_before_it_is_rounded(self):
        exact = SoftTargets.from_row(samples.target_row(1, k=8))
        found = cut(exact, 3)
        whole = np.exp(exact.tail_logprob.astype(np.float64)) + np.exp(
            exact.logprobs[:, 3:].astype(np.float64)
        ).sum(1)
        np.testing.assert_allclose(np.exp(found.tail_logprob.astype(np.float64)), whole, rtol=1e-6)

    def test_rows_with_fewer_entries_stay_at_home(self, tmp_path):
        store = make_store(tmp_path / "store", kind="topk")
        with store.writer(
            "soft_targets", about=samples.ABOUT | {"head": "lm", "class_names": None}
        ) as writer:
            for index in range(100, 104):
                writer.add(
                    samples.target_row(index, k=3)
                    | {"generation_key": samples.generation_row(index - 100)["key"]}
                )
        snapshots = {"train": snapshots_of(store, held_out=0)["train"]}
        made, rows = exported(store, snapshots, tmp_path / "out", min_k=4)
        assert len(rows["soft_targets", "train"]) == ROWS
        assert {row["k"] for row in rows["soft_targets", "train"]} == {4}
        assert made.splits["train"].whole is False
        for row in rows["soft_targets", "train"]:
            cut = SoftTargets.from_row(row)
            total = log_total(cut.logprobs, cut.tail_logprob)
            np.testing.assert_allclose(total, 0.0, atol=4e-3)

    def test_draws_cannot_be_cut(self, tmp_path):
        store = make_store(tmp_path / "store", kind="sampled")
        with pytest.raises(UsageError, match="draws cannot be cut"):
            exported(store, snapshots_of(store), tmp_path / "out", min_k=2)


class TestChoice:
    def test_where_chooses_generations_and_their_targets(self, published, tmp_path):
        store, snapshots = published
        made, rows = exported(
            store, snapshots, tmp_path / "out", where="row_seed % 2 = 0 AND length(text) > 3"
        )
        kept = [row["row_seed"] for row in rows["generations", "train"]]
        assert kept == [
            number for number in range(TRAIN) if number not in (0, 5, 11) and number % 2 == 0
        ]
        names = [row["key"] for row in rows["generations", "train"]]
        assert [row["generation_key"] for row in rows["soft_targets", "train"]] == names
        assert made.splits["train"].whole is False

    @pytest.mark.parametrize("where", ["colour = 1", "true; DROP TABLE generations", "text LIKE"])
    def test_a_condition_that_is_none_is_refused(self, published, tmp_path, where):
        with pytest.raises(UsageError, match=r"--where: query"):
            exported(*published, tmp_path / "out", where=where)

    def test_nothing_left_is_refused(self, published, tmp_path):
        with pytest.raises(UsageError, match="leave no row of train, test"):
            exported(*published, tmp_path / "out", where="false")

    def test_a_dataset_without_its_training_rows_is_refused(self, tmp_path):
        store = make_store(
            tmp_path / "store"
        )  # the held-out rows have whole distributions: those can be cut to any K
        with pytest.raises(UsageError, match="leave no row of train"):
            exported(store, snapshots_of(store), tmp_path / "out", min_k=7)

    def test_columns_are_left_out_and_the_key_stays(self, published, tmp_path):
        store, snapshots = published
        made, rows = exported(
            store,
            snapshots,
            tmp_path / "out",
            columns=("text", "soft_targets.token_ids", "messages"),
        )
        assert {name: facts["columns"] for name, facts in made.tables.items()} == {
            "generations": ["key", "text", "messages"],
            "soft_targets": ["key", "token_ids"],
        }
        assert not any(facts["complete"] for facts in made.tables.values())
        assert set(rows["soft_targets", "train"][0]) == {"key", "token_ids"}

    def test_a_table_without_a_column_stays_at_home(self, published, tmp_path):
        made, rows = exported(*published, tmp_path / "out", columns=("text", "prompt"))
        assert {table for table, _ in rows} == {"generations"} == set(made.tables)
        assert "soft_targets" not in made.statistics["train"]

    def test_an_unknown_column_is_refused_with_the_nearest(self):
        with pytest.raises(UsageError, match=r"no column logprob\. Did you mean logprobs"):
            chosen_columns(["logprob"])


class TestStore:
    def test_one_snapshot_of_training_rows_need_not_be_named(self, published):
        store, snapshots = published
        assert {s: found.id for s, found in find_snapshots(store, None).items()} == {
            split: snapshot.id for split, snapshot in snapshots.items()
        }
        by_test = find_snapshots(store, snapshots["test"].id[:6])
        assert list(by_test) == ["train", "test"]

    def test_several_are_listed(self, tmp_path):
        store = make_store(tmp_path / "store")
        first, second = snapshots_of(store), snapshots_of(store, left_out=(1,))
        with pytest.raises(
            UsageError, match=r"several snapshots\. Name one with --snapshot"
        ) as error:
            find_snapshots(store, None)
        for snapshot in (first["train"], second["train"]):
            assert f"{snapshot.id}  train, {snapshot.rows} rows of soft_targets" in str(error.value)
        assert find_snapshots(store, second["train"].id)["train"].rows == TRAIN - 1
        with pytest.raises(UsageError, match="no snapshot zz"):
            find_snapshots(store, "zz")

    def test_a_store_without_rows_says_so(self, store):
        with pytest.raises(UsageError, match="holds no row to export"):
            find_snapshots(store, None)

    def test_a_generation_that_is_gone_is_missed(self, tmp_path):
        store = make_store(tmp_path / "store")
        snapshots = snapshots_of(store)
        store.retire(store.commits("generations")[0], reason="test")
        with pytest.raises(
            IntegrityError, match="of 20 generations that the snapshot's rows name, "
        ) as error:
            exported(store, snapshots, tmp_path / "out")
        assert "storage.sources" in str(
            error.value
        )  # where text of a source was scored here, nothing is amiss

    @pytest.mark.parametrize(
        ("table", "column"),
        [("generations", "token_ids"), ("prompts", "key"), ("soft_targets", "ids")],
    )
    def test_a_flipped_bit_in_the_store_stops_the_export(self, tmp_path, table, column):
        store = make_store(tmp_path / "store")
        snapshots = snapshots_of(store)
        samples.flip(store.files.path(store.commits(table)[0].shard.name), column)
        with pytest.raises(IntegrityError, match="damaged"):
            exported(store, snapshots, tmp_path / "out")

    def test_rows_of_two_tokenizers_are_no_dataset(self, tmp_path):
        store = make_store(tmp_path / "store")
        about = samples.ABOUT | {"tokenizer_id": "x" * 32, "head": "lm", "class_names": None}
        with store.writer("soft_targets", about=about) as writer:
            writer.add(target_row(99, "topk"))
        with pytest.raises(UsageError, match="differ in their tokenizer_id"):
            exported(store, snapshots_of(store), tmp_path / "out")


def test_a_store_in_a_bucket_leaves_as_one_in_a_folder_does(s3, tmp_path):
    found = []
    for root in (s3.root, tmp_path / "store"):
        store = make_store(root, rows=8)
        made, _ = exported(
            store,
            snapshots_of(store, held_out=2),
            tmp_path / f"out-{len(found)}",
            where="true",
            min_k=3,
        )
        found.append(list(made.files.values()))
    assert found[0] == found[1]


class TestManifest:
    MANIFEST = Manifest(
        name="n",
        splits={},
        tables={},
        about={},
        chosen={},
        statistics={},
        request="r",
        files=[PublishedFile(name="a.txt", sha256="0" * 64, bytes=1)],
    )

    def card(self, *versions):
        paths = "".join(f"  - path: {v}/soft_targets/train-*.parquet\n" for v in versions)
        return f"---\nlicense: mit\nconfigs:\n{paths}---\n\n# path: v-00000000/ in the text\n"

    def test_it_is_named_by_its_files_and_by_what_it_says_of_them(self):
        assert replace(self.MANIFEST, request="s").version == self.MANIFEST.version
        for other in ({"name": "m"}, {"chosen": {"where": "true"}}):
            assert replace(self.MANIFEST, **other).version != self.MANIFEST.version
        files = [replace(self.MANIFEST.files[0], sha256="1" * 64)]
        assert replace(self.MANIFEST, files=files).version != self.MANIFEST.version

    def test_it_comes_back_and_any_change_is_found(self, tmp_path):
        data = self.MANIFEST.sealed()
        assert Manifest.unsealed(data, "m") == self.MANIFEST
        with pytest.raises(IntegrityError, match="changed after it was written"):
            Manifest.unsealed(data.replace(b'"a.txt"', b'"b.txt"'), "m")
        record = json.loads(data)
        del record["self"]
        with pytest.raises(IntegrityError, match="its files are"):
            Manifest.unsealed(seal(record | {"id": "0" * 32}), "m")
        with pytest.raises(IntegrityError, match="Use the version of Stillroom that published it"):
            Manifest.unsealed(seal(record | {"published_version": 4}), "m")

    def test_the_card_names_the_version(self):
        assert current_version(self.card("v-0123abcd", "v-0123abcd")) == "v-0123abcd"
        assert current_version("# no front matter, path: v-0123abcd/x") is None
        assert current_version("---\nlicense: mit\n---\n") is None
        with pytest.raises(IntegrityError, match="v-00000001, v-00000002 at once"):
            current_version(self.card("v-00000001", "v-00000002"))

    def test_a_folder_is_read_by_its_card(self, tmp_path):
        files, version = LocalFiles(tmp_path), self.MANIFEST.version
        with pytest.raises(UsageError, match="not a folder that Stillroom published"):
            read_manifest(files)
        files.replace("README.md", self.card(version).encode())
        with pytest.raises(
            IntegrityError, match=r"MANIFEST\.json: missing\. Download the folder again"
        ):
            read_manifest(files)
        files.replace(f"{version}/MANIFEST.json", self.MANIFEST.sealed())
        assert read_manifest(files) == self.MANIFEST
        assert damaged_files(files, self.MANIFEST) == [f"{version}/a.txt"]


def test_the_authors_are_those_whose_text_or_distribution_it_is(published, tmp_path):
    made, _ = exported(*published, tmp_path / "out")
    assert made.authors == {TEACHER}


def test_spread_has_mean_and_quantiles():
    values = np.random.default_rng(0).random(10_000) ** 3
    spread = Spread(1.0)
    for part in np.array_split(values, 7):
        spread.add(part)
    found = spread.numbers()
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-5)
    assert found["max"] == pytest.approx(values.max(), abs=1e-5)
    for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        assert found[name] == pytest.approx(np.quantile(values, share), abs=3e-4)
    assert Spread(1.0).numbers() is None


def test_lengths_are_exact():
    values = np.random.default_rng(0).integers(0, 30, 1000)
    lengths = Lengths()
    for part in np.array_split(values, 3):
        lengths.add(part)
    found = lengths.numbers()
    assert (found["total"], found["max"]) == (values.sum(), values.max())
    for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        assert found[name] == np.sort(values)[int(np.ceil(share * 1000)) - 1]
    assert Lengths().numbers()["total"] == 0


def test_the_snapshots_that_a_run_saves_know_each_other(tmp_path):
    """As `save_snapshot` keeps them; without that only the named one goes out."""
    store = make_store(tmp_path / "store")
    alone = make_snapshot(
        store, "soft_targets", {store.commits("soft_targets")[0].shard.sha256: [1, 2]}, {}
    )
    save_snapshot(store, alone)
    assert {split: found.id for split, found in find_snapshots(store, None).items()} == {
        "train": alone.id
    }


def test_generations_that_cannot_be_right_do_not_leave(tmp_path, monkeypatch):
    """Of the shards that give texts alone: another one's are nobody's concern here."""
    unchecked_writer(monkeypatch)
    store = make_store(tmp_path / "store", rows=8)
    snapshots = snapshots_of(store)
    bad = generation_row(99)
    with store.writer("generations", about=samples.GENERATIONS_ABOUT) as writer:
        writer.add(bad | {"token_ids": np.array([-5, *bad["token_ids"][1:]], np.int32)})
    exported(store, snapshots, tmp_path / "other")
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        writer.add(target_row(99, "topk"))
    shard = store.commits("soft_targets")[-1].shard.sha256
    snapshot = make_snapshot(store, "soft_targets", {shard: [0]}, {"split": "train"})
    with pytest.raises(IntegrityError, match=r"data/generations/.*: row 0 .*token_ids"):
        exported(store, {"train": snapshot}, tmp_path / "out")
