"""Classification from labelled rows to a judged student.

It goes through the real command line, on a tiny teacher.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, stillroom, write_jsonl, write_recipe
from tiny_classes import records
from tiny_models import CLASSES, save_tiny_bert
from typer.testing import CliRunner

from stillroom.pipeline.cli.main import app
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.slow


def test_one_command_from_labelled_rows_to_a_judged_student(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    source = write_jsonl(
        tmp_path / "rows.jsonl", [*records(48), {"text": "a cat", "label": "awful"}]
    )
    recipe = write_recipe(
        tmp_path,
        save_tiny_bert(tmp_path / "teacher"),
        source,
        run={"dir": str(tmp_path / "run"), "task": "classification"},
        data={"source": str(source), "format": "labelled", "holdout": 12},
        generate=None,
        score={"targets": "full"},
        loss={"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.5},
        train={"epochs": 8, "tokens_per_step": 128, "learning_rate": 2.0e-2},
        evaluate={"baseline": True},
    )
    outcome = last_json(stillroom("run", recipe, "--json"))
    assert {name: stage["state"] for name, stage in outcome["stages"].items()} == dict.fromkeys(
        ("data", "score", "train", "baseline", "evaluate"), "done"
    )
    results: dict[str, Any] = outcome["results"]
    assert list(results) == ["teacher", "student_before", "baseline", "student"]
    for arm in results.values():
        assert 0 <= arm["accuracy"] <= 1
        assert {"cross_entropy", "kl_teacher", "tv_teacher", "top1_agreement", "ece"} <= arm.keys()
        assert arm["f1_micro"] == pytest.approx(arm["accuracy"])
        assert arm["recall_weighted"] == pytest.approx(arm["accuracy"])
    assert (results["teacher"]["kl_teacher"], results["teacher"]["top1_agreement"]) == (0, 1)
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]
    student = AutoModelForSequenceClassification.from_pretrained(
        Path(outcome["run_dir"]) / "latest" / "student"
    )
    assert list(student.config.id2label.values()) == list(CLASSES)

    def told(*words: Any) -> dict[str, Any]:
        """What a command tells in this process: a run has shown that the commands start."""
        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout.rstrip("\n").split("\n")[-1])
        return found | {"above": result.stdout}

    unlabelled = write_jsonl(tmp_path / "texts.jsonl", [{"text": r["text"]} for r in records(48)])
    refused = CliRunner().invoke(app, ["plan", str(recipe), "--set", f"data.source={unlabelled}"])
    assert isinstance(refused.exception, UsageError)
    assert "evaluate.baseline: no row to train on has a label" in str(refused.exception)

    lines = told("plan", recipe)["stages"]
    assert {line["state"] for line in lines.values()} == {"done"}
    assert (lines["data"]["rejected"], lines["score"]["committed"]) == (1, 48)
    assert told("verify", tmp_path / "store")["ok"]
    asked = "SELECT label, count(*)::INT AS n FROM soft_targets GROUP BY ALL ORDER BY label"
    counted = told("query", tmp_path / "store", asked)["rows"]
    assert [row["label"] for row in counted] == [0, 1, 2, None]
    assert sum(row["n"] for row in counted) == 48

    sample = told("inspect", tmp_path / "store")
    assert f"gold label: {sample['label'] or 'none'}" in sample["above"]
    ((position,), entries) = sample["positions"], sample["positions"][0]["entries"]
    assert sorted(name for name, _ in entries) == sorted(CLASSES)
    assert position["index"] == len(sample["tokens"]) - 1
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| arm | accuracy | macro F1 | cross-entropy (nats/text) |" in report
    assert "## By class" in report
    assert "| label, by answer | `bad` | `good` | `neither` |" in report
    assert "texts without a label" in report
    assert "token)" not in report.split("## What was run")[0]
    assert (
        json.loads((tmp_path / "run" / "report.json").read_text())["evaluation"]["results"]
        == results
    )
