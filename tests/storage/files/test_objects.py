"""A store on S3 is the store that it would be on a disk, and where it cannot be one it says so.

The server is moto's, a process of its own (`s3_server.py`).
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import loaded
import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe

from stillroom.stages.loader.samples import Samples
from stillroom.stages.loader.torch_dataset import SnapshotDataset
from stillroom.storage.errors import IntegrityError, StillroomError, UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.files.opening import open_files
from stillroom.storage.integrity.repair import repair
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.snapshots.reader import SnapshotReader
from stillroom.storage.snapshots.snapshot import load_snapshot, make_snapshot, save_snapshot
from stillroom.storage.store import segments
from stillroom.storage.store.index import Index
from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store


def add(store: Store, samples: Any, rows: range) -> int:
    return samples.add_targets(store, rows, commit_rows=3)


# The same store as on a disk.


def test_rows_order_and_queries_are_those_of_a_local_store(s3, samples, tmp_path):
    stores = [Store.open(root, create=True) for root in (s3.root, tmp_path / "store")]
    sql = "SELECT key, span_tokens, entropy FROM soft_targets ORDER BY key"
    orders, answers = [], []
    for store in stores:
        add(store, samples, range(12))
        store.retire(store.commits("soft_targets")[1], reason="test")
        index = store.index("soft_targets", ["key"])
        places: dict[str, list[int]] = {}
        for shard, row in zip(index["shard"].to_pylist(), index["row"].to_pylist(), strict=True):
            places.setdefault(shard, []).append(row)
        snapshot = make_snapshot(store, "soft_targets", places, {})
        save_snapshot(store, snapshot)
        reopened = Store.open(store.root)
        reader = SnapshotReader(reopened, load_snapshot(reopened, snapshot.id), ["key", "logprobs"])
        samples_read = reader.samples(seed=3, stop=20)
        orders.append([(sample["key"], sample["logprobs"].tobytes()) for sample in samples_read])
        answers.append(query(reopened, sql))
        assert verify(reopened).ok
    assert orders[0] == orders[1]
    assert len({key for key, _ in orders[0]}) == 9
    assert answers[0].equals(answers[1])


def test_workers_that_a_loader_forks_read_the_same(s3, samples):
    from torch.utils.data import DataLoader

    store = Store.open(s3.root, create=True)
    add(store, samples, range(12))
    shards = {
        commit.shard.sha256: range(commit.shard.rows) for commit in store.commits("soft_targets")
    }
    training = Samples(store, make_snapshot(store, "soft_targets", shards, {}), soft=True)
    read = []
    for workers in (0, 2):  # the first of them uses the connections that the forks then find
        loader = DataLoader(
            SnapshotDataset(training, global_batch=4), batch_size=None, num_workers=workers
        )
        read.append(
            [[sample.token_ids.tobytes() for sample in batch] for batch in islice(loader, 6)]
        )
    assert read[0] == read[1]


def test_sql_reads_what_records_name_and_nothing_else(s3, samples, tmp_path):
    store = Store.open(s3.root, create=True)
    add(store, samples, range(3))
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for source in (
        tmp_path / "secret.csv",
        f"{s3.root}/STORE.json",
        "stillroom://store/STORE.json",
    ):
        with pytest.raises((UsageError, IntegrityError)):
            query(store, f"SELECT * FROM read_csv('{source}')")
    assert query(store, "SELECT shard FROM commits")["shard"].to_pylist() == [
        store.commits("soft_targets")[0].shard.name
    ]


def test_sql_spills_to_a_disk_where_nothing_was_kept_yet(s3, samples, tmp_path, monkeypatch):
    """DuckDB makes one folder, not those above it; it cleans up itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    monkeypatch.setenv("STILLROOM_SQL_MEMORY", "60MB")
    store = Store.open(s3.root, create=True)
    add(store, samples, range(3))
    sql = "SELECT count(DISTINCT md5(i::VARCHAR)) AS many FROM range(1000000) numbers(i)"
    assert query(store, sql)["many"].to_pylist() == [1000000]


def test_damage_is_found_and_repaired_and_an_outage_is_no_damage(s3, samples):
    store = Store.open(s3.root, create=True)
    add(store, samples, range(6))
    first, second = (commit.shard.name for commit in store.commits("soft_targets"))
    data = bytearray(store.files.read(first))
    data[200] ^= 4  # among the pages
    store.files.replace(first, bytes(data))
    store.files.remove(second)
    assert {problem.file for problem in verify(Store.open(s3.root)).problems} == {first, second}

    assert len(repair(store).withdrawn) == 2
    assert add(store, samples, range(6)) == 6
    samples.assert_each_key_once(s3.root, 6)
    assert set(vacuum(store, older_than_hours=0).files) == {first, ".probe"}
    samples.assert_each_key_once(s3.root, 6)

    shard = store.shard("soft_targets", store.commits("soft_targets")[0].shard.sha256)
    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"  # nobody listens
    s3.reconnect()
    with pytest.raises(StillroomError, match="did not answer") as caught:
        shard.read(0, ["key"])
    assert not isinstance(caught.value, IntegrityError)


def test_what_needs_a_path_gets_a_copy_on_this_machine(s3, tmp_path):
    store = Store.open(s3.root, create=True)
    files = {"identity.json": b"{}", "tokenizer.json": b"[1]", "merges.txt": b""}
    store.put_teacher("t", files)
    s3.log()
    store.put_teacher("t", files)
    assert len(s3.log()) == 1
    folder = store.teacher_dir("t")
    copied = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert copied.pop("files.json")  # the hashes of the others
    assert copied == files
    assert folder.is_relative_to(tmp_path / "user-cache")
    with pytest.raises(UsageError, match="does not know this teacher"):
        store.teacher_dir("u")


def test_a_plan_reads_index_segments_from_copies_and_never_a_damaged_one(s3, samples, monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT", 2)
    store = Store.open(s3.root, create=True)
    add(store, samples, range(12))

    def places() -> tuple[list[tuple[int, ...]], bool]:
        s3.log()
        index = Index(Store.open(s3.root))
        found = sorted(index.rows("SELECT place FROM soft_targets"))
        index.close()
        return found, any("/data/soft_targets" in line for line in s3.log())

    expected = [(commit << 32 | row,) for commit in range(4) for row in range(3)]
    assert places() == (expected, False)
    copies = list(store.files.cache.path("cache/index").rglob("*.parquet"))
    assert len(copies) == 2
    copies[0].write_bytes(b"damaged")
    assert places() == (expected, True)


def test_files_are_listed_with_sizes_and_read_many_at_a_time(s3):
    files = open_files(s3.root)
    assert files.empty()
    assert list(files.walk()) == []
    contents = {f"folder/{i:03d}": bytes([i]) * (i + 1) for i in range(40)}
    for name, data in contents.items():
        assert files.put_if_absent(name, data)
    assert files.put_if_absent("folder/deeper/x", b"x")
    assert files.put_if_absent("folder/.hidden", b"")
    assert not files.empty()
    assert files.names("folder") == [Path(name).name for name in contents]
    assert files.names("nowhere") == []
    assert files.read_many([*contents, "folder/none"]) == contents
    found = {name: size for name, size, changed in files.walk("folder") if changed > 0}
    assert found == {name: len(data) for name, data in contents.items()} | {
        "folder/deeper/x": 1,
        "folder/.hidden": 0,
    }
    assert files.read("folder/.hidden") == b""
    assert not files.exists("folder")
    with pytest.raises(FileNotFoundError):
        files.size("folder")
    with pytest.raises(FileNotFoundError):
        files.source("folder/none")


def test_a_commit_takes_seven_requests(s3, samples):
    store = Store.open(s3.root, create=True)
    add(store, samples, range(3))
    with store.writer("soft_targets", about=samples.ABOUT) as writer:
        for index in range(3, 6):
            writer.add(samples.target_row(index))
        s3.log()
        writer.flush()
        methods = [line.split()[0] for line in s3.log()]
    # Is the name taken? The shard; its size, footer and rows, read back. The record; is its number
    # withdrawn by now?
    assert methods == ["GET", "PUT", "HEAD", "GET", "GET", "PUT", "GET"]


# One winner.


def test_racing_threads_have_one_winner_per_name(s3):
    files = open_files(s3.root)

    def race(me: int) -> list[int]:
        return [i for i in range(20) if files.put_if_absent(f"race/{i}", f"{me} {i}".encode())]

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(race, range(4)))
    assert sorted(name for names in won for name in names) == list(range(20))
    for me, names in enumerate(won):
        for name in names:
            assert files.read(f"race/{name}") == f"{me} {name}".encode()


def start(samples: Any, root: str, rows: int) -> subprocess.Popen:
    words = [sys.executable, samples.__file__, root, "0", str(rows)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process


def test_two_processes_given_the_same_keys(s3, samples):
    processes = [start(samples, s3.root, 40) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    committed = [int(process.communicate()[0].split()[-1]) for process in processes]
    assert sum(committed) == 40
    samples.assert_each_key_once(s3.root, 40)


def test_killed_and_resumed(s3, samples):
    for lines in (5, 17, 30):
        process = start(samples, s3.root, 40)
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        for _ in range(lines):
            process.stdout.readline()
        process.kill()
        process.communicate()
        assert verify(Store.open(s3.root)).problems == []
    process = start(samples, s3.root, 40)
    process.communicate("go\n")
    samples.assert_each_key_once(s3.root, 40)


# What is refused.


def test_a_service_that_ignores_the_condition_is_not_written_to(s3, samples):
    Store.open(s3.root, create=True)
    s3.fault("ignore", times=1000)
    for create in (True, False):
        with pytest.raises(UsageError, match="ignores If-None-Match"):
            add(Store.open(s3.root, create=create), samples, range(3))
    with pytest.raises(UsageError, match="ignores If-None-Match"):
        Store.open(f"{s3.root}-new", create=True)
    found = [name for name, *_ in open_files(f"s3://{s3.bucket}").walk()]
    assert found == ["a/store-new/.probe", "a/store/.probe", "a/store/STORE.json"]
    assert Store.open(s3.root).commits("soft_targets") == []  # reading is no trouble


def test_places_where_no_store_can_be_are_named(s3):
    open_files(s3.root).put_if_absent("notes.txt", b"mine")
    with pytest.raises(UsageError, match=f"{s3.root}: the folder is not empty"):
        Store.open(s3.root, create=True)
    with pytest.raises(UsageError, match="no store here"):
        Store.open(f"{s3.root}/deeper")
    with pytest.raises(StillroomError, match="Check the bucket's name"):
        Store.open("s3://no-such-bucket/store", create=True)
    with pytest.raises(UsageError, match="Protocol not known: abc"):
        Store.open("abc://bucket/store")


def test_a_missing_driver_is_named_with_the_extra_that_brings_it():
    code = (
        "import sys; sys.modules['s3fs'] = None; from stillroom.storage.files.opening import "
        "open_files; open_files('s3://a/b')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UsageError: s3://a/b: Install s3fs" in done.stderr
    assert "pip install 'stillroom[s3]'" in done.stderr


def test_a_slash_at_the_end_and_a_file_url_are_the_same_place(s3, tmp_path):
    files = open_files(s3.root)
    files.system.pipe_file(f"{s3.bucket}/a/store/", b"")  # as a web console makes a folder
    assert files.empty()
    assert Store.open(f"{s3.root}/", create=True).id == Store.open(s3.root).id
    assert files.names("") == ["STORE.json"]
    assert open_files(f"file://{tmp_path}").root == LocalFiles(tmp_path).root


# The whole pipeline.


@pytest.mark.slow
def test_a_run_on_s3_is_killed_resumed_and_ends_with_a_report(s3, tiny_llama, tmp_path):
    def told(*words: Any) -> dict[str, Any]:
        return last_json(stillroom(*words, "--json"))

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(24))
    storage = {"dir": s3.root, "commit_rows": 4}
    recipe = write_recipe(tmp_path, tiny_llama("teacher"), source, storage=storage)
    killed = loaded.start(["run", recipe, "--quiet"], tmp_path, environment)
    files = open_files(s3.root)
    while not files.names("commits/generations") and killed.poll() is None:
        time.sleep(0.05)
    os.killpg(killed.pid, 9)
    killed.communicate()

    assert {"teacher", "student"} <= told("run", recipe)["results"].keys()
    assert s3.root in (tmp_path / "run" / "report.json").read_text()
    assert told("verify", s3.root)["ok"]
    planned = told("plan", recipe)["stages"]
    assert {line["state"] for line in planned.values()} == {"done"}
    assert (planned["generate"]["committed"], planned["generate"]["pending"]) == (24, 0)
    assert told("status", recipe)["stages"]["score"]["rows"] == planned["score"]["committed"]
    sample = told("inspect", s3.root)
    assert len(sample["positions"]) == len(sample["tokens"]) - sample["span_start"]
    assert sample["tokens"][0] == "<s>"  # its tokenizer was found
    counted = told(
        "query", s3.root, "SELECT count(*) AS n, count(DISTINCT key) AS keys FROM generations"
    )
    assert counted == {"rows": [{"n": 24, "keys": 24}], "complete": True}
    assert not [path for path in tmp_path.rglob("s3:*")]
    assert list(
        (tmp_path / "user-cache").rglob("sha256/*.json")
    )  # hashes of weights stay on this machine
