"""A recipe without `student` and `train`: run, exported, and a student from the folder alone."""

from pathlib import Path
from typing import Any

import pytest
from kit import last_json, prompts, recipe_tree, stillroom, write_jsonl, write_recipe
from published import DATASETS_441, read_by_datasets
from tiny_llama import save_tiny_llama

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.recipe.load import load_recipe
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.published.manifest import Manifest, read_manifest

ALONE: dict[str, Any] = {"student": None, "train": None, "loss": None, "evaluate": {"tokens": 200}}
PROMPTS, HELD_OUT = 24, 4


class Made:
    """Run by the real command, and exported as its recipe says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = save_tiny_llama(folder / "teacher", hidden_size=32, intermediate_size=64)
        self.source = write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS))
        self.recipe = write_recipe(folder, self.teacher, self.source, **ALONE)
        self.planned = last_json(stillroom("plan", self.recipe, "--json"))
        self.outcome = last_json(stillroom("run", self.recipe, "--json"))
        self.store, self.published = folder / "store", folder / "published"
        self.exported = self.export(self.recipe, self.published)

    @staticmethod
    def export(place: Path, folder: Path) -> dict[str, Any]:
        return last_json(stillroom("export", place, folder, "--license", "mit", "--json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("alone"))


def manifest_of(folder: Path) -> Manifest:
    return read_manifest(LocalFiles(folder))


def test_it_ends_after_score(made: Made) -> None:
    stages = ["data", "generate", "score"]
    assert list(made.planned["stages"]) == list(made.outcome["stages"]) == stages
    assert made.outcome["results"] == {}
    assert sorted(path.name for path in (made.folder / "run").iterdir()) == ["logs"]
    told = last_json(stillroom("status", made.recipe, "--json"))["stages"]
    assert [(told[name]["state"], told[name]["rows"]) for name in stages] == [("done", PROMPTS)] * 3
    assert stillroom("inspect", made.store).stdout.startswith("soft_targets ")
    refused = stillroom("run", made.recipe, "--only", "train", expect=2).stderr
    assert "this recipe has no such stage. It has data, generate, score." in refused
    assert "has no report" in stillroom("report", made.folder / "run", expect=2).stderr


def test_the_recipe_selects_what_a_student_would_see(made: Made, tmp_path: Path) -> None:
    rows = {"train": PROMPTS - HELD_OUT, "test": HELD_OUT}
    assert made.exported["rows"] == {"generations": rows, "soft_targets": rows}
    with_student = write_recipe(tmp_path, made.teacher, made.source)
    where = f"storage.dir={made.store}"
    plan = make_plan(load_recipe(with_student, [where]))
    chosen = {split: snapshot.id for split, snapshot in plan.snapshots.items()}
    assert {s: found.snapshot for s, found in manifest_of(made.published).splits.items()} == chosen
    # Other held-out prompts and fewer entries are another choice of the same rows.
    fewer = ("--set", "score.k=2", "--set", "data.limit=12")
    refused = stillroom(
        "export", made.recipe, tmp_path / "no", "--license", "mit", *fewer, expect=2
    )
    assert "the recipe's rows are not all there (data to do: " in refused.stderr
    assert not (tmp_path / "no").exists()


def test_the_store_alone_says_the_same(made: Made, tmp_path: Path) -> None:
    """The store holds one recipe's rows.

    Again it is the same folder, and in another one the same bytes.
    """
    again = [made.export(made.recipe, place) for place in (made.published, tmp_path / "published")]
    assert [found["built"] for found in again] == [False, True]
    assert {found["version"] for found in again} == {made.exported["version"]}
    said = made.export(made.store, tmp_path / "by-store")
    assert said["built"]
    found = manifest_of(tmp_path / "by-store")
    assert found.splits == manifest_of(made.published).splits
    tables = [
        {f.name: f.sha256 for f in m.files if f.table} for m in (found, manifest_of(made.published))
    ]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--run", "x"), "goes along already"),
        (("--snapshot", "zz"), "no snapshot zz"),
    ],
)
def test_what_a_recipe_makes_idle_is_refused(
    made: Made, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    done = stillroom("export", made.recipe, tmp_path / "no", "--license", "mit", *words, expect=2)
    assert says in done.stderr


def test_a_store_takes_no_field_of_a_recipe(made: Made, tmp_path: Path) -> None:
    words = ("--license", "mit", "--set", "score.k=2")
    done = stillroom("export", made.store, tmp_path / "no", *words, expect=2)
    assert f"--set: {made.store} is no recipe" in done.stderr


@pytest.mark.slow
def test_a_student_learns_from_the_folder_and_datasets_read_it(made: Made, tmp_path: Path) -> None:
    """Teacher, prompts and the first store are gone."""
    hidden = made.folder / "hidden"
    hidden.mkdir()
    for path in (made.teacher, made.source, made.store):
        path.rename(hidden / path.name)
    name = str(made.published)
    tree = recipe_tree(tmp_path, made.published, made.published, generate=None)
    storage = {"dir": str(tmp_path / "mine"), "sources": [name]}
    recipe = write_recipe(tmp_path, made.published, made.published, generate=None, storage=storage)
    outcome = last_json(stillroom("run", recipe, "--json"))
    assert outcome["stages"]["train"]["rows"] == (PROMPTS - HELD_OUT) * tree["train"]["epochs"]
    results = outcome["results"]
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]
    _, rows = read_by_datasets([made.published], tmp_path / "now")
    assert {words.split()[-1]: count for words, (count, _) in rows.items()} == {
        "train": PROMPTS - HELD_OUT,
        "test": HELD_OUT,
    }
    if DATASETS_441 is not None:
        before = read_by_datasets([made.published], tmp_path / "old", installed_in=DATASETS_441)
        assert before == ("4.4.1", rows)
