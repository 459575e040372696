"""verify, repair and vacuum with the real command line, on a store that a real run made."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe

from stillroom.storage.files.local import LocalFiles
from stillroom.storage.store.commits import Commit, numbers, read_commit
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import TABLES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose soft targets are made."""
    from tiny_llama import save_tiny_llama

    folder = tmp_path_factory.mktemp("finished")
    teacher = save_tiny_llama(folder / "teacher", hidden_size=32)
    recipe = write_recipe(folder, teacher, write_jsonl(folder / "prompts.jsonl", prompts(48)))
    stillroom("run", recipe, "--until", "score")
    return recipe


def rows_of(store: Store) -> dict[str, dict[bytes, dict[str, Any]]]:
    found = {}
    for table in TABLES:
        places: dict[str, list[int]] = {}
        for row in store.index(table, ["key"]).to_pylist():
            places.setdefault(row["shard"], []).append(row["row"])
        rows = list(store.rows(table, places))
        plain = {
            r["key"]: {k: v.tobytes() if hasattr(v, "tobytes") else v for k, v in r.items()}
            for r in rows
        }
        assert len(plain) == len(rows)
        found[table] = plain
    return found


def commits_of(files: LocalFiles, table: Any) -> list[Commit]:
    return [
        record[0]
        for n in numbers(files, table)
        if (record := read_commit(files, table, n)) is not None
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def test_exactly_the_rows_of_damaged_shards_are_made_again(finished: Path) -> None:
    store = Store.open(finished.parent / "store")
    files = LocalFiles(store.root)
    before = rows_of(store)
    commits = {table: store.commits(table) for table in ("prompts", "generations", "soft_targets")}
    damaged = {
        table: random.sample(commits[table], random.randint(1, len(commits[table])))
        for table in commits
    }
    for table in damaged:
        for commit in damaged[table]:
            flip(files.path(commit.shard.name))
    found = last_json(stillroom("verify", store.root, "--json", expect=3))
    assert {p["file"] for p in found["problems"]} == {
        c.shard.name for t in damaged.values() for c in t
    }

    done = last_json(stillroom("repair", store.root, "--json"))
    assert done["ok"]
    assert sorted((c["record"], c["rows"]) for c in done["withdrawn"]) == sorted(
        (f"commits/{table}/{c.seq:08d}.json", c.shard.rows)
        for table in damaged
        for c in damaged[table]
    )
    assert "nothing to repair" in stillroom("repair", store.root).stdout
    last_json(stillroom("run", finished, "--until", "score", "--json"))
    for table, lost in damaged.items():
        again = [c for c in commits_of(files, table) if c.seq > commits[table][-1].seq]
        assert sum(c.shard.rows for c in again) == sum(c.shard.rows for c in lost), table
    assert last_json(stillroom("verify", store.root, "--json"))["ok"]
    assert rows_of(Store.open(store.root)) == before

    gone = last_json(stillroom("vacuum", store.root, "--older-than-hours", "0", "--json"))
    assert set(gone["files"]) >= {c.shard.name for t in damaged.values() for c in t}
    assert last_json(stillroom("verify", store.root, "--json"))["notes"] == []
    assert rows_of(Store.open(store.root)) == before


def test_what_cannot_be_repaired_is_said(finished: Path, tiny_llama: Callable[..., Path]) -> None:
    from stillroom.storage.snapshots.snapshot import make_snapshot, save_snapshot

    store = Store.open(finished.parent / "store")
    commit = store.commits("soft_targets")[-1]
    snapshot = make_snapshot(store, "soft_targets", {commit.shard.sha256: [0]}, {})
    save_snapshot(store, snapshot)
    LocalFiles(store.root).remove(commit.shard.name)
    last = stillroom("verify", store.root, expect=3).stdout.splitlines()[-1]
    assert "`stillroom repair` withdraws what is damaged; then run again. 1 cannot be" in last
    done = stillroom("repair", store.root, "--json", expect=3)
    assert (
        f"LEFT      snapshots/{snapshot.id}.json: its shard {commit.shard.name} is damaged"
        in done.stdout
    )
    assert [p["file"] for p in last_json(done)["left"]] == [f"snapshots/{snapshot.id}.json"]
    last = stillroom("verify", store.root, expect=3).stdout.splitlines()[-1]
    assert last.startswith("1 problem. 1 cannot be repaired: a snapshot whose shard is gone")
