"""Features through the whole house: the run, what is shown of them, and what is not done yet."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from planting import rows_of

from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store

MULTIPLIED = ("queries", "keys", "values")
SCORE = {
    "k": 4,
    "features": [
        {"what": "hidden", "layers": [0, 2]},
        *({"what": what, "layers": [2]} for what in MULTIPLIED),
    ],
}
LOSS = {
    "features": [
        {
            "match": "hidden",
            "layers": {0: 0, 2: 1},
            "weight": {"shape": "linear", "start": 1.0, "end": 0.5},
            "distance": "cosine",
        },
        {"match": "attention", "weight": 0.5},
        {"match": "relations", "of": ["values"], "relation_heads": 2},
    ]
}


def recipe(folder: Path, teacher: Path, **sections: Any) -> Path:
    source = write_jsonl(folder / "prompts.jsonl", prompts(24))
    base = {
        "score": SCORE,
        "loss": LOSS,
        "student": {"config": {"num_hidden_layers": 2, "hidden_size": 8}},
        "evaluate": {"tokens": 200, "samples": 0},
    }
    return write_recipe(folder, teacher, source, **base | sections)


@pytest.fixture
def teacher(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(num_hidden_layers=3)


def test_from_prompts_to_the_report(tmp_path: Path, teacher: Path) -> None:
    path = recipe(tmp_path, teacher)
    done = last_json(stillroom("run", path, "--json"))
    assert done["stages"]["train"]["state"] == "done"
    store = Store.open(tmp_path / "store")

    found = last_json(stillroom("status", path, "--json"))["stages"]["score"]["features"]
    assert found["vectors"] == sum(commit.tokens for commit in store.commits("features"))
    assert found["rounding_error"].keys() == {
        "hidden 0 int8",
        "hidden 2 int8",
        *(f"{what} 2 float16" for what in MULTIPLIED),
    }
    assert all(0 < error["mean"] < 0.02 for error in found["rounding_error"].values())
    shown = stillroom("status", path).stdout.splitlines()
    assert sum(line.startswith(("hidden ", "queries ", "keys ", "values ")) for line in shown) == 5
    notes = last_json(stillroom("plan", path, "--json"))["notes"]
    assert "  hidden states of blocks 0, 2: 40 bytes a token, int8" in notes
    assert max(map(len, notes)) < 100, "a line for each layout"

    trained = {row["text_key"] for row in rows_of(store, "features")}
    key = next(row["key"] for row in rows_of(store) if row["text_key"] in trained)
    sample = last_json(done := stillroom("inspect", store.root, "--key", key.hex(), "--json"))
    tokens = len(sample["token_ids"])
    hidden = {"kind": "hidden", "layer": 0, "vectors": tokens, "width": 16, "dtype": "int8"}
    assert sample["features"][0] == hidden
    assert len(sample["features"]) == len(found["rounding_error"])
    assert sum(line.startswith("hidden ") for line in done.stdout.splitlines()) == 2

    (run,) = [p for p in (tmp_path / "run").glob("train-*") if (p / "evaluation.json").exists()]
    history = json.loads((run / "train.json").read_text())["history"]
    names = {"hidden_0_to_0_cosine", "hidden_2_to_1_cosine"}
    names |= {"attention_2_to_1", "relations_2_to_1_values"}
    assert all(point["features"].keys() == names for point in history)
    report = (tmp_path / "run" / "report.md").read_text()
    for said in (
        "(linear: 1.0 to 0.5) x hidden (cosine, layers 0 to 0, 2 to 1)",
        "0.5 x attention (heads each, layers last)",
        "1.0 x relations (of values, relation heads 2, layers last)",
        "hidden states of block 0 (int8), hidden states of block 2 (int8), "
        "queries of block 2 (float16)",
        "arXiv 2012.15828",
        "relations 2 to 1 values",
        "1 - s.t / ",
        "hidden 0 to 0 cosine",
        "hidden 2 to 1 cosine",
    ):
        assert said in report
    assert "hidden 2 to 1 cosine" in (tmp_path / "run" / "report.html").read_text()

    again = last_json(stillroom("run", path, "--json"))
    assert {stage["state"] for stage in again["stages"].values()} == {"cached"}
    assert verify(store).ok
    kept = {commit.shard.name for commit in store.commits("features")}
    assert not kept & vacuum(store, older_than_hours=0).files.keys()


def test_losses_between_samples_have_a_part_each_in_the_report(
    tmp_path: Path, teacher: Path
) -> None:
    score = {"k": 4, "features": [{"what": "pooled", "layers": [2], "pooling": "last"}]}
    asked = [
        {"match": match, "layers": {2: 1}, "pooling": "last", "group": 4}
        for match in ("rkd", "infonce")
    ]
    path = recipe(tmp_path, teacher, score=score, loss={"features": asked})
    notes = last_json(stillroom("plan", path, "--json"))["notes"]
    assert "features: 92 bytes a text of the rows to train on" in notes
    assert "  pooled (last) states of block 2: 92 bytes a text, float16" in notes
    stillroom("run", path)
    found = last_json(stillroom("status", path, "--json"))["stages"]["score"]["features"]
    assert found["rounding_error"].keys() == {"pooled_last 2 float16"}
    report = (tmp_path / "run" / "report.md").read_text()
    for said in (
        "1.0 x rkd (pooling last, group 4, layers 2 to 1)",
        "1.0 x infonce (pooling last, group 4, temperature 0.07, layers 2 to 1)",
        "pooled (last) states of block 2 (float16)",
        "rkd 2 to 1 distance",
        "rkd 2 to 1 angle",
        "infonce 2 to 1",
        "Park et al. 2019",
    ):
        assert said in report


def test_what_a_snapshot_names_stays_though_it_is_withdrawn(tmp_path: Path, teacher: Path) -> None:
    """A damaged shard of features is withdrawn, made again, and the student is another one."""
    path = recipe(tmp_path, teacher)
    stillroom("run", path, "--until", "train")
    store = Store.open(tmp_path / "store")
    commit = store.commits("features")[0]
    store.retire(commit, reason="for this test")
    assert commit.shard.name not in vacuum(store, older_than_hours=0).files
    lines = last_json(stillroom("plan", path, "--json"))["stages"]
    assert lines["score"]["why"].endswith("stored without features")
    stillroom("run", path, "--until", "train")
    assert last_json(stillroom("plan", path, "--json"))["stages"]["train"]["state"] == "done"


def test_export_says_that_features_stay(tmp_path: Path, teacher: Path) -> None:
    path = recipe(tmp_path, teacher, student=None, train=None, loss=None, evaluate={"tokens": 200})
    stillroom("run", path)
    words = [
        word for name in ("", "teacher-", "source-") for word in (f"--{name}license", "cc0-1.0")
    ]
    done = stillroom("export", tmp_path / "store", tmp_path / "out", *words)
    assert "features that stay in" in done.stdout + done.stderr
    assert not [p for p in (tmp_path / "out").rglob("*") if "features" in p.name]
    published = str(tmp_path / "out")
    path = recipe(
        tmp_path,
        Path(published),
        storage={"dir": str(tmp_path / "other"), "sources": [published]},
        data={"source": published, "format": "prompt"},
        generate=None,
    )
    refused = stillroom("plan", path, expect=2)
    assert "is published without features" in refused.stderr
