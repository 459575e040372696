"""Token classification from tagged records to a judged and published student.

It goes through the real command line.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, recipe_tree, stillroom, told, write_jsonl, write_recipe
from planting import rows_of
from samples import flip
from tiny_words import TAGS, save_tiny_tagger, tagged

from stillroom.storage.store.store import Store

pytestmark = pytest.mark.slow


def test_one_command_from_tagged_words_to_a_published_student(tmp_path: Path) -> None:
    from huggingface_hub import metadata_load
    from transformers import AutoModelForTokenClassification

    wrong = {"words": ["a", "cat"], "labels": ["O"]}
    source = write_jsonl(tmp_path / "rows.jsonl", [*tagged(48), wrong])
    teacher = save_tiny_tagger(tmp_path / "teacher")
    features = [{"what": "hidden", "layers": [1]}]
    sections: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "task": "token_classification"},
        "data": {"source": str(source), "format": "tagged", "holdout": 12},
        "generate": None,
        "score": {"targets": "full", "features": features},
        "loss": {
            "temperature": 2.0,
            "hard_weight": 0.5,
            "features": [{"match": "hidden", "layers": {1: 0}, "weight": 0.1}],
        },
        "train": {"epochs": 2, "tokens_per_step": 128, "learning_rate": 2.0e-2},
        "evaluate": {"baseline": True},
    }
    recipe = write_recipe(tmp_path, teacher, source, **sections)
    outcome = last_json(stillroom("run", recipe, "--json"))
    stages = ("data", "score", "train", "baseline", "evaluate")
    assert {name: s["state"] for name, s in outcome["stages"].items()} == dict.fromkeys(
        stages, "done"
    )
    results: dict[str, Any] = outcome["results"]
    assert list(results) == ["teacher", "student_before", "baseline", "student"]
    for arm in results.values():
        assert arm["f1_micro"] == pytest.approx(arm["accuracy"])
        assert 0 <= arm["entity_f1"] <= 1
        assert {"entity_precision_se", "kl_teacher_se", "ece"} <= arm.keys()
    assert (results["teacher"]["kl_teacher"], results["teacher"]["top1_agreement"]) == (0, 1)
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]

    folder = Path(outcome["run_dir"]) / "latest" / "student"
    student = AutoModelForTokenClassification.from_pretrained(folder)
    assert list(student.config.id2label.values()) == list(TAGS)
    assert metadata_load(folder / "README.md")["pipeline_tag"] == "token-classification"
    card = (folder / "README.md").read_text()
    assert "widget" not in card
    assert 'pipeline("token-classification", model="path/to/student", aggregation_strategy' in card
    assert "entity F1" in card

    lines = told("plan", recipe)["stages"]
    assert {line["state"] for line in lines.values()} == {"done"}
    assert (lines["data"]["rejected"], lines["score"]["committed"]) == (1, 48)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| arm | accuracy | macro F1 | entity F1 | cross-entropy (nats/word) |" in report
    assert "held-out words of 12 texts" in report
    assert "Entities that the tags mark (BIO)" in report
    assert "nats/token" not in report.split("## What was run")[0]

    store = tmp_path / "store"
    assert told("verify", store)["ok"]
    deep = told("verify", store, "--deep", "--teacher", teacher, "--rows", 8)["deep"]
    assert (deep["ok"], deep["rows"], deep["features"]["rows"]) == (True, 8, 8)
    rows = (row for row in rows_of(Store.open(store)) if row["labels"] is not None)
    first = next(row for row in rows if min(row["labels"]) >= 0)
    sample = told("inspect", store, "--key", first["key"].hex())
    shown = [(p["word"], p["label"]) for p in sample["positions"]]
    record = next(r for r in tagged(48) if r["words"] == [word for word, _ in shown])
    named = [tag if isinstance(tag, str) else TAGS[tag] for tag in record["labels"]]
    assert [label for _, label in shown] == named
    assert f"{shown[0][0]}⟦{shown[0][1]}⟧" in sample["above"]

    _publish(tmp_path, recipe, sections, results)
    commit = Store.open(store).commits("soft_targets")[0]
    flip(store / commit.shard.name, "labels")
    assert not told("verify", store, code=3)["ok"]


def _publish(folder: Path, recipe: Path, sections: dict[str, Any], results: dict[str, Any]) -> None:
    """Publish the rows, and learn from what was published alone: the same student."""
    from huggingface_hub import metadata_load

    published = folder / "published"
    told("export", folder / "store", published, "--license", "mit", "--features")
    assert metadata_load(published / "README.md")["task_categories"] == ["token-classification"]
    card = (published / "README.md").read_text()
    assert "the distribution over the classes of" in card
    assert "a JSON list of words" in card
    assert "`B-PER`" in card
    source = folder / "rows.jsonl"
    alone = sections | {
        "run": {"dir": str(folder / "again"), "task": "token_classification"},
        "storage": {"dir": str(folder / "empty"), "sources": [str(published)]},
        "data": {"source": str(published), "format": "tagged", "holdout": 12},
    }
    tree = recipe_tree(folder, published, source, **alone)
    path = folder / "again.yaml"
    path.write_text(json.dumps(tree))
    again = last_json(stillroom("run", path, "--json"))["results"]
    assert again["student"]["kl_teacher"] == pytest.approx(results["student"]["kl_teacher"])
    assert again["student"]["entity_f1"] == results["student"]["entity_f1"]
