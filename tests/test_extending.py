"""What one more divergence and one more target kind cost: the worked examples, in a copy, through a whole run."""

import filecmp
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from examples import minp, renyi
from extending import last_line, stillroom_in
from kit import prompts, write_jsonl, write_recipe
from tiny_llama import save_tiny_llama

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "stages", "storage")

pytestmark = pytest.mark.slow


def copy_with(edits: dict[str, dict[str, str]], folder: Path) -> Path:
    """The package with text inserted before the places that the edits name."""
    package = folder / "stillroom"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("__*__.py"):
        shutil.copy(file, package)
    for name, insertions in edits.items():
        text = (package / name).read_text()
        for place, inserted in insertions.items():
            assert text.count(place) == 1, f"{name}: {place!r} is there {text.count(place)} times"
            text = text.replace(place, inserted + place)
        (package / name).write_text(text)
    return package


def changed_files(package: Path) -> list[str]:
    """Product files that differ from ours, new ones included."""
    names = [path.relative_to(package) for path in package.rglob("*.py")]
    return sorted(
        str(name)
        for name in names
        if not (ROOT / name).is_file()
        or not filecmp.cmp(ROOT / name, package / name, shallow=False)
    )


class Copy:
    """The command line of an edited copy, on a small recipe of texts that are there."""

    def __init__(self, folder: Path, edits: dict[str, dict[str, str]], **sections: Any) -> None:
        self.folder = folder
        self.package = copy_with(edits, folder / "copy")
        teacher = save_tiny_llama(folder / "teacher", initializer_range=0.3)
        pairs = [
            record | {"completion": "the dog sat on the mat and ran"[: 7 + 4 * (number % 6)]}
            for number, record in enumerate(prompts(12))
        ]
        source = write_jsonl(folder / "pairs.jsonl", pairs)
        data = {"source": str(source), "format": "completion", "holdout": 4}
        self.recipe = write_recipe(folder, teacher, source, generate=None, data=data, **sections)

    def stillroom(self, *lines: Sequence[Any]) -> list[str]:
        """What each command line prints; it must succeed."""
        return stillroom_in(self.package.parent, *lines)

    def settings(self) -> dict[str, Any]:
        """What decided the student that was trained."""
        (trained,) = (self.folder / "run").glob("train-*/settings.json")
        found: dict[str, Any] = json.loads(trained.read_text())["settings"]
        return found


def assert_learnt(run: str) -> None:
    results = last_line(run)["results"]
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]


def test_a_divergence_costs_two_files(tmp_path: Path) -> None:
    loss = {"divergence": "renyi", "renyi_order": 0.3, "tail": "drop"}
    copy = Copy(tmp_path, renyi.EDITS, loss=loss)
    assert len(changed_files(copy.package)) <= 2
    plan, run, _ = copy.stillroom(
        ["plan", copy.recipe], ["run", copy.recipe, "--json"], export(tmp_path)
    )
    assert "score" in plan
    assert_learnt(run)
    assert copy.settings()["loss"].items() >= loss.items()
    assert "renyi (temperature 1.0, tail drop, renyi_order 0.3)" in report_of(tmp_path)
    assert (tmp_path / "published" / "README.md").is_file()


def test_a_target_kind_costs_three_files(tmp_path: Path) -> None:
    score = {"targets": "minp", "p": 0.1, "k": 8, "batch_tokens": 256, "temperatures": [1.0, 2.0]}
    copy = Copy(tmp_path, minp.EDITS, score=score, loss={"temperature": 2.0})
    assert len(changed_files(copy.package)) <= 3
    plan, run, fewer, *_ = copy.stillroom(
        ["plan", copy.recipe],
        ["run", copy.recipe, "--json"],
        ["plan", copy.recipe, "--set", "score.p=0.2", "--json"],
        ["verify", tmp_path / "store"],
        export(tmp_path),
    )
    assert "score" in plan
    assert_learnt(run)
    assert copy.settings()["score"] == {"targets": "minp", "p": 0.1, "k": 8}
    assert "minp, at least 0.1 times the best one" in report_of(tmp_path)
    # What is stored serves a recipe that asks for less.
    assert last_line(fewer)["stages"]["score"]["state"] == "done"
    card = (tmp_path / "published" / "README.md").read_text()
    assert "score: {targets: minp, p: 0.1" in card


def export(folder: Path) -> list[Any]:
    return ["export", folder / "store", folder / "published", "--license", "mit"]


def report_of(folder: Path) -> str:
    """The report for people, as text."""
    return (folder / "run" / "report.md").read_text()
