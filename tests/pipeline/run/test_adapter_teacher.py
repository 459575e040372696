"""A classifier with a LoRA adapter as the teacher.

The way goes to a judged student, with features and deep verification.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kit import last_json, recipe_tree, stillroom, write_jsonl
from tiny_adapter import save_adapter, save_base
from tiny_classes import records
from tiny_models import CLASSES
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.slow


def test_an_adapter_teaches_a_student_with_its_classes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    source = write_jsonl(tmp_path / "rows.jsonl", records(24))
    sections: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "task": "classification"},
        "teacher": {"model": str(base), "adapter": str(adapter)},
        "data": {"source": str(source), "format": "labelled", "holdout": 6},
        "score": {"targets": "full", "features": [{"what": "hidden", "layers": [1]}]},
        "loss": {"hard_weight": 0.5, "features": [{"match": "hidden", "layers": "last"}]},
        "train": {"epochs": 1, "tokens_per_step": 128, "learning_rate": 1.0e-2},
    }
    recipe = tmp_path / "recipe.yaml"
    tree = recipe_tree(tmp_path, base, source, generate=None) | sections
    recipe.write_text(yaml.safe_dump(tree))
    outcome = last_json(stillroom("run", recipe, "--json"))
    assert outcome["results"]["teacher"]["kl_teacher"] == 0
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/latest/student")
    assert tuple(student.config.id2label.values()) == CLASSES

    deep = ("verify", tmp_path / "store", "--deep", "--teacher", base, "--adapter", adapter)
    read = last_json(stillroom(*deep, "--json"))
    assert (read["ok"], read["deep"]["ok"]) == (True, True)
    assert read["deep"]["features"]["rows"] > 0

    # Trained on it is another teacher, and its base without it none.
    save_adapter(adapter, base, steps=5)
    score = last_json(stillroom("plan", recipe, "--json"))["stages"]["score"]
    assert (score["state"], score["pending"]) == ("to do", 24)
    assert "other adapter" in score["why"]
    done = stillroom("plan", recipe, "--set", "teacher.adapter=null", expect=2)
    assert "has no classification head" in " ".join(done.stderr.split())
    other = save_base(tmp_path / "other", hidden_size=32)
    done = stillroom("plan", recipe, "--set", f"teacher.model={other}", expect=2)
    assert "was made for another model than" in " ".join(done.stderr.split())
