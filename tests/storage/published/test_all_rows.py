"""All that a store holds: one row a text, the split of its prompt.

What only a recipe can know is refused.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from published import HELD_OUT, ROWS, generation_row, make_store, samples, target_row

from stillroom.storage.errors import UsageError
from stillroom.storage.keys import content_key
from stillroom.storage.published.all_rows import WHOLE_STORE, all_rows
from stillroom.storage.published.selection import find_snapshots
from stillroom.storage.snapshots.snapshot import Snapshot, save_snapshot
from stillroom.storage.store.bindings import Binding, write_binding
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import TableName

TRAIN = ROWS - HELD_OUT
BINDING = Binding(
    teacher_id=samples.ABOUT["teacher_id"],
    author_id=samples.GENERATIONS_ABOUT["author_id"],
    data_id="e" * 32,
    vocab_size=samples.VOCABULARY,
    context_tokens=64,
    author_context_tokens=64,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The last rows are held out by the newest record of the data."""
    made = make_store(tmp_path / "store")
    hold_out(made, "e" * 32, range(TRAIN, ROWS))
    return made


def hold_out(store: Store, data_id: str, numbers: Iterable[int]) -> None:
    keys = [samples.prompt_row(index)["key"] for index in range(ROWS)]
    held = set(numbers)
    table = pa.table(
        {
            "key": keys,
            "prompt_key": keys,
            "split": ["test" if index in held else "train" for index in range(ROWS)],
            "windows": pa.array([1] * ROWS, pa.int32()),
            "first": [True] * ROWS,
        }
    )
    store.put_inputs(data_id, table, {"source": "prompts.jsonl", "format": "messages"})


def add(
    store: Store, rows: Iterable[dict[str, Any]], table: TableName = "soft_targets", **more: Any
) -> None:
    about = samples.ABOUT if table == "soft_targets" else samples.GENERATIONS_ABOUT
    with store.writer(table, about=about | more) as writer:
        for row in rows:
            writer.add(row)


def kinds(store: Store, snapshot: Snapshot) -> set[tuple[str, int]]:
    places = {shard.sha256: shard.rows.tolist() for shard in snapshot.shards}
    return {(row["kind"], row["k"]) for row in store.rows(snapshot.table, places, ["kind", "k"])}


def named(index: int, **changes: Any) -> dict[str, Any]:
    return target_row(index, "topk") | {"key": content_key("again", index=index)} | changes


def test_each_split_has_its_targets(store: Store) -> None:
    found = all_rows(store)
    assert {split: one.rows for split, one in found.items()} == {"train": TRAIN, "test": HELD_OUT}
    assert kinds(store, found["train"]) == {("topk", 6)}
    assert kinds(store, found["test"]) == {("full", samples.VOCABULARY)}
    splits = {split: one.id for split, one in found.items()}
    assert all(one.about["splits"] == splits for one in found.values())
    assert all_rows(store)["train"].id == splits["train"]


def test_the_best_row_of_a_text_goes_out(store: Store) -> None:
    """A text is scored again with more entries.

    What was held out once has both, and a whole distribution for judging.
    """
    wide = samples.target_row(0, tokens=3, k=9) | {"key": content_key("again", index=0)}
    add(store, [wide, named(ROWS - 1)])
    found = all_rows(store)
    assert {split: one.rows for split, one in found.items()} == {"train": TRAIN, "test": HELD_OUT}
    assert kinds(store, found["train"]) == {("topk", 6), ("topk", 9)}
    assert kinds(store, found["test"]) == {("full", samples.VOCABULARY)}


def test_of_texts_asked_for_alike_the_one_that_is_not_cut_goes_out(store: Store) -> None:
    cut = generation_row(0) | {
        "key": content_key("cut", index=0),
        "tokens_key": content_key("cut_tokens", index=0),
        "finish_reason": "length",
    }
    add(store, [cut], "generations")
    add(store, [named(0, tokens_key=cut["tokens_key"], generation_key=cut["key"])])
    assert all_rows(store)["train"].rows == TRAIN


def test_the_newest_record_of_the_data_decides_the_split(store: Store) -> None:
    hold_out(store, "f" * 32, range(2))
    assert all_rows(store)["test"].rows == HELD_OUT + 2  # nobody knows which is newer
    write_binding(store.files, "bindings/a", replace(BINDING, data_id="f" * 32))
    found = all_rows(store)
    assert found["test"].rows == 2
    assert kinds(store, found["test"]) == {("topk", 6)}
    assert found["train"].about["data_id"] == "f" * 32


def test_text_alone_is_split_too(store: Store) -> None:
    for commit in store.commits("soft_targets"):
        store.retire(commit, reason="test")
    found = all_rows(store)
    assert {one.table for one in found.values()} == {"generations"}
    assert {split: one.rows for split, one in found.items()} == {"train": TRAIN, "test": HELD_OUT}


def test_what_only_a_recipe_knows_is_refused(store: Store) -> None:
    add(store, [named(index, **other_kind(index)) for index in range(TRAIN)])
    with pytest.raises(
        UsageError, match=r"several kinds of targets \(sampled multinomial 1\.0, topk\)"
    ):
        all_rows(store)
    add(store, [named(30, teacher_id="9" * 32)], teacher_id="9" * 32)
    with pytest.raises(UsageError, match=r"soft_targets of 2 teachers .* Name the recipe in place"):
        all_rows(store)
    write_binding(store.files, "bindings/a", BINDING)
    write_binding(store.files, "bindings/b", replace(BINDING, data_id="d" * 32))
    with pytest.raises(UsageError, match="2 pairs of a teacher and its data"):
        all_rows(store)


def other_kind(index: int) -> dict[str, Any]:
    return target_row(index, "sampled") | {"key": content_key("drawn", index=index)}


def test_a_snapshot_of_all_rows_does_not_stand_for_a_training(store: Store) -> None:
    """So an export after more rows came takes those too."""
    first = all_rows(store)
    for snapshot in first.values():
        assert snapshot.about[WHOLE_STORE]
        save_snapshot(store, snapshot)
    add(store, [generation_row(ROWS)], "generations")
    add(store, [target_row(ROWS, "topk")])
    assert find_snapshots(store, None)["train"].rows == TRAIN + 1
    assert find_snapshots(store, first["test"].id[:8])["train"].rows == TRAIN
