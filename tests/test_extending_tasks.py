"""To add a task, six files are touched.

A small one is added to a copy of the product and taken to a judged student.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from extending import FLOORS, ROOT, changed_files, extended, last_line, refused_in, stillroom_in
from kit import write_jsonl, write_recipe
from tiny_classes import records
from tiny_models import save_tiny_bert

from stillroom.stages.recipe.tasks import TASKS

ROOMS = ("models", "score", "loader", "evaluate")
MOST_FILES = 6


def test_every_task_has_its_module_in_every_room() -> None:
    for task in TASKS:
        assert not [r for r in ROOMS if not (ROOT / "stages" / r / f"{task}.py").is_file()]


def test_no_other_file_names_a_task() -> None:
    """Beside the table, the modules that bear its name, and what they are made of."""
    own = {f"stages/{room}/{task}.py" for room in ROOMS for task in TASKS}
    files = {
        path.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
    }
    naming = [
        name
        for name in sorted(files - own - {"stages/recipe/tasks.py"})
        if any(f'== "{task}"' in (ROOT / name).read_text("utf-8") for task in TASKS)
    ]
    assert not naming, "ask stages/recipe/tasks.py, or the module of the task in this room"


@pytest.mark.slow
def test_a_new_task_goes_from_recipe_to_card(tmp_path: Path) -> None:
    code = extended(tmp_path / "code", "task")
    files = changed_files(code)
    assert len(files) <= MOST_FILES, files
    source = write_jsonl(tmp_path / "rows.jsonl", records(24))
    sections: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "task": "screening"},
        "data": {"source": str(source), "format": "labelled", "holdout": 8},
        "generate": None,
        "score": {"targets": "full"},
        "train": {"epochs": 1, "tokens_per_step": 128},
    }
    teacher = save_tiny_bert(tmp_path / "teacher")
    wrong = sections | {"score": {"targets": "topk"}}
    mistaken = write_recipe(tmp_path, teacher, source, **wrong)
    assert "screening keeps every class" in refused_in(code, "plan", mistaken)

    recipe = write_recipe(tmp_path, teacher, source, **sections)
    lines = (["plan", recipe, "--json"], ["run", recipe, "--json"])
    plan, outcome = map(last_line, stillroom_in(code, *lines))
    assert plan["stages"]["score"]["state"] == "waits"
    assert {stage["state"] for stage in outcome["stages"].values()} == {"done"}
    for arm in outcome["results"].values():
        assert 0 <= arm["surely_right"] <= arm["accuracy"] <= 1

    latest = tmp_path / "run" / "latest"
    settings = json.loads((latest / "settings.json").read_text())
    assert settings["recipe"]["run"]["task"] == "screening"
    assert "| arm | surely right | accuracy |" in (tmp_path / "run" / "report.md").read_text()
    card = (latest / "student" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "surely right" in card
