"""Answers that an earlier rule tokenized alone.

Those with equal tokens are reused; others are named in the plan and made again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, stillroom, write_jsonl, write_recipe

from stillroom.pipeline.plan.resolve import bind
from stillroom.stages.data.formats import prompt_row
from stillroom.stages.data.inputs import Intake
from stillroom.stages.data.stage import inputs_id
from stillroom.stages.data.tokenizing import earlier_author_id
from stillroom.stages.ledger.requests import tokens_key
from stillroom.stages.models.identity import FileHashes
from stillroom.stages.models.inputs.rendering import Renderer
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.workers.shard_about import about
from stillroom.storage.store.store import Store
from stillroom.storage.tables.row_builders import given_row

EQUAL = [{"prompt": f"the {word}", "completion": " sat on a mat"} for word in ("cat", "dog")]
GLUED = {"prompt": "the tree", "completion": "ran"}  # "treeran" is one word, which nobody knows


def store_of_before(path: Path) -> tuple[Store, bytes]:
    """Fill the recipe's store as the earlier rule did; the key of the last record's row."""
    recipe = load_recipe(path)
    store = Store.open(recipe.storage.dir, create=True)
    teacher = bind(recipe, write=True).teacher
    assert teacher is not None
    store.put_teacher(teacher.id, teacher.files_to_keep())
    author = earlier_author_id(recipe.data, teacher)
    renderer, rows = Renderer(teacher.folder, {}), Intake()
    records = [(f"a:{n}", record) for n, record in enumerate(_records(recipe.data.source))]
    made = about("data", recipe, {}, author_id=author)
    with (
        store.writer("prompts", about=made) as prompts,
        store.writer("generations", about=made) as texts,
    ):
        for source, record in records:
            row = prompt_row(record, source, recipe.data, given=True)
            prompts.add(row)
            rows.add(row["key"], row["prompt_key"])
            texts.add(_tokenized_alone(renderer, row, author))
    hashes = FileHashes(recipe.storage.dir, remember=False)
    data_id = inputs_id(recipe, teacher, hashes, author_id=author)
    store.put_inputs(data_id, rows.table(0), {"source": "a", "rejected": 0, "format": "completion"})
    return store, row["key"]


def _records(source: str) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in Path(source).read_text().splitlines()]


def _tokenized_alone(renderer: Renderer, row: dict[str, Any], author: str) -> dict[str, Any]:
    prompt = renderer.prompt_ids(row)
    answer = renderer.tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    ids = [*prompt, *answer, renderer.tokenizer.eos_token_id]
    return given_row(
        author_id=author,
        source_key=row["key"],
        prompt_key=row["prompt_key"],
        window=0,
        tokens_key=tokens_key(ids, len(prompt)),
        token_ids=ids,
        prompt_tokens=len(prompt),
        text=row["completion"],
    )


@pytest.fixture
def recipe(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Factory: a recipe on completions."""

    def make(records: list[dict[str, Any]]) -> Path:
        source = write_jsonl(tmp_path / "a.jsonl", records)
        data = {"source": str(source), "format": "completion", "holdout": 0}
        return write_recipe(tmp_path, tiny_llama(), source, data=data, generate=None)

    return make


def line_of_data(path: Path) -> tuple[str, str]:
    line = last_json(stillroom("plan", path, "--json"))["stages"]["data"]
    return line["state"], line["why"]


def test_equal_answers_serve_as_they_are(recipe: Callable[..., Path]) -> None:
    path = recipe(EQUAL)
    store, _ = store_of_before(path)
    assert line_of_data(path) == ("done", "")
    done = last_json(stillroom("run", path, "--until", "score", "--json"))["stages"]
    assert (done["data"]["state"], done["score"]["rows"]) == ("cached", 2)
    assert store.index("generations", ["key"]).num_rows == 2
    # That they are equal is remembered, and found out again where it is not.
    remembered = list((Path(store.root) / "cache" / "tokenized").iterdir())
    assert len(remembered) == 1
    remembered[0].unlink()
    assert line_of_data(path) == ("done", "")


def test_others_are_named_and_made_again(recipe: Callable[..., Path]) -> None:
    path = recipe([*EQUAL, GLUED])
    store, glued = store_of_before(path)
    assert line_of_data(path) == ("to do", "answer was tokenized alone: 1 of 3")
    done = last_json(stillroom("run", path, "--until", "score", "--json"))["stages"]
    assert done["score"]["rows"] == 3
    found = store.index("generations", ["source_key", "author_id"]).to_pylist()
    again = [row["source_key"] for row in found[3:]]
    assert (len(found), again) == (4, [glued])
    # What is scored of the record is the new row alone; and nothing is left to do.
    scored = store.index("soft_targets", ["tokens_key"]).to_pylist()
    keys = {row["tokens_key"] for row in store.index("generations", ["tokens_key"]).to_pylist()}
    assert len(scored) == 3 < len(keys)
    states = last_json(stillroom("plan", path, "--json"))["stages"]
    assert [states[name]["state"] for name in ("data", "score")] == ["done", "done"]
