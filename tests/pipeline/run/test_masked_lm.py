"""A masked language model from texts to a judged and published student, by the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, recipe_tree, stillroom, told, write_jsonl, write_recipe
from planting import rows_of
from samples import flip
from tiny_masks import save_tiny_masked, texts

from stillroom.storage.store.store import Store

pytestmark = pytest.mark.slow


def test_one_command_from_texts_to_a_published_student(tmp_path: Path) -> None:
    from huggingface_hub import metadata_load
    from transformers import pipeline

    source = write_jsonl(tmp_path / "rows.jsonl", texts(40))
    teacher = save_tiny_masked(tmp_path / "teacher")
    sections: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "task": "masked_lm"},
        "data": {"source": str(source), "format": "text", "holdout": 10},
        "generate": None,
        "score": {"targets": "topp", "p": 0.9, "k": 12},
        "loss": {"hard_weight": 0.5},
        "train": {"epochs": 3, "tokens_per_step": 128, "learning_rate": 2.0e-2},
        "evaluate": {"baseline": True},
    }
    recipe = write_recipe(tmp_path, teacher, source, **sections)
    outcome = last_json(stillroom("run", recipe, "--json"))
    stages = ("data", "score", "train", "baseline", "evaluate")
    assert {n: s["state"] for n, s in outcome["stages"].items()} == dict.fromkeys(stages, "done")
    results: dict[str, Any] = outcome["results"]
    assert list(results) == ["teacher", "student_before", "baseline", "student"]
    assert all(0 <= arm["accuracy"] <= 1 and arm["perplexity"] > 1 for arm in results.values())
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]

    folder = Path(outcome["run_dir"]) / "latest" / "student"
    fill = pipeline("fill-mask", model=str(folder))
    assert len(fill("the cat [MASK] on the mat")) == 5
    assert metadata_load(folder / "README.md")["pipeline_tag"] == "fill-mask"
    assert 'pipeline("fill-mask", model="path/to/student")' in (folder / "README.md").read_text()
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| arm | top-1 accuracy | cross-entropy (nats/masked token) | perplexity |" in report
    assert "held-out masked tokens" in report
    assert {line["state"] for line in told("plan", recipe)["stages"].values()} == {"done"}

    store = tmp_path / "store"
    assert told("verify", store)["ok"]
    deep = told("verify", store, "--deep", "--teacher", teacher, "--rows", 8)["deep"]
    assert (deep["ok"], deep["rows"]) == (True, 8)
    first = rows_of(Store.open(store))[0]
    sample = told("inspect", store, "--key", first["key"].hex())
    there = [sample["texts"][p["index"]].strip() for p in sample["positions"]]
    assert len(there) == len(first["labels"])
    assert all(position["hidden"] for position in sample["positions"])

    _publish(tmp_path, sections, results)
    flip(store / Store.open(store).commits("soft_targets")[0].shard.name, "labels")
    assert not told("verify", store, code=3)["ok"]


def _publish(folder: Path, sections: dict[str, Any], results: dict[str, Any]) -> None:
    """Publish the rows, and learn from what was published alone: the same student."""
    from datasets import load_dataset
    from huggingface_hub import metadata_load

    published = folder / "published"
    told("export", folder / "store", published, "--license", "mit")
    assert metadata_load(published / "README.md")["task_categories"] == ["fill-mask"]
    assert "which were hidden from it" in (published / "README.md").read_text()
    row = load_dataset(str(published), "soft_targets", split="train")[0]
    assert len(row["labels"]) == row["span_tokens"]
    alone = sections | {
        "run": {"dir": str(folder / "again"), "task": "masked_lm"},
        "storage": {"dir": str(folder / "empty"), "sources": [str(published)]},
        "data": {"source": str(published), "format": "text", "holdout": 10},
    }
    path = folder / "again.yaml"
    path.write_text(json.dumps(recipe_tree(folder, published, published, **alone)))
    again = last_json(stillroom("run", path, "--json"))["results"]
    assert again["student"]["kl_teacher"] == pytest.approx(results["student"]["kl_teacher"])
    assert again["student"]["accuracy"] == results["student"]["accuracy"]
