"""Records that a stranger sealed: bounds hold before anything is made of what they say.

Errors name the record.

Each forgery is sealed, so its hash holds. Memory is bounded for the whole file: an array of 2^40
rows, or a hundred million names, ends a test and not the machine.
"""

import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.stages.workers.claims import Claims
from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.integrity.repair import repair
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.keys import seal, unseal
from stillroom.storage.published.manifest import Manifest
from stillroom.storage.snapshots import snapshot as snapshots
from stillroom.storage.snapshots.snapshot import load_snapshot, make_snapshot, save_snapshot
from stillroom.storage.store.bindings import (
    Binding,
    bind_engine,
    bound_engine,
    newest_binding,
    write_binding,
)
from stillroom.storage.store.commits import retire, withdrawal
from stillroom.storage.store.index import Index
from stillroom.storage.store.inputs import INPUTS_SCHEMA, read_inputs
from stillroom.storage.store.store import Store
from stillroom.storage.tables.shard import ShardFile, put_parquet

COMMIT = "commits/soft_targets/00000000.json"
DEEP = b"[" * 100_000


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """An array of 2^40 rows is refused at once, as it would be without overcommitting."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def put(store: Store, name: str, data: bytes) -> None:
    path = store.files.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def reopened(store: Store) -> Store:
    return Store.open(store.root)


COMMANDS: dict[str, Callable[[Store], Any]] = {
    "commits": lambda store: store.commits("soft_targets"),
    "vacuum": lambda store: vacuum(store, dry_run=True),
    "writer": lambda store: store.writer("soft_targets", about=ABOUT).__enter__(),
}
ABOUT = {"teacher_id": "t", "tokenizer_id": "t", "vocab_size": 50, "mantissa_bits": 10}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("folder", ["commits", "retired"])
def test_a_record_with_a_high_number_is_named_and_nobody_counts_up_to_it(filled, folder, command):
    name = f"{folder}/soft_targets/99999999.json"
    put(filled, name, withdrawal("soft_targets", 99999999, reason="a joke"))
    with pytest.raises(IntegrityError, match=f"{name}: 99999994 numbers before this record"):
        COMMANDS[command](reopened(filled))


@pytest.mark.parametrize("folder", ["commits", "retired"])
def test_a_record_with_a_high_number_is_a_problem_that_repair_leaves(filled, folder):
    """All else is verified, and nothing is withdrawn under the number that is refused."""
    for seq in (99999999, 5000):
        name = f"{folder}/soft_targets/{seq:08d}.json"
        put(filled, name, withdrawal("soft_targets", seq, reason="a joke"))
    names = list(filled.files.names("retired/soft_targets"))
    report = verify(reopened(filled))
    (problem,) = report.problems
    assert f"{folder}/soft_targets/99999999.json: " in problem.message
    assert report.tables["soft_targets"].rows == 40
    assert repair(reopened(filled)).left == [problem]
    assert list(filled.files.names("retired/soft_targets")) == names


def test_gaps_of_a_few_are_asked_for_by_name_and_withdrawn_numbers_are_none(filled):
    for commit in filled.commits("soft_targets")[1:4]:
        retire(filled.files, "soft_targets", commit.seq, reason="test")
        filled.files.path(f"commits/soft_targets/{commit.seq:08d}.json").unlink()
    put(filled, "commits/soft_targets/٠٠٠٠٠٠٠٩.json", b"digits, but not ours")
    assert [c.seq for c in reopened(filled).commits("soft_targets")] == [0, 4]
    filled.files.path(COMMIT).unlink()
    (lost,) = [p.file for p in verify(reopened(filled)).problems]
    assert lost == COMMIT


SHARDS = {
    "negative row groups": {"row_groups": [-5, 13]},
    "row groups of fractions": {"row_groups": [4.5, 3.5]},
    "row groups of truths": {"row_groups": [True, 7]},
    "row groups that are text": {"row_groups": ["8"]},
    "row groups that are no list": {"row_groups": "8"},
    "rows as a fraction": {"rows": 8.0},
    "rows beyond the file": {"rows": 2**40, "row_groups": [2**40]},
    "a path above": {"name": "data/soft_targets/../../../etc/passwd"},
    "a path from the root": {"name": "/etc/passwd"},
    "a hash with a path": {"sha256": "../" * 21 + "x"},
    "a size that is text": {"bytes": "9802"},
    "a field that nobody knows": {"mode": "rwx"},
}


@pytest.mark.parametrize("change", SHARDS.values(), ids=SHARDS)
def test_a_commit_that_says_what_no_shard_can_be(filled, change):
    record = unseal(filled.files.read(COMMIT), COMMIT)
    put(filled, COMMIT, seal(record | {"shard": record["shard"] | change}))
    with pytest.raises(IntegrityError, match=f"^{COMMIT}: "):
        reopened(filled).commits("soft_targets")
    assert {p.file for p in verify(reopened(filled)).problems} == {COMMIT}


@pytest.mark.parametrize(
    "change",
    [{"tokens": -1}, {"tokens": 2.0}, {"seconds": "1"}, {"versions": 3}, {"keys": 3}, {"stage": 1}],
)
def test_a_commit_with_fields_of_other_types(filled, change):
    record = unseal(filled.files.read(COMMIT), COMMIT)
    put(filled, COMMIT, seal(record | change))
    with pytest.raises(IntegrityError, match=f"^{COMMIT}: not a commit record"):
        reopened(filled).commits("soft_targets")


@pytest.mark.parametrize("change", SHARDS.values(), ids=SHARDS)
def test_inputs_that_say_what_no_shard_can_be(filled, change):
    row = {"key": b"k" * 16, "prompt_key": b"p" * 16, "split": "train", "first": True}
    filled.put_inputs("d", pa.Table.from_pylist([row | {"windows": None}], INPUTS_SCHEMA), {})
    record = unseal(filled.files.read("inputs/d.json"), "inputs/d.json")
    put(filled, "inputs/d.json", seal(record | {"shard": record["shard"] | change}))
    with pytest.raises(IntegrityError, match=r"^inputs/d.json: "):
        filled.inputs("d")
    assert [p.file for p in verify(filled).problems] == ["inputs/d.json"]


@pytest.mark.parametrize(
    "changed",
    [
        lambda table: table.drop_columns(["windows"]),
        lambda table: table.append_column("spare", table["split"]),
        lambda table: table.set_column(2, "split", pa.array([1], pa.int64())),
        lambda table: table.rename_columns(["key", "key_2", "split", "windows", "first"]),
    ],
    ids=["fewer", "more", "of another type", "of other names"],
)
def test_inputs_with_other_columns(filled, changed):
    row = {"key": b"k" * 16, "prompt_key": b"p" * 16, "split": "train", "first": True}
    filled.put_inputs("d", pa.Table.from_pylist([row | {"windows": None}], INPUTS_SCHEMA), {})
    shard = read_inputs(filled.files, "d").shard
    table = changed(ShardFile(filled.files, shard.name).read_all())
    about = {"table": "inputs"}
    other = put_parquet(filled.files, table, [1], folder="data/inputs", about=about)
    record = unseal(filled.files.read("inputs/d.json"), "inputs/d.json")
    put(filled, "inputs/d.json", seal(record | {"shard": asdict(other)}))
    expected = rf"^{other.name}: its columns are .*, those of inputs are key "
    with pytest.raises(IntegrityError, match=expected):
        filled.inputs("d")
    index = Index(filled)
    with pytest.raises(IntegrityError, match=expected):
        index.inputs(filled.files, read_inputs(filled.files, "d"))
    index.close()


def forged_snapshot(store: Store, table: str = "soft_targets", **change: Any) -> str:
    """A snapshot of a store's first shard with something changed, under the id that fits it."""
    commit = store.commits("soft_targets")[0]
    shard = asdict(commit.shard) | {"rows": [[0, 3]]} | change
    stated = [[shard["sha256"], shard["rows"]]]
    order = {name: change[name] for name in ("order", "groups") if name in change}
    snapshot_id = snapshots._snapshot_id(table, stated, **order)
    kept = {name: shard[name] for name in ("sha256", "name", "row_groups", "rows")}
    record = {"format_version": 1, "id": snapshot_id, "table": table, "shards": [kept]} | order
    put(store, f"snapshots/{snapshot_id}.json", seal(record | {"about": {}}))
    return snapshot_id


SNAPSHOTS = {
    "rows below 0": {"rows": [[-5, 3]]},
    "rows beyond the shard": {"rows": [[0, 9]]},
    "rows twice": {"rows": [[0, 3], [2, 5]]},
    "no rows": {"rows": []},
    "a run that is empty": {"rows": [[3, 3]]},
    "fractions": {"rows": [[0.5, 3.5]]},
    "truths": {"rows": [[False, True]]},
    "text": {"rows": [["0", "3"]]},
    "2^40 rows": {"rows": [[0, 2**40]], "row_groups": [2**40]},
    "2^31 - 1 rows": {"rows": [[0, 2**31 - 1]], "row_groups": [2**31 - 1]},
    "2^25 rows": {"rows": [[0, 2**25]], "row_groups": [2**25]},
    "row groups that take one another back": {"rows": [[0, 3]], "row_groups": [-5, 13]},
    "a path above": {"name": "data/../../../etc/passwd"},
    "a hash with a path": {"sha256": "../" * 21 + "x"},
    "a table that is none": {"table": "../soft_targets"},
    "an order without a sample": {"order": [[0, 2]], "groups": [3]},
    "an order with a sample twice": {"order": [[0, 2], [1, 2]], "groups": [3]},
    "an order with a sample that is not there": {"order": [[0, 2], [3, 4]], "groups": [3]},
    "an order with a run that is empty": {"order": [[0, 3], [3, 3]], "groups": [3]},
    "an order with 2^40 samples": {"order": [[0, 2**40]], "groups": [2**40]},
    "an order without groups": {"order": [[0, 3]]},
    "an order whose groups lack a sample": {"order": [[0, 3]], "groups": [2]},
}


@pytest.mark.parametrize("change", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_a_snapshot_that_lists_what_is_not_there(filled, change):
    name = forged_snapshot(filled, **change)
    with pytest.raises(IntegrityError, match=f"^snapshots/{name}.json: "):
        load_snapshot(reopened(filled), name)
    assert {p.file for p in verify(filled).problems} == {f"snapshots/{name}.json"}


def test_a_long_snapshot_is_proved_by_the_records_of_its_shards(filled, monkeypatch):
    """Withdrawn shards too; a snapshot of what is there loads as before."""
    monkeypatch.setattr(snapshots, "_UNPROVED", 1)
    first, second = filled.commits("soft_targets")[:2]
    places = {commit.shard.sha256: range(8) for commit in (first, second)}
    kept = make_snapshot(filled, "soft_targets", places, {})
    save_snapshot(filled, kept)
    filled.retire(first, reason="test")
    assert load_snapshot(reopened(filled), kept.id).rows == 16
    away = replace(kept.shards[1], sha256="a" * 64, name="data/x", source="other")
    with_others = replace(kept, id="x", shards=(kept.shards[0], away))
    runs = [[shard.sha256, [[0, 8]]] for shard in with_others.shards]
    with_others = replace(with_others, id=snapshots._snapshot_id("soft_targets", runs))
    save_snapshot(filled, with_others)
    with pytest.raises(UsageError, match="of the read-only source other too"):
        load_snapshot(reopened(filled), with_others.id)
    assert verify(reopened(filled)).ok
    filled.files.path(first.shard.name).unlink()
    with pytest.raises(IntegrityError, match=f"{first.shard.name}: the file is missing"):
        load_snapshot(reopened(filled), kept.id)


def test_a_footer_that_says_more_rows_than_the_file_has_bytes(store, monkeypatch):
    put(store, "data/soft_targets/aa/x.parquet", b"")
    pq.write_table(pa.table({"x": pa.array([0] * 100_000, pa.int8())}), store.files.path("x"))
    with pytest.raises(IntegrityError, match=r"x: row groups of \(100000,\) rows in a file of"):
        ShardFile(store.files, "x")


BINDING = Binding(
    teacher_id="t",
    author_id="t",
    data_id="d",
    vocab_size=5,
    context_tokens=9,
    author_context_tokens=9,
)


def test_a_binding_with_the_last_number_is_named_and_nothing_waits_for_the_next(store):
    put(store, "bindings/x/99999999.json", seal(asdict(BINDING)))
    put(store, "bindings/x/notes.json", b"")
    assert newest_binding(store.files, "bindings/x") == BINDING
    with pytest.raises(IntegrityError, match=r"^bindings/x/99999999.json: the last number"):
        write_binding(store.files, "bindings/x", Binding(**asdict(BINDING) | {"vocab_size": 6}))


@pytest.mark.parametrize("content", [b"", DEEP, seal({"engine": 7}), seal({})])
def test_a_damaged_decision_on_an_engine_is_found_and_taken_back(store, content):
    bind_engine(store.files, "t", "vllm")
    assert verify(store).problems == verify(store).notes == []
    store.files.replace("engines/t.json", content)
    with pytest.raises(IntegrityError, match=r"^engines/t.json: "):
        bound_engine(store.files, "t")
    assert [problem.file for problem in verify(store).problems] == ["engines/t.json"]
    assert repair(store).removed == ["engines/t.json"]
    assert bind_engine(store.files, "t", "hf") == "hf"


@pytest.mark.parametrize(
    "change", [{"vocab_size": -1}, {"context_tokens": "9"}, {"more": 1}, {"imported": 1}]
)
def test_a_binding_with_fields_of_other_types(store, change):
    put(store, "bindings/x/00000000.json", seal(asdict(BINDING) | change))
    with pytest.raises(IntegrityError, match=r"^bindings/x/00000000.json: not a binding"):
        newest_binding(store.files, "bindings/x")


def test_a_claim_that_is_no_number_is_nobodys(store):
    claims = Claims(store.files, "score", x=1)
    for name in ("x.y.json", "00000000.0.json", "notes", f"00000001.{'9' * 40}.json"):
        put(store, f"{claims._folder}/{name}", b"{}")
    claims._see(0)
    assert claims._claims == {0: 1}


DEEP_FILES = {
    "a commit": (COMMIT, lambda store: store.commits("soft_targets")),
    "a withdrawal": (
        "retired/soft_targets/00000000.json",
        lambda store: store.commits("soft_targets"),
    ),
    "inputs": ("inputs/d.json", lambda store: store.inputs("d")),
    "a snapshot": ("snapshots/s.json", lambda store: load_snapshot(store, "s")),
    "a binding": (
        "bindings/x/00000000.json",
        lambda store: newest_binding(store.files, "bindings/x"),
    ),
    "an identity": ("teachers/t/identity.json", lambda store: store.teacher_parts("t")),
    "the marker": ("STORE.json", reopened),
    "a manifest": (
        "MANIFEST.json",
        lambda s: Manifest.unsealed(s.files.read("MANIFEST.json"), "MANIFEST.json"),
    ),
}


@pytest.mark.parametrize("deep", [DEEP, b'{"a": ' * 500 + b"1" + b"}" * 500], ids=["open", "whole"])
@pytest.mark.parametrize(("name", "read"), DEEP_FILES.values(), ids=DEEP_FILES)
def test_a_record_nested_deeper_than_anybody_writes(filled, name, read, deep):
    put(filled, name, deep)
    store = filled if name == "STORE.json" else reopened(filled)
    with pytest.raises(IntegrityError, match=f"{name}: .*(nested more than 100 deep|recursion)"):
        read(store)
    if name not in ("STORE.json", "MANIFEST.json"):
        assert name in {p.file for p in verify(store).problems}


@pytest.mark.parametrize("config", [3, "x", [1], {"text_config": 3}], ids=str)
def test_an_identity_whose_config_is_none(filled, config):
    put(filled, "teachers/t/identity.json", seal({"config": config}))
    with pytest.raises(
        IntegrityError, match=r"^teachers/t/identity.json: not a teacher's identity"
    ):
        filled.teacher_parts("t")


MANIFEST = {
    "format_version": 1,
    "published_version": 1,
    "name": "n",
    "request": "r",
    "tables": {"generations": {"columns": ["key"]}},
    "about": {"generations": {}},
    "chosen": {},
    "statistics": {},
    "splits": {
        "train": {
            "snapshot": "s",
            "table": "generations",
            "whole": False,
            "rows": 2,
            "tokens": 2,
            "scored_tokens": 2,
        }
    },
}
FILE = {
    "name": "generations/train-00000-of-00001.parquet",
    "sha256": "0" * 64,
    "bytes": 900,
    "table": "generations",
    "split": "train",
    "rows": 2,
    "tokens": 2,
    "row_groups": [2],
}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 2**40, "row_groups": [2**40]},
        {"rows": 901, "row_groups": [901]},
        {"row_groups": [-1, 3]},
        {"rows": 2.0},
        {"bytes": True},
        {"tokens": "2"},
        {"name": "../outside.parquet"},
        {"name": "/etc/passwd"},
        {"name": "C:/windows/x"},
        {"name": "C:x"},
        {"name": "generations\\x"},
        {"name": "."},
        {"name": ""},
        {"name": "a\0b"},
        {"name": "a\nerror: b"},
        {"name": "a\u202eb"},
        {"name": "generations//x"},
        {"name": "generations/\x1b[31m"},
        {"name": "MANIFEST.json"},
        {"sha256": "0" * 63},
        {"mode": 1},
    ],
    ids=str,
)
def test_a_manifest_that_says_what_no_file_can_be(change):
    record = MANIFEST | {"files": [FILE | change], "id": "x"}
    with pytest.raises(IntegrityError, match=r"^MANIFEST.json: not a manifest"):
        Manifest.unsealed(seal(record), "MANIFEST.json")
