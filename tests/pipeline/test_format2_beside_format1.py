"""Rows of format 2 beside those that an earlier version wrote.

Those are in `tests/fixtures/format1`. There is one store and one snapshot.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format1 import trained, unpack
from kit import last_json, stillroom

from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.verify import verify
from stillroom.storage.joined import open_store
from stillroom.storage.published.choice import Choice
from stillroom.storage.published.export import make_tables
from stillroom.storage.published.manifest import read_manifest
from stillroom.storage.snapshots.reader import SnapshotReader
from stillroom.storage.snapshots.snapshot import Snapshot, load_snapshot, make_snapshot
from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import SCHEMAS
from stillroom.storage.tables.soft_targets import SoftTargets
from stillroom.storage.tables.spans import flat, positions, spans_of

pytestmark = pytest.mark.slow

RECIPE = "recipes/prompt.yaml"
OLD = 20  # rows of generations and of soft targets of that recipe


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it in the working directory, for its recipes name relative paths."""
    unpack(tmp_path)
    monkeypatch.chdir(tmp_path)


def with_more_prompts() -> None:
    """Two more, so that a run makes rows."""
    data = Path("data/prompt.jsonl")
    more = [{"prompt": f"the {words}"} for words in ("red cat ran under", "happy dog sat on")]
    data.write_text(data.read_text() + "".join(json.dumps(one) + "\n" for one in more))


def versions(store: Any, snapshot: Snapshot) -> list[int]:
    """The format versions of the shards that a snapshot names."""
    shards = (store.shard(snapshot.table, shard.sha256) for shard in snapshot.shards)
    return sorted({shard.about["format_version"] for shard in shards})


def snapshot_of_run(store: Any) -> Snapshot:
    settings = json.loads((trained(Path("runs/prompt")) / "settings.json").read_text())["settings"]
    return load_snapshot(store, settings["snapshot"])


def test_a_store_goes_on_and_one_snapshot_holds_both() -> None:
    before = json.loads(Path("store/STORE.json").read_text())
    with_more_prompts()
    stillroom("run", RECIPE, "--set", "run.dir=runs/more")
    marker = json.loads(Path("store/STORE.json").read_text())
    assert (marker["format_version"], marker["store_id"]) == (2, before["store_id"])

    store = Store.open("store")
    settings = json.loads((trained(Path("runs/more")) / "settings.json").read_text())["settings"]
    snapshot = load_snapshot(store, settings["snapshot"])
    assert versions(store, snapshot) == [1, 2]
    lines = last_json(stillroom("plan", RECIPE, "--set", "run.dir=runs/more", "--json"))["stages"]
    assert {line["state"] for line in lines.values()} == {"done"}
    assert verify(store).ok

    found = query(
        store, "SELECT text_key IS NULL AS old, count(*) AS n FROM generations GROUP BY 1"
    )
    assert {row["old"]: row["n"] for row in found.to_pylist()} == {True: 50, False: 4}

    words = [w for n in ("", "teacher-", "source-") for w in (f"--{n}license", "cc0-1.0")]
    stillroom("export", "store", "exported", "--snapshot", snapshot.id, *words)
    manifest = read_manifest(LocalFiles(Path("exported")))
    assert {facts["format_version"] for facts in manifest.tables.values()} == {2}
    assert "spans" in manifest.tables["soft_targets"]["columns"]
    assert "tools" not in manifest.tables["generations"]["columns"]


def test_what_was_published_before_is_a_source_of_a_store_of_today() -> None:
    words = [w for n in ("", "teacher-", "source-") for w in (f"--{n}license", "cc0-1.0")]
    snapshot = snapshot_of_run(Store.open("store"))
    stillroom("export", "store", "exported", "--snapshot", snapshot.id, *words)
    manifest = read_manifest(LocalFiles(Path("exported")))
    assert json.loads(manifest.sealed())["published_version"] == 1
    assert not any("format_version" in facts for facts in manifest.tables.values())

    with_more_prompts()
    named = ("--set", "storage.dir=new", "--set", "storage.sources=[exported]")
    stillroom("run", RECIPE, *named, "--set", "run.dir=runs/new")
    settings = json.loads((trained(Path("runs/new")) / "settings.json").read_text())["settings"]
    store = open_store("new", ["exported"])
    snapshot = load_snapshot(store, settings["snapshot"])
    assert sorted(bool(shard.source) for shard in snapshot.shards) == [False, True]
    assert versions(store, snapshot) == [1, 2]
    own = [commit.shard.rows for commit in Store.open("new").commits("soft_targets")]
    assert sum(own) == 4


def test_rows_of_several_spans_beside_rows_of_one() -> None:
    """Each other position of an old row is scored in the new one.

    So no span touches another.
    """
    store = Store.open("store", create=True)
    old = store.commits("soft_targets")[0]
    rows = list(store.rows("soft_targets", {old.shard.sha256: range(OLD)}))
    about = store.shard("soft_targets", old.shard.sha256).about
    about = {k: v for k, v in about.items() if k not in ("format_version", "table", "statistics")}
    with store.writer("soft_targets", about=about) as writer:
        new = [every_other(row) for row in rows if row["span_tokens"] >= 3]
        for row in new:
            writer.add(row)
    assert verify(store).ok

    added = store.commits("soft_targets")[-1]
    places = {old.shard.sha256: range(OLD), added.shard.sha256: range(len(new))}
    snapshot = make_snapshot(store, "soft_targets", places, {"split": "train"})
    assert versions(store, snapshot) == [1, 2]
    read = {
        row["key"]: row
        for row in SnapshotReader(store, snapshot, SCHEMAS["soft_targets"].names).samples(
            seed=0, stop=OLD + len(new)
        )
    }
    assert read.keys() == {row["key"] for row in [*rows, *new]}
    for row in [*rows, *new]:
        assert spans_of(read[row["key"]]).tolist() == spans_of(row).tolist()

    Path("out").mkdir()
    written = make_tables(store, {"train": snapshot}, Path("out"), Choice())
    assert written.splits["train"].scored_tokens == sum(r["span_tokens"] for r in [*rows, *new])


def every_other(row: dict[str, Any]) -> dict[str, Any]:
    chosen = slice(0, None, 2)
    spans = np.array([[index, 1] for index in positions(spans_of(row))[chosen]])
    columns = SoftTargets.from_row(row).positions(chosen).columns(row["mantissa_bits"])
    key = bytes([*reversed(row["key"])])
    return row | columns | {"key": key, "spans": flat(spans)}
