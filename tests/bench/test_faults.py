"""The matrix of faults.

Every command has its column, a wrong cell is said to be wrong, and one cell runs.
"""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from stillroom.pipeline.cli import main as command_line
from stillroom.stages.recipe.stages import STAGES

HERE = Path(__file__).parent


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.syspath_prepend(str(HERE))
    names = ("fault_columns", "fault_kinds", "fault_cell", "fault_servers")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name)


def test_every_command_has_a_column_or_a_reason(modules: dict[str, Any]) -> None:
    columns = modules["fault_columns"]
    place = columns.Place(Path("place"))
    words = [column.words(place) for column in columns.COLUMNS.values()]
    commands = get_command(command_line.app).commands.keys()
    assert {str(said[0]) for said in words} | columns.LOOKS.keys() == commands
    stages = {str(said[3]) for said in words if said[0] == "run"}
    assert stages == {stage.room for stage in STAGES}


def test_what_is_wrong_with_a_cell_is_said(modules: dict[str, Any]) -> None:
    fault = modules["fault_kinds"].FAULTS["TERM"]
    right = {"code": 130, "hit": True, "lost": 0, "twice": 0, "traceback": False, "said": "error: "}
    right |= {"processes_left": [], "again_code": 0, "problems": [], "equal": True}
    right |= {"files_left_after_vacuum": []}
    wrong = {
        "code": 1,
        "lost": 2,
        "twice": 1,
        "traceback": True,
        "processes_left": ["7"],
        "again_code": 3,
        "problems": ["bad"],
        "equal": False,
        "files_left_after_vacuum": ["a"],
        "hit": False,
    }
    verdict = modules["fault_cell"].verdict
    assert verdict(right, fault) == "right"
    for name, value in wrong.items():
        assert verdict(right | {name: value}, fault) != "right", name


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "--map-root-user", "--mount", "true"]).returncode != 0,
    reason="needs a mount namespace of its own",
)
def test_a_cell_is_right(tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "faults.py"), str(tmp_path), "--tiny"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert (outcome["cells"], outcome["right"], outcome["lost"]) == (1, 1, 0), outcome["wrong"]
