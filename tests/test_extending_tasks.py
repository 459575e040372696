"""To add a task, six files are touched: a small one is added to a copy of the product and taken to a judged student."""

import filecmp
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
from extending import last_line, stillroom_in
from kit import ENVIRONMENT, command, write_jsonl, write_recipe
from tiny_classes import records
from tiny_models import save_tiny_bert

from stillroom.stages.recipe.tasks import TASKS, TaskName

ROOT = Path(__file__).parent.parent
EXAMPLE = Path(__file__).parent / "support" / "examples" / "task"
ROOMS = ("models", "score", "loader", "evaluate")
MOST_FILES = 6

# File -> what stands there, and what the example puts there.
EDITS = {
    "stages/recipe/tasks.py": (
        (
            'TaskName = Literal["causal_lm", "classification"]',
            'TaskName = Literal["causal_lm", "classification", "screening"]',
        ),
        (
            '    "classification": Task(\n',
            '    "screening": Task(\n'
            '        head="classes",\n'
            '        formats=("labelled",),\n'
            '        targets=("full",),\n'
            "        text_alone=False,\n"
            '        refused={"generate": "has no meaning for screening. Remove it"},\n'
            '        unit="text",\n'
            '        hub_name="text-classification",\n'
            "    ),\n"
            '    "classification": Task(\n',
        ),
    ),
    "pipeline/report/results.py": (
        (
            "CLASS_MEASURES = (\n",
            'CLASS_MEASURES = (\n    Measure("surely_right", "surely right", "", "sure", percent),\n',
        ),
    ),
}


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the product with the task added."""
    copy = tmp_path_factory.mktemp("product") / "stillroom"
    for folder in ("pipeline", "stages", "storage"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("__*__.py"):
        shutil.copy(file, copy)
    for name, edits in EDITS.items():
        text = (copy / name).read_text("utf-8")
        for before, after in edits:
            assert text.count(before) == 1, f"{name}: the example's place is not there: {before!r}"
            text = text.replace(before, after)
        (copy / name).write_text(text, "utf-8")
    for room in ROOMS:
        shutil.copy(EXAMPLE / room / "screening.py", copy / "stages" / room)
    return copy


def product_files(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for folder in ("pipeline", "stages", "storage")
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def touched(product: Path) -> list[str]:
    """Files that differ from the product's own."""
    before, after = product_files(ROOT), product_files(product)
    changed = {
        name
        for name in before & after
        if not filecmp.cmp(ROOT / name, product / name, shallow=False)
    }
    return sorted(changed | (before ^ after))


def test_every_task_has_its_module_in_every_room() -> None:
    assert get_args(TaskName) == tuple(TASKS)
    for task in TASKS:
        assert not [r for r in ROOMS if not (ROOT / "stages" / r / f"{task}.py").is_file()]


def test_no_other_file_names_a_task() -> None:
    """Beside the table, the modules that bear its name, and what they are made of."""
    own = {f"stages/{room}/{task}.py" for room in ROOMS for task in TASKS}
    naming = [
        name
        for name in sorted(product_files(ROOT) - own - {"stages/recipe/tasks.py"})
        if name.endswith(".py")
        and any(f'== "{task}"' in (ROOT / name).read_text("utf-8") for task in TASKS)
    ]
    assert not naming, "ask stages/recipe/tasks.py, or the module of the task in this room"


@pytest.mark.slow
def test_a_new_task_goes_from_recipe_to_card(product: Path, tmp_path: Path) -> None:
    files = touched(product)
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
    refused = subprocess.run(
        command("plan", write_recipe(tmp_path, teacher, source, **wrong)),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(product.parent)},
    )
    assert refused.returncode == 2
    assert "screening keeps every class" in refused.stderr

    recipe = write_recipe(tmp_path, teacher, source, **sections)
    lines = (["plan", recipe, "--json"], ["run", recipe, "--json"])
    plan, outcome = map(last_line, stillroom_in(product.parent, *lines))
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
