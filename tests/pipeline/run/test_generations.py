"""The student of one run as the teacher of the next.

It is tested which student it is, and what plan, checks and cards say of it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit import last_json, prompts, recipe_tree, stillroom, write_jsonl
from tiny_llama import save_tiny_llama

from stillroom.pipeline.printing.text import public_name
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.recipe.run_folder import trained_student
from stillroom.storage.errors import UsageError
from stillroom.storage.store.store import Store

pytestmark = pytest.mark.slow

TEXTS = [{"prompt": r["prompt"], "completion": " the cat sat on the mat"} for r in prompts(16)]
BIG, TEACHER = "big-8b", "run:runs/first"


class Home:
    """A folder in which recipes run.

    They name things in it as a user does, without their whole path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recipe(self, name: str, taught_by: str, **sections: Any) -> Path:
        tree = recipe_tree(self.folder, Path(taught_by), Path("texts.jsonl"), generate=None)
        tree |= {
            "run": {"dir": f"runs/{name}"},
            "storage": {"dir": "store"},
            "data": {"source": "texts.jsonl", "format": "completion", "holdout": 4},
            "train": {"epochs": 1, "tokens_per_step": 128, "learning_rate": 5.0e-3},
            "teacher": {"model": taught_by},
        }
        if "teachers" in sections:
            del tree["teacher"]
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree | sections))
        return path

    def run(self, name: str, teacher: str, **sections: Any) -> Any:
        return last_json(stillroom("run", self.recipe(name, teacher, **sections), "--json"))

    def plan(self, name: str, teacher: str, **sections: Any) -> Any:
        return last_json(stillroom("plan", self.recipe(name, teacher, **sections), "--json"))

    def settings(self, name: str) -> Any:
        return json.loads((self.folder / "runs" / name / "latest" / "settings.json").read_text())


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose first recipe has run; its tests have a copy each."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_llama(folder / BIG)
    write_jsonl(folder / "texts.jsonl", TEXTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Home(folder).run("first", BIG)
    return folder


@pytest.fixture
def home(first_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    shutil.copytree(first_run, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Home(tmp_path)


def test_the_student_of_a_run_teaches_the_next_and_is_its_weights(home: Home) -> None:
    said = home.plan("second", TEACHER)["notes"]
    folder = (home.folder / "runs/first/latest").resolve()
    assert said[0] == (f"teacher.model: {TEACHER} is the student in {folder.name}, taught by {BIG}")
    home.run("second", TEACHER)
    second = home.settings("second")
    assert second["teacher_id"] != home.settings("first")["teacher_id"]
    assert second["lineage"] == [{"run": "first", "start": None, "teacher": "big-8b"}]
    # By another name it is the same teacher: nothing is scored again.
    stages = home.plan("named", str(folder / "student"))["stages"]
    assert (stages["score"]["state"], stages["score"]["pending"]) == ("done", 0)
    # Trained again it is another one.
    home.run("first", BIG, loss={"hard_weight": 0.5})
    stages = home.plan("second", TEACHER)["stages"]
    assert (stages["score"]["state"], stages["score"]["pending"]) == ("to do", 16)


def test_a_third_generation_knows_both_before_it(home: Home) -> None:
    home.run("second", TEACHER, student={"model": TEACHER})
    home.run("third", "run:runs/second")
    before = home.settings("third")["lineage"]
    assert [(one["run"], one["start"], one["teacher"]) for one in before] == [
        ("second", "run:first", "run:first"),
        ("first", None, "big-8b"),
    ]
    card = (home.folder / "runs/third/latest/student/README.md").read_text()
    assert (
        "The teacher is a student of Stillroom itself: `second` (begun as `run:first`, taught by "
        "`run:first`), and before it `first` (fresh weights, taught by `big-8b`); what the licence "
        "of `big-8b` asks holds for it too." in card
    )
    assert "base_model" not in card
    assert str(home.folder) not in card
    # What a run knows of its teacher it knows where that is gone.
    shutil.rmtree(home.folder / "runs/second")
    again = home.run("third", "run:runs/second", train={"epochs": 1})
    assert again["stages"]["train"]["state"] == "done"
    assert home.settings("third")["lineage"] == before


def test_a_student_of_two_teachers_knows_where_each_comes_from(home: Home) -> None:
    big = {"name": "big", "model": BIG, "license": "mit"}
    both = [big, {"name": "first", "model": TEACHER, "weight": 0.5}]
    said = home.run("second", BIG, teachers=both)
    assert said["stages"]["score/first"]["state"] == "done"
    first = {"run": "first", "start": None, "teacher": "big-8b"}
    assert home.settings("second")["lineages"] == {"first": [first]}
    card = (home.folder / "runs/second/latest/student/README.md").read_text()
    assert "The teacher `first` is a student of Stillroom itself: `first` (fresh weights" in card
    assert "(licence: `mit`)" in card
    assert "(licence: not stated)" in card
    (note,) = [note for note in home.plan("second", BIG, teachers=both)["notes"] if TEACHER in note]
    assert note.startswith(f"teachers: model of 'first': {TEACHER} is the student in train-")
    # Its own student knows both, and what they come from.
    home.run("third", "run:runs/second")
    second = {"run": "second", "start": None, "teacher": "big-8b", "beside": ["run:first"]}
    assert home.settings("third")["lineage"] == [second, first]
    card = (home.folder / "runs/third/latest/student/README.md").read_text()
    assert "taught by `big-8b` and `run:first`), and before it `first`" in card
    # No recipe teaches with what it trains.
    own = stillroom("plan", home.recipe("first", BIG, teachers=both), expect=2).stderr
    assert "teachers.1.model: names this recipe's own run.dir" in own
    revised = [big, both[1] | {"revision": "main"}]
    refused = stillroom("plan", home.recipe("second", BIG, teachers=revised), expect=2).stderr
    assert "teachers.1.revision: has no meaning for the student of a run" in refused


def test_a_student_writes_for_the_teacher_that_scores(home: Home) -> None:
    sections: dict[str, Any] = {
        "data": {"source": "texts.jsonl", "format": "prompt", "holdout": 4},
        "generate": {"engine": "hf", "max_tokens": 4, "temperature": 0.0, "model": TEACHER},
    }
    home.run("second", BIG, **sections)
    teacher_id = home.settings("second")["teacher_id"]
    assert teacher_id == home.settings("first")["teacher_id"]
    (kept,) = (home.folder / "store/teachers").glob("*/lineage.json")
    store = Store.open(home.folder / "store")
    shards = [store.shard("generations", one.shard.sha256) for one in store.commits("generations")]
    assert kept.parent.name in {shard.about["author_id"] for shard in shards} - {teacher_id}


def test_deep_verification_and_export_know_it(home: Home) -> None:
    home.run("second", TEACHER)
    found = last_json(stillroom("verify", "store", "--deep", "--teacher", TEACHER, "--json"))
    assert (found["ok"], found["deep"]["ok"]) == (True, True)
    assert found["deep"]["teacher_id"] == home.settings("second")["teacher_id"]
    stillroom("export", "second.yaml", "out", "--license", "mit")
    (provenance,) = (home.folder / "out").rglob("PROVENANCE.json")
    ((model, about),) = json.loads(provenance.read_text())["models"].items()
    assert model == home.settings("second")["teacher_id"]
    assert about["name"] == "run:first"
    assert about["lineage"] == [{"run": "first", "start": None, "teacher": "big-8b"}]
    card = (home.folder / "out/README.md").read_text()
    assert "`run:first` is a student of Stillroom itself: `first` (fresh weights" in card
    assert last_json(stillroom("verify", "store", "--json"))["ok"]


def test_what_is_no_finished_student_is_refused_by_name(home: Home) -> None:
    alone = home.folder / "runs" / "alone"
    (alone / "logs").mkdir(parents=True)
    begun = home.folder / "runs" / "begun" / "train-12345678"
    begun.mkdir(parents=True)
    (begun / "settings.json").write_text("{}")
    training = (home.folder / "runs/first/latest").resolve()
    for name, said in {
        "run:": "names no folder of this machine",
        "run:s3://bucket/run": "names no folder of this machine",
        "run:runs/gone": f"no folder runs/gone (looked in {home.folder})",
        "run:runs/alone": "is no folder in which a student was trained",
        "run:store": "is no folder in which a student was trained",
        "run:runs/begun": "has no finished student",
        f"run:{BIG}": "is a model's folder, not a run's. Name it without run:",
        f"run:{training}": f"Name the run, run:{training.parent}, or {training}/student",
    }.items():
        for field in ("teacher.model", "student.model", "generate.model"):
            with pytest.raises(UsageError) as refused:
                trained_student(name, field=field)
            assert f"{field}: {name}" in str(refused.value)
            assert said in str(refused.value)
        done = stillroom("plan", home.recipe("second", name), expect=2)
        assert said in " ".join(done.stderr.split())
    done = stillroom(
        "plan", home.recipe("second", BIG, student={"model": "run:runs/gone"}), expect=2
    )
    assert "student.model: run:runs/gone: no folder" in " ".join(done.stderr.split())


def test_a_run_is_not_its_own_teacher(home: Home) -> None:
    own = "names this recipe's own run.dir"
    for field, value, said in (
        ("teacher.model", "run:runs/../runs/first", f"teacher.model: {own}"),
        ("student.model", TEACHER, f"student.model: {own}"),
        ("teacher.revision", "main", "teacher.revision: has no meaning for the student of a run"),
        ("teacher.trust_remote_code", True, "No student has code of its own"),
    ):
        section, name = field.split(".")
        changed = {section: {"model": "run:runs/other", name: value}}
        with pytest.raises(UsageError) as refused:
            load_recipe(home.recipe("first", BIG, **changed))
        assert said in str(refused.value)


def test_a_run_is_named_without_what_lies_above_it() -> None:
    assert public_name("run:/home/me/runs/first") == "run:first"
    assert public_name("run:runs/first") == "run:first"
    assert public_name("run:first") == "run:first"
