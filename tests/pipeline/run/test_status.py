"""What a column costs, from the footers of the shards, all of them or some."""

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from stillroom.pipeline.run import status
from stillroom.storage.errors import IntegrityError
from stillroom.storage.keys import content_key
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits

ABOUT = {"author_id": "a", "tokenizer_id": "k", "vocab_size": 50, "stage": "generate"}


@pytest.fixture
def store(tmp_path) -> Store:
    """Seven shards of generations, the later the longer."""
    store = Store.open(tmp_path / "store", create=True)
    with store.writer("generations", about=ABOUT, limits=CommitLimits(rows=1)) as writer:
        for index in range(7):
            key = content_key("test", index=index)
            row = dict.fromkeys(("key", "reuse_key", "prompt_key", "tokens_key"), key)
            row |= dict.fromkeys(("author_id", "sampling_id"), "a")
            row |= {
                "sample_index": 0,
                "token_ids": [1, 2, *range(index + 1)],
                "prompt_tokens": 2,
                "text": "x",
            }
            writer.add(
                row
                | {
                    "completion_tokens": index + 1,
                    "finish_reason": "stop",
                    "max_tokens": 9,
                    "row_seed": 0,
                }
            )
    return store


def test_columns_and_the_rest_are_the_whole_file(store):
    commits = store.commits("generations")
    found = status.column_costs(store, commits)
    size, tokens = sum(c.shard.bytes for c in commits), sum(c.tokens for c in commits)
    assert (found["shards"], found["footers_read"]) == (7, 7)
    assert sum(found["bytes_per_token_by_column"].values()) == pytest.approx(
        size / tokens, abs=0.05
    )
    assert list(found["bytes_per_token_by_column"].values()) == sorted(
        found["bytes_per_token_by_column"].values(), reverse=True
    )
    assert {"token_ids", "text", "key"} < set(found["bytes_per_token_by_column"])
    assert status.column_costs(store, []) == {}


def shard_of(statistics: Any) -> Any:
    return SimpleNamespace(name="a.parquet", about={"statistics": statistics})


@pytest.mark.parametrize(
    "statistics",
    [
        None,
        [1],
        {"topk": 3},
        {"odd": {"tokens": 1}},
        {"full": {"tokens": 1}},
        {"full": {"tokens": 0}},
    ],
)
def test_statistics_that_are_none_are_named(statistics: Any) -> None:
    with pytest.raises(IntegrityError, match=r"a\.parquet: not a description of targets of this"):
        status._kept([shard_of(statistics)])


def test_what_targets_keep_is_the_mean_over_the_tokens_of_all_shards():
    part = {"rows": 1, "tokens": 10, "entries_per_token": 4.0, "kept_mass": {"mean": 0.9}}
    drawn = {"rows": 1, "tokens": 5, "entries_per_token": 3.0, "entries": {"mean": 3.0}}
    more = part | {"tokens": 30, "entries_per_token": 8.0, "kept_mass": {"mean": 0.5}}
    kept = status._kept(map(shard_of, [{"topk": part}, {}, {"topk": more, "sampled": drawn}]))
    assert kept == {
        "sampled": {"tokens": 5, "entries_per_token": 3.0, "kept_mass": None},
        "topk": {"tokens": 40, "entries_per_token": 7.0, "kept_mass": 0.6},
    }
    line = status._kept_line("score", kept)
    assert line.endswith("sampled 3.00 (5), topk 7.00 holding 0.6000 (40)")


def test_of_many_shards_some_are_read_and_that_is_said(store, monkeypatch):
    monkeypatch.setattr(status, "FOOTERS", 3)
    commits = store.commits("generations")
    found = status.column_costs(store, commits)
    assert (found["shards"], found["footers_read"]) == (7, 3)
    chosen = commits[::3]
    expected = sum(c.shard.bytes for c in chosen) / sum(c.tokens for c in chosen)
    assert sum(found["bytes_per_token_by_column"].values()) == pytest.approx(expected, abs=0.05)
    stage = {
        "state": "done",
        "rows": 7,
        "rejected": 0,
        "pending": 0,
        "tokens": 28,
        "tokens_per_second": None,
    }
    console = Console(record=True, width=500)
    console.print(status.status_tables({"generate": stage | found}))
    text = console.export_text()
    assert "generate, bytes/token by column (3 of 7 shards): " in text
    largest, size = next(iter(found["bytes_per_token_by_column"].items()))
    assert f"{largest} {size:.2f}, " in text
    assert "others" in text
