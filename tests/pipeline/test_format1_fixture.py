"""What an earlier version wrote (`tests/fixtures/format1`) is read, goes on and keeps its names."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from format1 import FORMAT1, SHIPPED, contents, identities, names_in, trained, unpack
from kit import last_json, stillroom
from safetensors.numpy import load_file
from tiny_store import SilentProgress

pytestmark = pytest.mark.slow

EXPECTED = json.loads((FORMAT1 / "expected.json").read_text())
RECIPES = ("prompt", "text", "completion", "messages", "instruction", "labelled")
STALE = ("completion", "messages")  # their answers, all of them
LICENSES = [
    word for name in ("", "teacher-", "source-") for word in (f"--{name}license", "cc0-1.0")
]


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it in the working directory, for its recipes name relative paths."""
    unpack(tmp_path)
    monkeypatch.chdir(tmp_path)


def recipe(name: str) -> str:
    return f"recipes/{name}.yaml"


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in STALE])
def test_all_is_done(name: str) -> None:
    lines = last_json(stillroom("plan", recipe(name), "--json"))["stages"]
    assert {"data", "train"} <= lines.keys()
    assert {stage: line["state"] for stage, line in lines.items()} == dict.fromkeys(lines, "done")


@pytest.mark.parametrize("name", STALE)
def test_answers_that_were_tokenized_alone_are_named(name: str) -> None:
    """`mat` and `and` of a prompt and its completion are one word.

    The template writes no end token.
    """
    line = last_json(stillroom("plan", recipe(name), "--json"))["stages"]["data"]
    assert (line["state"], line["why"]) == ("to do", "answer was tokenized alone: 4 of 4")


def test_another_setting_is_still_seen() -> None:
    """`plan` can say something else than done."""
    words = ("--set", "train.learning_rate=0.004", "--json")
    line = last_json(stillroom("plan", recipe("prompt"), *words))["stages"]["train"]
    assert (line["state"], line["why"]) == ("to do", "train.learning_rate: 0.005 -> 0.004")


def test_the_store_is_whole() -> None:
    found = last_json(stillroom("verify", "store", "--json"))
    assert found["ok"]
    assert {table: found["tables"][table]["rows"] for table in EXPECTED["rows"]} == EXPECTED["rows"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_rows_are_exported(name: str) -> None:
    settings = json.loads((trained(Path("runs") / name) / "settings.json").read_text())["settings"]
    stillroom("export", "store", "exported", "--snapshot", settings["snapshot"], *LICENSES)
    assert contents(Path("exported")) == EXPECTED["exports"][name]


def test_a_training_goes_on_from_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained(Path("runs/prompt"))
    before = json.loads((folder / "train.json").read_text())
    weights = load_file(folder / "student" / "model.safetensors")
    (folder / "train.json").unlink()
    shutil.rmtree(folder / "student")

    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "say", lambda _, text: said.append(text))
    done = stillroom("run", recipe("prompt"), "--only", "train", "--json")
    assert any("going on after step 6" in line for line in said)
    states = {name: stage["state"] for name, stage in last_json(done)["stages"].items()}
    assert states == {"train": "done", "baseline": "cached"}

    after = json.loads((folder / "train.json").read_text())
    counts = ("steps", "tokens", "scored_tokens", "samples", "snapshot", "parameters")
    assert [after[name] for name in counts] == [before[name] for name in counts]
    assert after["history"][:6] == before["history"][:6], "read from the checkpoint, not made again"
    assert_close_losses(after["history"], before["history"])
    assert_close_weights(load_file(folder / "student" / "model.safetensors"), weights)


def assert_close_losses(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    np.testing.assert_allclose([p["loss"] for p in found], [p["loss"] for p in expected], rtol=1e-5)


def assert_close_weights(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Another processor sums in another order: a gradient is off by about 1e-6 of the largest one.

    Adam divides a gradient by its own size, so one that is a hundredth of the largest moves its
    weight wrongly by 1e-4 of the learning rate, 5e-3, in each of eleven steps: together 5e-6. Four
    times that is allowed. The steps themselves moved every tensor by 1e-2 or more.
    """
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=2e-5, err_msg=name)


NAMES = {
    "prompts": ["key", "prompt_key"],
    "generations": [
        "key",
        "reuse_key",
        "prompt_key",
        "source_key",
        "sampling_id",
        "tokens_key",
        "row_seed",
    ],
    "soft_targets": [
        "key",
        "reuse_key",
        "prompt_key",
        "generation_key",
        "tokens_key",
        "teacher_id",
    ],
}


@pytest.mark.parametrize(
    ("name", "last"), [("prompt", "generate"), ("text", "score"), ("labelled", "data")]
)
def test_rows_made_again_have_the_same_names(name: str, last: str) -> None:
    """The store is empty, so what is asked for is found in an old one, and found as what it is."""
    Path("store").rename("before")
    stillroom("run", recipe(name), "--until", last)
    for folder, names in names_in(Path("store")).items():
        assert set(names) <= set(EXPECTED["names in the store"][folder])
        assert names or (folder, last) == ("claims", "data")
    for table in [table for table in NAMES if table != "soft_targets" or last == "score"]:
        # On another processor another word may be drawn, and then the row asks for other targets.
        columns = [name for name in NAMES[table] if name != "tokens_key" or last != "generate"]
        again = rows_by_name(Path("store"), table, columns)
        assert again, table
        assert again <= rows_by_name(Path("before"), table, columns), table


def rows_by_name(store: Path, table: str, columns: list[str]) -> set[tuple[Any, ...]]:
    """What rows are called, and what they serve."""
    rows = ds.dataset(store / "data" / table, format="parquet").to_table(columns)
    return set(zip(*(column.to_pylist() for column in rows.columns), strict=True))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_keep_their_hashes(name: str) -> None:
    assert identities(name) == EXPECTED["shipped recipes"][name]
