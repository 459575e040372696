"""A student of a factory.

It is refused without the flag, trained with it, the same after a stop, and another when it changes.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit import last_json, stillroom, write_jsonl, write_recipe
from safetensors.torch import load_file
from tiny_classes import records
from tiny_images import Pictures, save_tiny_resnet
from tiny_models import CLASSES, save_tiny_bert
from tiny_store import StopAfter

from stillroom.stages.loader.classification import training_passes
from stillroom.stages.models.students.factory import FactoryStudent, save_factory_student
from stillroom.stages.models.students.factory_file import factory_files, factory_id
from stillroom.stages.models.students.student import initial_student, load_student
from stillroom.stages.recipe.checks.together import check_together
from stillroom.stages.recipe.sections import Recipe, Student, Train
from stillroom.stages.train import stage as train
from stillroom.storage.errors import Stopped, UsageError

IMAGES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, sides, classes, hidden):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(sides, hidden), nn.BatchNorm1d(hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, classes)
        self.register_buffer("mean", torch.zeros(hidden))  # that no norm of torch's keeps
        self.drawn = torch.randn(hidden)  # which no file of weights holds

    def forward(self, pixel_values):
        states = self.body(pixel_values) * self.drawn
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * states.detach().mean(0)
        return self.head(states - self.mean)

def net(*, classes, channels, height, width, hidden=8):
    return Net(channels * height * width, classes, hidden)
"""
TEXTS = """
from torch import nn

class Bag(nn.Module):
    def __init__(self, vocab_size, padding, classes):
        super().__init__()
        self.words = nn.Embedding(vocab_size, 8, padding_idx=padding)
        self.head = nn.Linear(8, classes)

    def forward(self, input_ids, attention_mask, **_):
        there = attention_mask[..., None]
        return self.head((self.words(input_ids) * there).sum(1) / there.sum(1))

def bag(*, classes, vocab_size, padding):
    return Bag(vocab_size, padding, classes)
"""


def test_one_of_images_goes_on_after_a_stop_to_the_same_weights(tmp_path: Path) -> None:
    code = tmp_path / "nets.py"
    code.write_text(IMAGES)
    student = {"factory": f"{code}:net", "args": {"hidden": 12}}
    teacher = save_tiny_resnet(tmp_path / "teacher")
    world = Pictures(tmp_path, teacher, 24, student=student).scored()
    train.run(world.job(tmp_path / "whole"))
    with pytest.raises(Stopped):
        train.run(world.job(tmp_path / "stopped", stop=StopAfter(6)))
    train.run(world.job(tmp_path / "stopped"))
    folders = [tmp_path / name / "student" / "student" for name in ("whole", "stopped")]
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["body.1.weight"].shape == (12, 3 * 16 * 16)
    said = json.loads((folders[0] / "factory.json").read_text())
    assert (said["factory"], said["sha256"]) == ("nets.py:net", identity(code))
    assert said["arguments"]["hidden"] == 12
    assert (folders[0] / "preprocessor_config.json").is_file()

    images = torch.randn(2, 3, 16, 16)
    loaded = [load_student(world.recipe, teacher, folder).eval() for folder in folders]
    assert torch.equal(*(student(pixel_values=images).logits for student in loaded))

    before = world.plan().train_dirs["student"]
    code.write_text(IMAGES + "# another file\n")
    assert world.plan().train_dirs["student"] != before


@pytest.mark.slow
def test_the_command_line_runs_it_only_where_it_is_told_to(tmp_path: Path) -> None:
    code = tmp_path / "nets.py"
    ran = tmp_path / "ran"
    code.write_text(f"{TEXTS}\nopen({str(ran)!r}, 'a').close()\n")
    recipe = write_recipe(
        tmp_path,
        save_tiny_bert(tmp_path / "teacher", classes=CLASSES),
        write_jsonl(tmp_path / "rows.jsonl", records(40)),
        run={"dir": str(tmp_path / "run"), "task": "classification"},
        data={"source": str(tmp_path / "rows.jsonl"), "format": "labelled", "holdout": 8},
        student={"factory": f"{code}:bag"},
        generate=None,
        score={"targets": "full"},
        train={"epochs": 4, "tokens_per_step": 64, "learning_rate": 3.0e-2},
    )
    for command in ("plan", "run"):
        said = stillroom(command, recipe, expect=2).stderr
        assert "is code" in said
        assert "--allow-code" in said
    assert not ran.exists()
    stillroom("plan", recipe, "--allow-code")
    assert not ran.exists(), "a plan runs nothing"
    results = last_json(stillroom("run", recipe, "--allow-code", "--json"))["results"]
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]
    assert "nets.py:bag" in (tmp_path / "run" / "report.md").read_text()
    card = (tmp_path / "run" / "latest" / "student" / "README.md").read_text()
    assert 'load_file("path/to/student/model.safetensors")' in card
    assert "library_name: pytorch" in card
    assert "nets.py:bag" in card
    assert str(tmp_path) not in card


def of_texts(folder: Path, code: str) -> Recipe:
    """A recipe whose student this code makes; its teacher is a BERT, which tells pairs apart."""
    (folder / "nets.py").write_text(code)
    tree = {
        "run": {"dir": str(folder / "run"), "task": "classification"},
        "storage": {"dir": str(folder / "store")},
        "teacher": {"model": str(save_tiny_bert(folder / "teacher", classes=CLASSES))},
        "student": {"factory": f"{folder / 'nets.py'}:bag"},
        "data": {"source": "rows.jsonl", "format": "labelled"},
        "score": {"targets": "full"},
        "train": {"epochs": 1},
    }
    return Recipe.model_validate(tree)


def test_one_is_named_by_the_code_that_was_run(tmp_path: Path) -> None:
    recipe = of_texts(tmp_path, TEXTS)
    student = initial_student(recipe, tmp_path / "teacher")
    assert isinstance(student, FactoryStudent)
    (tmp_path / "nets.py").write_text(f"{TEXTS}# changed while it was trained\n")
    save_factory_student(student, recipe, tmp_path)
    with pytest.raises(UsageError, match="has changed since"):
        load_student(recipe, tmp_path / "teacher", tmp_path)


def identity(code: Path, **args: Any) -> str:
    """The identity of a student that a file's function makes."""
    return factory_id(factory_files(Student(factory=f"{code}:net", args=args)))


NEIGHBOURS = {
    "words_of_it.py": "from folder_of_it.parts import head",
    "folder_of_it/__init__.py": "",
    "folder_of_it/parts.py": "from .deep import head",
    "folder_of_it/deep.py": "from torch import nn\nhead = nn.Linear",
    "table.txt": "8",
}


def test_files_beside_it_are_imported_and_are_part_of_who_it_is(tmp_path: Path) -> None:
    code = TEXTS.replace(
        "self.head = nn.Linear(", "from words_of_it import head\n        self.head = head("
    )
    recipe = of_texts(tmp_path, code)
    for name, text in NEIGHBOURS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "unread.py").write_text("1 / 0")
    student = initial_student(recipe, tmp_path / "teacher")
    save_factory_student(student, recipe, tmp_path)
    said = json.loads((tmp_path / "factory.json").read_text())
    assert set(said["files"]) == {"nets.py", *NEIGHBOURS} - {"table.txt"}
    load_student(recipe, tmp_path / "teacher", tmp_path)

    code = tmp_path / "nets.py"
    known = {identity(code), identity(code, table="table.txt"), identity(code, table="no file")}
    assert len(known) == 2  # what is no file is no part of it
    for name in NEIGHBOURS:
        (tmp_path / name).write_text(f"{NEIGHBOURS[name]}\n# changed\n")
        now = identity(code, table="table.txt")
        assert now not in known
        known.add(now)
    with pytest.raises(UsageError, match="has changed since"):
        load_student(recipe, tmp_path / "teacher", tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        (
            "hidden_of_it.py",
            "__import__('hidden_of_it')",
            "imports hidden_of_it.py by no import state",
        ),
        ("json.py", "import json", "finds .* before the file json.py beside it. Rename"),
    ],
)
def test_a_neighbour_that_is_no_part_of_it_is_refused(
    tmp_path: Path, name: str, line: str, says: str
) -> None:
    (tmp_path / name).write_text("")
    recipe = of_texts(tmp_path, f"{line}\n{TEXTS}")
    with pytest.raises(UsageError, match=says):
        initial_student(recipe, tmp_path / "teacher")


def test_no_text_is_left_alone_with_its_batch_norm(tmp_path: Path) -> None:
    norm = "self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, classes))"
    recipe = of_texts(tmp_path, TEXTS.replace("self.head = nn.Linear(8, classes)", norm))
    student = initial_student(recipe, tmp_path / "teacher")

    def passes(tokens: int) -> Any:
        job: Any = SimpleNamespace(train=Train(epochs=1, tokens_per_pass=tokens))
        how: dict[str, Any] = {"teacher_dir": tmp_path / "teacher", "dtype": torch.float32}
        return training_passes(student, job, lengths=(3, 12), **how)

    assert passes(36).never_alone
    with pytest.raises(UsageError, match=r"train\.tokens_per_pass: 35 .* Set it to 36 or more"):
        passes(35)


class TestRefusals:
    @pytest.mark.parametrize(
        ("there", "instead", "says"),
        [
            (", **_", "", "token_type_ids"),
            (" / there.sum(1))", " / there.sum(1))[:1]", r"logits of two rows are \[1, 3\]"),
        ],
    )
    def test_what_cannot_read_rows_as_they_are_given(
        self, tmp_path: Path, there: str, instead: str, says: str
    ) -> None:
        recipe = of_texts(tmp_path, TEXTS.replace(there, instead))
        with pytest.raises(UsageError, match=says):
            initial_student(recipe, tmp_path / "teacher")

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            ({"model": "models/a"}, "`factory` makes the student, without `model`"),
            ({"lora": {}}, "without `lora`"),
            ({"save_dtype": "bfloat16"}, "stored in float32"),
        ],
    )
    def test_what_it_cannot_have(self, more: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            Student.model_validate({"factory": "nets:net", **more})

    def test_tasks_that_it_is_not_for(self, tmp_path: Path) -> None:
        tree = {
            "run": {"dir": "run"},
            "storage": {"dir": "store"},
            "teacher": {"model": "teacher"},
            "student": {"factory": "nets:net"},
            "data": {"source": "rows.jsonl", "format": "text"},
            "score": {"targets": "topk", "k": 4},
            "train": {"epochs": 1},
        }
        said = dict(check_together(Recipe.model_validate(tree)))
        assert "classification and image_classification alone" in said["student.factory"]

    def test_a_file_that_is_not_there(self) -> None:
        with pytest.raises(UsageError, match=r"no file none/such\.py"):
            factory_files(Student(factory="none.such:net"))

    @pytest.mark.parametrize("value", ["/data/table.npy", "~/table.npy"])
    def test_paths_of_this_machine_among_its_arguments(self, tmp_path: Path, value: str) -> None:
        (tmp_path / "nets.py").write_text(TEXTS)
        student = Student(factory=f"{tmp_path}/nets.py:bag", args={"deep": [{"at": value}]})
        with pytest.raises(
            UsageError, match=r"is a path of this machine.* Put the file beside nets.py"
        ):
            factory_files(student)
