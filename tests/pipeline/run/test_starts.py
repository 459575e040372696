"""A student that begins with layers of its teacher, through the command line: plan, run, report, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe

pytestmark = pytest.mark.slow
COPIES = {"from_teacher_layers": [1, 3]}
FRESH = {"config": {"num_hidden_layers": 2}}
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
        tmp_path, teacher, source, student=COPIES, evaluate={"tokens": 200, "baseline": True}
    )


def losses(outcome: dict[str, Any], arm: str) -> list[float]:
    """Of the steps that an arm's record tells of."""
    folder = Path(outcome["run_dir"]) / "latest"
    found = json.loads((folder / "train.json").read_text())
    return [point["loss"] for point in found["history"]]


def test_both_arms_begin_with_the_teachers_layers(recipe: Path, teacher: Path) -> None:
    assert "the student starts from layers 1, 3 of the teacher" in stillroom("plan", recipe).stderr
    copied = last_json(stillroom("run", recipe, "--json"))
    assert {stage["state"] for stage in copied["stages"].values()} == {"done"}
    run = Path(copied["run_dir"])
    latest = (run / "latest").resolve()
    settings = json.loads((latest / "settings.json").read_text())
    assert settings["settings"]["student"]["identity"] == settings["teacher_id"]
    card = (latest / "student" / "README.md").read_text()
    assert "A student of `big`: starts from layers 1, 3 of the teacher, trained by" in card
    assert "the teacher's licence holds for them" in card
    report = (run / "report.md").read_text()
    assert report.startswith("# big distilled into 2 of its layers\n")
    assert "| student | starts from layers 1, 3 of the teacher |" in report
    arms = [json.loads(file.read_text()) for file in run.glob("train-*/train.json")]
    assert len(arms) == 2
    start = losses(copied, "student")[0]

    fresh = last_json(
        stillroom("run", recipe, "--json", "--set", "student={config: {num_hidden_layers: 2}}")
    )
    assert start < losses(fresh, "student")[0]
    before = [outcome["results"]["student_before"]["kl_teacher"] for outcome in (copied, fresh)]
    assert before[0] < before[1]

    other = stillroom("plan", recipe, "--set", "student.from_teacher_layers=[0, 3]")
    assert "student.from_teacher_layers: [1, 3] -> [0, 3]" in other.stdout + other.stderr
