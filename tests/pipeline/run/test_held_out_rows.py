"""Held-out rows of the user's own, from the recipe to the report.

They are generated, given and labelled, and nothing else judges.

The stages run in this process.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from tiny_classes import records
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert

from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store

pytestmark = pytest.mark.slow

LONG = "the cat sat on the mat and the dog ran to the big red tree"
FORMATS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "text": {"generate": None},
    "labelled": {"generate": None, "score": {"targets": "full"}},
}


def rows(name: str) -> tuple[list[Any], list[Any]]:
    """To train on and to judge by; two are in both."""
    if name == "labelled":
        found = records(20)
        return found[:14], found[12:]
    texts = [{"prompt": r["prompt"], "text": f"{r['prompt']} {LONG}"} for r in prompts(12)]
    return texts[:8], texts[6:]


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_recipe_names_judges_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    train, judged = rows(name)
    write_jsonl(tmp_path / "data" / "train.jsonl", [*train, {}])
    write_jsonl(tmp_path / "data" / "test.jsonl", judged)
    labelled = name == "labelled"
    data = {"source": str(tmp_path / "data"), "format": name}
    recipe = write_recipe(
        tmp_path,
        (save_tiny_bert if labelled else save_tiny_llama)(tmp_path / "teacher"),
        tmp_path,
        run={"dir": str(tmp_path / "run"), "task": "classification" if labelled else "causal_lm"},
        data=data | ({"window_tokens": 8} if name == "text" else {}),
        train={"epochs": 1, "tokens_per_step": 128},
        evaluate={"split": "test", "tokens": 100_000, "samples": 1},
        **FORMATS[name],
    )
    asked = last_json(stillroom("plan", recipe, "--json"))
    note = f"held out: {len(judged)} rows of {data['source']}, split test"
    both = "records left out of training: 2. Their prompts are held out too"
    unlabelled = [said for said in asked["notes"] if said.startswith("texts without a label: 1 of")]
    assert len(unlabelled) == labelled
    assert [said for said in asked["notes"] if said not in unlabelled] == [both, note]
    line = asked["stages"]["data"]
    assert (line["rejected"], line["planned"]) == (1, len(train) + len(judged) - 1)
    assert f"1 rejected: missing_column, the first at train.jsonl:{len(train) + 1}" in line["why"]
    outcome = last_json(stillroom("run", recipe, "--json"))
    assert {stage["state"] for stage in outcome["stages"].values()} == {"done"}
    (file,) = (tmp_path / "run").glob("train-*/evaluation.json")
    measured = json.loads(file.read_text())["measured_on"]
    assert (measured["prompts"] if not labelled else measured["rows"]) == len(judged)
    if name == "text":
        assert measured["rows"] > len(judged)  # windows of documents
    splits = query(
        Store.open(tmp_path / "store"), "SELECT split, count(*) FROM inputs GROUP BY 1 ORDER BY 1"
    )
    assert [tuple(row.values()) for row in splits.to_pylist()] == [
        ("test", len(judged)),
        ("train", len(train) - 2),
    ]
    line = last_json(stillroom("plan", recipe, "--json"))["stages"]["data"]
    assert (line["state"], line["rejected"], line["why"][:10]) == ("done", 1, "1 rejected")
    assert note in (tmp_path / "run" / "report.md").read_text()
    # How it is judged is not which rows judge: the data are read once.
    lines = last_json(stillroom("plan", recipe, "--json", "--set", "evaluate.samples=2"))["stages"]
    assert [n for n, line in lines.items() if line["state"] != "done"] == ["evaluate"]
    lines = last_json(stillroom("plan", recipe, "--json", "--set", "evaluate.limit=3"))["stages"]
    assert lines["data"]["state"] == "to do"
