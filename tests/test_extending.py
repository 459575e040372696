"""What one more divergence and one more target kind cost.

The worked examples go, in a copy, through a whole run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from extending import changed_files, extended, last_line, stillroom_in
from kit import prompts, write_jsonl, write_recipe
from tiny_llama import save_tiny_llama

pytestmark = pytest.mark.slow


class Copy:
    """The command line of an extended copy, on a small recipe of texts that are there."""

    def __init__(self, folder: Path, example: str, **sections: Any) -> None:
        self.folder = folder
        self.code = extended(folder / "copy", example)
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
        return stillroom_in(self.code, *lines)

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
    copy = Copy(tmp_path, "divergence", loss=loss)
    assert len(changed_files(copy.code)) <= 2
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
    copy = Copy(tmp_path, "target_kind", score=score, loss={"temperature": 2.0})
    assert len(changed_files(copy.code)) <= 3
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
