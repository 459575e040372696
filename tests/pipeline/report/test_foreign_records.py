"""Records of a run folder that somebody else wrote, or that were damaged.

An error names the file, whoever reads it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reports
from reports import finished

from stillroom.pipeline.publish.model_card import write_student_cards
from stillroom.pipeline.publish.provenance import read_recipe
from stillroom.pipeline.report.report import load_report, show, write_report
from stillroom.pipeline.report.stored.inspect import show as inspect
from stillroom.pipeline.run.timings import Pace
from stillroom.stages.recipe.run_folder import read_record
from stillroom.stages.train.checkpoints import Checkpoints
from stillroom.storage.errors import IntegrityError, StillroomError
from stillroom.storage.files.local import LocalFiles

Read = Callable[[Path], Any]
CONTENTS = [
    b"",
    b"{",
    b"[1]",
    b"\xff",
    b'{"a": ' * 500 + b"1" + b"}" * 500,
    b"{}",
    b'{"recipe": 3}',
]
READERS: dict[str, tuple[str, Read]] = {
    "the report": ("report.json", lambda run: show([run], None)),
    "one row of it": (
        "report.json",
        lambda run: inspect(str(run), None, columns=80, colours=False),
    ),
    "the page": (
        "train-student/evaluation.json",
        lambda run: write_report(run, run / "train-student", {}),
    ),
    "the model's card": (
        "train-student/train.json",
        lambda run: write_student_cards([run / "train-student"]),
    ),
    "the published recipe": ("train-student/settings.json", read_recipe),
    "a checkpoint": (
        "checkpoints/step-00000002/state.json",
        lambda run: Checkpoints(LocalFiles(run)).tensors(2),
    ),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; to be copied only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recipe = reports.with_features(reports.RECIPE)
    matched = "hidden_3_to_1_mse"
    return finished(folder, reports.evaluation(), reports.facts(), recipe, matched=matched)


@pytest.fixture
def run(valid: Path, tmp_path: Path) -> Path:
    return shutil.copytree(valid, tmp_path / "run")


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize(("name", "read"), READERS.values(), ids=READERS)
def test_an_error_names_the_record(run: Path, name: str, read: Read, content: bytes) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=Path(name).parent.name):
        read(run)


def test_what_was_measured_before_only_foretells(tmp_path: Path) -> None:
    for content in (*CONTENTS, b'{"score": {"rows": 1, "seconds": "x", "clock": {}}}'):
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / "pace.json").write_bytes(content)
        assert Pace(tmp_path).clock("score") is None


def test_a_report_with_anything_in_any_place_is_drawn_or_refused(run: Path) -> None:
    report = load_report(run)
    said = []
    for number, (inside, key) in enumerate(places(report)):
        was, inside[key] = inside[key], [None, "\x1b", [], {"a": None}, -1e400, 10**400][number % 6]
        (run / "report.json").write_text(json.dumps(report))
        inside[key] = was
        try:
            show([run], None)
        except StillroomError as error:
            said.append(str(error))
    assert len(said) > 20
    assert all("report.json: not as a run writes it" in error for error in said)
    assert read_record(run / "report.json")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) below a value; of a list the first."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, held in list(items):
        yield value, key
        if isinstance(held, dict | list):
            yield from places(held)
