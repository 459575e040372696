"""A BERT-class teacher to a DistilBERT-class student.

The way goes from a CSV file to the report, layers and attention included.
"""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from kit import last_json, stillroom
from tiny_models import save_tiny_bert
from transformers import AutoModelForSequenceClassification, AutoTokenizer

NAMES = ("negative", "positive")


@pytest.mark.slow
def test_soft_targets_hidden_states_and_attention(assets: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "tokenizer-bert-base-uncased")
    teacher = save_tiny_bert(
        tmp_path / "teacher", vocab_size=len(tokenizer), classes=NAMES, num_hidden_layers=4
    )
    tokenizer.save_pretrained(teacher)
    rows = pq.read_table(assets / "classify" / "sst2" / "validation.parquet").slice(0, 60)
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((row["text"], NAMES[row["label"]]) for row in rows.to_pylist())
    # A smaller one of another architecture: half of the blocks, as many heads.
    student = {"model_type": "distilbert", "dim": 8, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}
    both = [{"what": what, "layers": [1, 3]} for what in ("hidden", "queries", "keys")]
    asked = [
        {"match": "hidden", "layers": {1: 0, 3: 1}, "distance": "cosine"},
        {"match": "attention", "layers": {1: 0, 3: 1}, "weight": 0.5},
    ]
    recipe = {
        "run": {"dir": str(tmp_path / "run"), "task": "classification", "seed": 0},
        "storage": {"dir": str(tmp_path / "store")},
        "teacher": {"model": str(teacher)},
        "student": {"config": student},
        "data": {"source": str(tmp_path / "reviews.csv"), "format": "labelled", "holdout": 12},
        "score": {"targets": "full", "features": both},
        "loss": {"hard_weight": 0.5, "soft_weight": 0.5, "temperature": 2.0, "features": asked},
        "train": {"epochs": 2, "tokens_per_step": 256, "learning_rate": 1e-3},
        "evaluate": {"baseline": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    done = last_json(stillroom("run", path, "--json"))
    assert {"student", "baseline", "teacher"} <= done["results"].keys()

    names = {f"hidden_{t}_to_{s}_cosine" for t, s in ((1, 0), (3, 1))}
    names |= {f"attention_{t}_to_{s}" for t, s in ((1, 0), (3, 1))}
    arms = [json.loads(p.read_text()) for p in (tmp_path / "run").glob("train-*/train.json")]
    found = {arm["arm"]: [set(p.get("features", ())) for p in arm["history"]] for arm in arms}
    assert all(point == names for point in found["student"])
    assert not any(found["baseline"]), "it learns from labels alone"
    report = (tmp_path / "run" / "report.md").read_text()
    assert all(name.replace("_", " ") in report for name in names)

    folder = tmp_path / "run" / "latest" / "student"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (model.config.model_type, model.config.n_layers) == ("distilbert", 2)
    assert set(model.config.id2label.values()) == set(NAMES)
