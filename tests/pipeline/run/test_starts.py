"""A student that begins with layers of its teacher, through the command line.

It is tested for plan, run, report and refusals.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from tiny_classes import records
from tiny_models import save_tiny_bert

pytestmark = pytest.mark.slow
Folder = Callable[..., Path]


@pytest.fixture
def teacher(tiny_llama: Folder) -> Path:
    """Sure of what it says, so that a student without its weights is far from it."""
    from transformers import AutoModelForCausalLM

    folder = tiny_llama("big", num_hidden_layers=4, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path) -> Path:
    source = write_jsonl(tmp_path / "p.jsonl", prompts(12))
    return write_recipe(
        tmp_path,
        teacher,
        source,
        student={"from_teacher_layers": [1, 3]},
        evaluate={"tokens": 200, "baseline": True},
    )


def first_loss(outcome: dict[str, Any]) -> float:
    """The loss of the student's first steps."""
    found = json.loads((Path(outcome["run_dir"]) / "latest" / "train.json").read_text())
    return float(found["history"][0]["loss"])


def test_both_arms_begin_with_the_teachers_layers(recipe: Path, teacher: Path) -> None:
    start = "the student starts from layers 1, 3 of the teacher"
    assert start in stillroom("plan", recipe).stdout
    copied = last_json(stillroom("run", recipe, "--json"))
    assert {stage["state"] for stage in copied["stages"].values()} == {"done"}
    run = Path(copied["run_dir"])
    settings = json.loads((run / "latest" / "settings.json").read_text())
    assert settings["settings"]["student"]["identity"] == settings["teacher_id"]
    card = (run / "latest" / "student" / "README.md").read_text()
    assert "A student of `big`: starts from layers 1, 3 of the teacher, trained by" in card
    report = (run / "report.md").read_text()
    assert report.startswith("# big distilled into 2 of its layers\n")
    assert "| student | starts from layers 1, 3 of the teacher |" in report
    assert start in stillroom("status", recipe).stdout

    loss = first_loss(copied)
    fresh = "student={config: {num_hidden_layers: 2}}"
    alone = last_json(stillroom("run", recipe, "--json", "--set", fresh))
    assert loss < first_loss(alone)
    before = [outcome["results"]["student_before"]["kl_teacher"] for outcome in (copied, alone)]
    assert before[0] < before[1]

    others = "student.from_teacher_layers=[0, 3]"
    said = stillroom("plan", recipe, "--set", others).stdout
    assert "student.from_teacher_layers: [1, 3] -> [0, 3]" in said
    teacher.rename(teacher.with_name("gone"))
    stages = last_json(stillroom("plan", recipe, "--json"))["stages"]
    assert {stage["state"] for stage in stages.values()} == {"done"}
    said = stillroom("plan", recipe, "--set", others, expect=2).stderr
    assert (
        "the teacher's layers are copied, and its weights are not here: teacher.model: no" in said
    )


def test_the_layers_are_of_the_teacher_whose_rows_are_learnt(
    recipe: Path, teacher: Path, tiny_llama: Folder, tmp_path: Path
) -> None:
    stillroom("run", recipe, "--until", "score")
    store = tmp_path / "store"
    of_a_store = ("--set", f"data.source={store}", "--set", f"teacher.model={store}")
    said = stillroom("plan", recipe, *of_a_store, expect=2).stderr
    assert "its weights are not here: teacher.model" in said
    (tmp_path / "p.jsonl").unlink()
    planned = last_json(stillroom("plan", recipe, "--json"))
    assert planned["stages"]["train"]["state"] == "to do"
    tiny_llama(teacher.name, seed=1, num_hidden_layers=4)
    said = stillroom("plan", recipe, expect=2).stderr
    assert "Put that teacher there again" in said


def test_what_plan_refuses_before_the_teacher_works(recipe: Path, teacher: Path) -> None:
    def refused(setting: str) -> str:
        return stillroom("plan", recipe, "--set", setting, expect=2).stderr

    assert "the teacher has layers 0 to 3 (got 4)" in refused("student.from_teacher_layers=[4]")
    assert "input_layernorm" in refused("student.config={rms_norm_eps: 0.5}")
    file = teacher / "model.safetensors"
    file.rename(teacher / "pytorch_model.bin")
    assert "has its weights in pytorch_model.bin" in refused("run.seed=1")


def test_a_classifier_begins_with_its_teachers_pooler_and_classes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", records(24))
    recipe = write_recipe(
        tmp_path,
        save_tiny_bert(tmp_path / "teacher"),
        source,
        run={"dir": str(tmp_path / "run"), "task": "classification"},
        data={"source": str(source), "format": "labelled", "holdout": 6},
        generate=None,
        score={"targets": "full"},
        student={"from_teacher_layers": [0, 1]},
        train={"epochs": 1, "tokens_per_step": 128, "learning_rate": 1.0e-3},
    )
    outcome = last_json(stillroom("run", recipe, "--json"))
    # All of its layers: so it is the teacher until it is trained.
    assert outcome["results"]["student_before"]["kl_teacher"] == pytest.approx(0, abs=1e-5)
