"""Rows that cannot be right are found in sealed shards of every kind, by file and row.

What holds is remembered.
"""

import shutil
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planting import unchecked_writer

from stillroom.storage.errors import IntegrityError
from stillroom.storage.integrity.checked import Held, Memory, check_file, files_of, held
from stillroom.storage.integrity.row_faults import faults, row_faults
from stillroom.storage.integrity.verify import verify
from stillroom.storage.joined import open_store
from stillroom.storage.snapshots.snapshot import make_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
from stillroom.storage.tables.rows import Rows, check_row, rows_to_table

KINDS = ("topk", "topp", "sampled", "weighted", "full", "tempered", "hot")
STATED = ("topk", "topp", "full", "tempered")
WITH_IDS = ("topk", "topp", "sampled", "weighted", "tempered", "hot")
BAD = 4

Row = dict[str, Any]


def at(name: str, index: int, value: float) -> Callable[[Row], Row]:
    """One number of a list is another."""

    def change(row: Row) -> Row:
        values = row[name].copy()
        values[index] = value
        return row | {name: values}

    return change


def more(name: str, by: float) -> Callable[[Row], Row]:
    return lambda row: row | {name: row[name] + np.float32(by)}


def twice(row: Row) -> Row:
    return row | {"ids": np.concatenate([row["ids"][1:2], row["ids"][1:]])}


FAULTS: list[tuple[str, tuple[str, ...], Callable[[Row], Row], str]] = [
    ("duplicate ids", WITH_IDS, twice, "ids: an id stands twice at one position"),
    ("logprobs + 5", STATED, more("logprobs", 5), "logprobs: a log probability is above 0"),
    ("tail + 50", STATED[:2], more("tail_logprob", 50), "tail_logprob: a log probability is above"),
    ("tail inf", STATED, at("tail_logprob", 0, np.inf), "tail_logprob: a log probability is above"),
    ("token + 5", KINDS, more("token_logprob", 5), "token_logprob: a log probability is above 0"),
    ("id of nobody", WITH_IDS, at("ids", 1, 50), "ids: an entry is outside the vocabulary of 50"),
    ("id below 0", WITH_IDS, at("ids", 1, -7), "ids: an entry is outside the vocabulary of 50"),
    ("token of nobody", KINDS, at("token_ids", 0, 50), "token_ids: a token id is outside"),
    ("token below 0", KINDS, at("token_ids", 0, -1), "token_ids: a token id is outside"),
    ("NaN", STATED, at("logprobs", 1, np.nan), "logprobs holds NaN"),
    ("NaN of the token", KINDS, at("token_logprob", 1, np.nan), "token_logprob holds NaN"),
    ("spans beyond", KINDS, lambda row: row | {"span_start": 90, "spans": None}, "of its spans"),
    ("one target less", KINDS, lambda row: row | {"entropy": row["entropy"][1:]}, "its own target"),
    ("entries below 0", ("topp", "hot"), at("entries", 1, -1), "has -1 entries|values, expected"),
    ("mass", STATED, lambda row: row | {"kept_mass": 0.25}, "kept_mass: says 0.2500, the entries"),
]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked_writer(monkeypatch)


def rows_of_kind(samples: Any, kind: str, count: int = 9, first: int = 0, **how: Any) -> list[Row]:
    k = samples.VOCABULARY if kind == "full" else 5
    return [samples.target_row(first + index, kind=kind, k=k, **how) for index in range(count)]


def sealed(store: Any, samples: Any, shards: list[list[Row]]) -> list[Any]:
    """The files of shards with these rows."""
    limits = CommitLimits(rows=len(shards[0]))
    with store.writer("soft_targets", about=samples.ABOUT, limits=limits) as writer:
        for row in chain(*shards):
            writer.add(row)
    commits = store.commits("soft_targets")
    return [store.stored("soft_targets", commit.shard.sha256)[0] for commit in commits]


@pytest.mark.filterwarnings("ignore:invalid value")  # of the writer's statistics
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_cannot_be_right_is_named(store, samples, unchecked, kind):
    """Each fault in a shard of its own, which was sealed with it."""
    cases = [(change, says) for _, kinds, change, says in FAULTS if kind in kinds]
    shards = [rows_of_kind(samples, kind, first=100 * number) for number in range(len(cases))]
    for (change, _), rows in zip(cases, shards, strict=True):
        rows[BAD] = change(rows[BAD])
    files = sealed(store, samples, shards)
    for file, rows, (_, says) in zip(files, shards, cases, strict=True):
        where = rf"{file.name}: row {BAD} \({rows[BAD]['key'].hex()}\): "
        with pytest.raises(IntegrityError, match=rf"{where}.*({says})"):
            check_file(file, "soft_targets", Memory(None))
    assert {problem.file for problem in verify(store).problems} == {file.name for file in files}


def test_a_key_that_is_there_twice_is_named(store, samples, unchecked):
    (file,) = sealed(store, samples, [rows_of_kind(samples, "topk")])
    assert check_file(file, "soft_targets", Memory(None)) == (Held(9, 49), None)
    rows = rows_of_kind(samples, "topk", tokens=8)
    rows[5]["key"] = rows[1]["key"]
    table = rows_to_table("soft_targets", [check_row("soft_targets", row) for row in rows])
    found = list(faults("soft_targets", Rows(table), samples.ABOUT))
    assert found == [(5, "key", "another row of this row group has the same key")]


def test_draws_of_another_row_show_in_many_rows(samples):
    rows = rows_of_kind(samples, "sampled", count=40, tokens=4)
    lists = ("ids", "counts", "entries", "token_logprob", "entropy", "span_tokens")
    moved = [
        row | {name: other[name] for name in lists}
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    said = [message for _, _, message in found_in(samples, moved)]
    assert any("together: " in text and "tokens that follow were drawn" in text for text in said)
    assert not found_in(samples, rows)


def found_in(samples: Any, rows: list[Row]) -> list[Any]:
    table = rows_to_table("soft_targets", [check_row("soft_targets", row) for row in rows])
    return list(faults("soft_targets", Rows(table), samples.ABOUT))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
def test_rows_asked_together_say_what_each_says_alone(samples, data, kinds):
    rows = [samples.target_row(n, kind=kind, k=5) for n, kind in enumerate(kinds)]
    rows = [row | {"k": samples.VOCABULARY} if row["kind"] == "full" else row for row in rows]
    for index in data.draw(st.sets(st.integers(0, len(rows) - 1), max_size=3)):
        fitting = [change for _, of, change, _ in FAULTS if kinds[index] in of]
        rows[index] = data.draw(st.sampled_from(fitting))(rows[index])
    table = Rows(rows_to_table("soft_targets", [check_row("soft_targets", row) for row in rows]))
    alone = [
        (index, *fault)
        for index in range(len(rows))
        for fault in row_faults("soft_targets", table[index], samples.ABOUT)
    ]
    assert list(faults("soft_targets", table, samples.ABOUT)) == alone


def test_nothing_in_place_of_a_number_is_named(samples):
    row = check_row("soft_targets", samples.target_row(0))
    table = rows_to_table("soft_targets", [row, row])
    ids = pa.array([row["ids"].tolist(), [None, *row["ids"][1:].tolist()]], table["ids"].type)
    at_ids = table.column_names.index("ids")
    holed = table.set_column(at_ids, table.schema.field("ids"), ids)
    for first in (0, 1):  # as it is, and as a slice that begins within its values
        named = f"row {1 - first}: ids holds nothing in place of a number"
        with pytest.raises(IntegrityError, match=named):
            Rows(holed.slice(first))


def test_no_bound_is_taken_from_a_forged_description(store, samples, unchecked):
    with store.writer("soft_targets", about=samples.ABOUT | {"mantissa_bits": -900}) as writer:
        writer.add(samples.target_row(0))
    (file,) = store.stored("soft_targets", store.commits("soft_targets")[-1].shard.sha256)
    with pytest.raises(IntegrityError, match="-900 is not a whole number from 1 to 23"):
        check_file(file, "soft_targets", Memory(None))


def test_what_holds_is_remembered_by_its_bytes(filled, samples, tmp_path, monkeypatch):
    places = {c.shard.sha256: range(8) for c in filled.commits("soft_targets")}
    files = files_of(filled, make_snapshot(filled, "soft_targets", places, {}))
    assert len(files) == 5
    memory = Memory(tmp_path / "cache" / "rows.txt")
    for file in files:
        assert held(file, "soft_targets", memory) is None
        found, _ = check_file(file, "soft_targets", memory)
        assert held(file, "soft_targets", Memory(tmp_path / "cache" / "rows.txt")) == found
    # The same bytes elsewhere are hashed, and their rows are not asked again.
    copy = open_store(shutil.copytree(filled.root, tmp_path / "copied"))
    (again,) = copy.stored("soft_targets", files[0].sha256)
    assert held(again, "soft_targets", memory) is None
    monkeypatch.setattr(
        "stillroom.storage.integrity.checked.faults", lambda *_: pytest.fail("asked again")
    )
    assert check_file(again, "soft_targets", memory)[0].rows == 8
    # Other bytes under the old name are not what was checked.
    path = filled.files.path(files[1].name)
    path.write_bytes(filled.files.path(files[0].name).read_bytes())
    assert held(files[1], "soft_targets", memory) is None
    with pytest.raises(IntegrityError, match="these are not the bytes that were committed"):
        check_file(files[1], "soft_targets", memory)


@pytest.mark.parametrize(
    "torn", ["", "x", "\n\t\t.", "soft_targets {}\t8 4", "soft_targets {}\tx\t."]
)
def test_a_memory_that_cannot_be_read_or_written_is_none(filled, tmp_path, torn):
    (file,) = filled.stored("soft_targets", filled.commits("soft_targets")[0].shard.sha256)
    path = tmp_path / "rows.txt"
    path.write_text(torn.format(file.sha256))
    assert check_file(file, "soft_targets", Memory(path))[0] == Held(8, 49)
    assert held(file, "soft_targets", Memory(path)) == Held(8, 49)
    beside = Memory(tmp_path / "rows.txt" / "no folder")
    assert check_file(file, "soft_targets", beside)[0].rows == 8
    assert held(file, "soft_targets", beside) is not None


def test_shards_of_an_object_store(s3, samples):
    store = Store.open(s3.root, create=True)
    samples.add_targets(store, range(16))
    memory = Memory(None)
    first, second = (
        store.stored("soft_targets", commit.shard.sha256)[0]
        for commit in store.commits("soft_targets")
    )
    assert check_file(first, "soft_targets", memory)[0].rows == 8
    assert held(first, "soft_targets", memory) is not None
    store.files.replace(first.name, store.files.read(second.name))
    assert held(first, "soft_targets", memory) is None
    with pytest.raises(IntegrityError, match=f"{s3.root}/{first.name}: its sha256 is "):
        check_file(first, "soft_targets", memory)
