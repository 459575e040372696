"""A few hundredths of what `fuzz.py` does, with the same examples every time.

What it found has tests of its own.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from kit import stillroom

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import Tally, fuzz
from fuzz_edits import as_json
from fuzz_targets import seal_anything, targets
from fuzz_world import ON_STORE, OTHER_TASKS, RECORDS, OtherWorld, World

EXAMPLES = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz") / "world")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", targets())
def test_damaged_input_ends_as_documented(world: World, name: str) -> None:
    tally = Tally()
    fuzz(world, name, targets()[name], tally, examples=EXAMPLES, number=0)
    assert tally.examples[name] >= 1
    assert not tally.findings


@pytest.fixture(scope="module", params=OTHER_TASKS)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return OtherWorld(tmp_path_factory.mktemp("fuzz") / "world", request.param)


@pytest.mark.parametrize("name", ON_STORE)
def test_damaged_stores_of_other_tasks_end_as_documented(other: World, name: str) -> None:
    tally = Tally()
    fuzz(other, name, targets()[name], tally, examples=EXAMPLES, number=1)
    assert tally.examples[name] >= 1
    assert not tally.findings


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", b"{"),
        ("train.json", b"{}"),
        ("train.json", b'{"samples": "1", "tokens": 1}'),
        ("evaluation.json", b"["),
        ("evaluation.json", b"[]"),
    ],
)
def test_a_damaged_record_of_a_training_run_is_named(
    world: World, name: str, content: bytes
) -> None:
    world.fresh()
    next(world.work.glob(f"run/train-*/{name}")).write_bytes(content)
    assert name in stillroom("plan", world.work / "recipe.yaml", expect=3).stderr


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_damaged_tokenizer_of_a_store_is_named(world: World, command: str) -> None:
    world.fresh()
    next(world.work.glob("store/teachers/*/tokenizer.json")).write_bytes(b"{")
    to = [world.work / "new", "--license", "mit"] if command == "export" else []
    assert (
        "tokenizer.json: not a tok"
        in stillroom(command, world.work / "store", *to, expect=3).stderr
    )


def test_statistics_of_a_version_that_are_none_are_named(world: World) -> None:
    world.fresh()
    path = next(world.work.glob("published-0/*/MANIFEST.json"))
    manifest = json.loads(path.read_bytes())
    for found in manifest["statistics"].values():
        found.update(dict.fromkeys(found, "x"))
    path.write_bytes(as_json(seal_anything(manifest)))
    words = ["export", world.work / "store", world.work / "published-0", "--license", "mit"]
    assert "MANIFEST.json or PROVENANCE.json: not a published" in stillroom(*words, expect=3).stderr


def test_an_arrow_file_is_read_as_parquet_is(world: World) -> None:
    world.fresh()
    table = pa.Table.from_pylist(RECORDS["prompt"])
    source = world.work / "prompts.arrow"
    with pa.ipc.new_file(str(source), table.schema) as writer:
        writer.write_table(table)
    recipe = [world.work / "data-prompt.yaml", "--set", f"data.source={source}", "--json"]
    stages = json.loads(stillroom("plan", *recipe).stdout.splitlines()[-1])["stages"]
    assert stages
    source.write_bytes(b"ARROW1")
    assert "not readable Arrow" in stillroom("plan", *recipe, expect=2).stderr
