"""Features in a published folder: which leave, and what the card says.

A training reads them from it when its teacher is gone.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from kit import prompts, recipe_tree, write_jsonl
from planting import rows_of
from tiny_jobs import done_until_score
from tiny_llama import save_tiny_llama
from tiny_store import SilentProgress

from stillroom.pipeline.plan.plan import Plan, make_plan
from stillroom.pipeline.publish.export import PublishRequest, export
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.joined import open_store
from stillroom.storage.published.choice import Choice
from stillroom.storage.published.manifest import damaged_files, read_manifest
from stillroom.storage.snapshots.snapshot import save_snapshot
from stillroom.storage.store.matrices import matrix_file
from stillroom.storage.store.store import Store
from stillroom.storage.tables.features import Rounded

FEATURES = [
    {"what": "hidden", "layers": [0, 1]},
    {"what": "hidden", "layers": [2], "bits": 16},
    {"what": "queries", "layers": [1]},
    {"what": "keys", "layers": [1]},
    {"what": "embeddings"},
]
LOSS = {
    "features": [
        *({"match": match, "layers": {1: 0}} for match in ("hidden", "attention")),
        {"match": "embeddings"},
    ]
}
LEARNT = {("hidden", 1, "int8"), ("queries", 1, "float16"), ("keys", 1, "float16")}


class House:
    """A store with features of all its rows, and the recipe that filled it."""

    def __init__(self, folder: Path, teacher: Path, **sections: Any) -> None:
        self.folder, self.teacher, self.sections = folder, teacher, sections
        self.source = write_jsonl(folder / "prompts.jsonl", prompts(20))
        self.recipe = self.changed()
        self.store, self.identity = done_until_score(self.recipe)

    def changed(self, *, whose: str | None = None, **sections: Any) -> Recipe:
        base: dict[str, Any] = {
            "storage": {"dir": str(self.folder / "store"), "commit_rows": 5},
            "generate": {"engine": "hf", "temperature": 1.0, "max_tokens": 8},
            "score": {"k": 4, "features": FEATURES},
            "loss": LOSS,
            "student": {"config": {"num_hidden_layers": 2, "hidden_size": 8}},
            "train": {"epochs": 1, "tokens_per_step": 64, "learning_rate": 1e-3},
        } | self.sections
        tree = recipe_tree(self.folder, Path(whose or self.teacher), self.source, **base | sections)
        return Recipe.model_validate(tree)

    def from_folder(self, copy: Path, store: Path, features: list[dict[str, Any]]) -> Recipe:
        """A recipe that trains from what was published, with a store of its own beside it."""
        splits = read_manifest(LocalFiles(copy)).splits
        held_out = splits["test"].rows if "test" in splits else 0
        Store.open(store, create=True)
        return self.changed(
            storage={"dir": str(store), "sources": [str(copy)]},
            whose=str(copy),
            data={"source": str(copy), "format": "prompt", "holdout": held_out},
            generate=None,
            score={"k": 4, "features": features},
        )

    def export(self, name: str, **more: Any) -> tuple[Path, list[str]]:
        """The version's folder, and what was said."""
        said: list[str] = []
        asked = PublishRequest(store=str(self.store.root), license="cc0-1.0", **more)
        exported = export(asked, self.folder / name, say=said.append)
        return self.folder / name / exported.manifest.version, said


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    return House(folder, save_tiny_llama(folder / "teacher", num_hidden_layers=3))


def published(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"features/{split}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def texts(folder: Path, split: str = "train") -> list[bytes]:
    files = sorted(folder.glob(f"soft_targets/{split}-*.parquet"))
    return [row["text_key"] for file in files for row in pq.read_table(file).to_pylist()]


def test_what_the_recipes_student_learns_from_goes_along(house: House) -> None:
    folder, said = house.export("learnt", rows_of=house.recipe)
    rows = published(folder)
    assert {(row["kind"], row["layer"], row["dtype"]) for row in rows} == LEARNT
    for kind, *_ in LEARNT:
        of_kind = [row["text_key"] for row in rows if row["kind"] == kind]
        assert of_kind == texts(folder), "in the order of the samples"
    assert not published(folder, "test"), "nobody compares on them"
    stored = {row["key"]: row for row in rows_of(house.store, "features")}
    for row in rows:
        for column in ("values", "heads", "score_scale", "causal", "window"):
            assert row[column] == stored[row["key"]][column]
    (matrix,) = folder.glob("matrices/*/*.npy")
    assert np.load(matrix).dtype == np.float16
    assert any(line.startswith("features that stay in") for line in said), "layers 0 and 2"
    manifest = read_manifest(LocalFiles(folder.parent))
    assert {f"matrices/{matrix.parent.name}/{matrix.name}"} <= {f.name for f in manifest.files}
    card = (folder.parent / "README.md").read_text()
    for words in ("config_name: features", "`hidden 1 int8`", "input embeddings", "part of the"):
        assert words in card
    settings = re.search(r"^score: .*$", card, re.MULTILINE)
    assert settings
    assert '"what": "hidden", "layers": [1], "bits": 8' in settings[0]


def test_of_a_store_nothing_goes_along_unless_it_is_asked_for(house: House) -> None:
    folder, said = house.export("plain")
    assert any(line.startswith("features that stay in") for line in said)
    assert not (folder / "features").exists()
    assert not (folder / "matrices").exists()
    assert "features" not in json.loads((folder / "MANIFEST.json").read_text())["chosen"]
    refused, _ = house.export("refused", rows_of=house.recipe, features=False)
    assert not (refused / "features").exists()
    every, said = house.export("every", features=True)
    assert {(row["kind"], row["layer"], row["dtype"]) for row in published(every)} == {
        ("hidden", 0, "int8"),
        ("hidden", 2, "float16"),
        *LEARNT,
    }
    assert len(published(every)) == len(rows_of(house.store, "features"))
    assert not any("features that stay" in line for line in said)
    with pytest.raises(UsageError, match="--features: features leave whole, not by --columns"):
        house.export("columns", features=True, choice=Choice(columns=("text",)))


def test_features_of_rows_that_stay_at_home_stay_too(house: House) -> None:
    folder, _ = house.export("some", features=True, choice=Choice(where="completion_tokens > 4"))
    left = texts(folder)
    assert 0 < len(left) < len({row["text_key"] for row in rows_of(house.store, "features")})
    assert {row["text_key"] for row in published(folder)} == set(left)


def test_others_read_it_by_the_code_of_the_card(house: House, capsys: Any) -> None:
    folder, _ = house.export("read", rows_of=house.recipe)
    blocks = re.findall(
        r"```python\n(.*?)```", (folder.parent / "README.md").read_text(), re.DOTALL
    )
    code = next(block for block in blocks if '"features"' in block)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder.parent)), names)
    row = published(folder)[0]
    scale = None if row["scale"] is None else np.float32(row["scale"])
    restored = Rounded.from_row(row | {"scale": scale}).restored()
    np.testing.assert_array_equal(names["vectors"], restored)
    assert f"{row['kind']} {row['layer']}" in capsys.readouterr().out


def trained(recipe: Recipe, store: Store, plan: Plan, folder: Path) -> list[float]:
    for snapshot in (*plan.snapshots.values(), plan.features):
        save_snapshot(store, snapshot)
    job = Job(
        recipe=recipe,
        progress=SilentProgress(),
        stop=StopFlag(),
        teacher_id=plan.bound.binding.teacher_id,
        train_dirs={"student": folder},
        snapshots={split: s.id for split, s in plan.snapshots.items()},
        features_id=plan.features.id,
    )
    train.run(job)
    return [point["loss"] for point in json.loads(LocalFiles(folder).read("train.json"))["history"]]


@pytest.mark.numeric
def test_a_training_from_the_folder_is_the_training_from_the_store(
    house: House, tmp_path: Path
) -> None:
    """With the teacher gone: what is published serves, by the names that the card gives."""
    folder, _ = house.export("served", rows_of=house.recipe)
    right = trained(house.recipe, house.store, make_plan(house.recipe), tmp_path / "right")
    copy = shutil.copytree(folder.parent, tmp_path / "copy")
    learnt = [FEATURES[0] | {"layers": [1]}, *FEATURES[2:]]
    recipe = house.from_folder(copy, tmp_path / "other", learnt)
    plan = make_plan(recipe, write=True)
    assert [(line.name, line.state) for line in plan.stages][:2] == [
        ("data", "done"),
        ("score", "done"),
    ]
    store = open_store(recipe.storage.dir, recipe.storage.sources)
    assert trained(recipe, store, plan, tmp_path / "found") == right
    # What is not there is asked for in vain, and what is damaged is not learnt from.
    lacking = recipe.model_copy(update={"score": house.recipe.score})
    line = make_plan(lacking).line("score")
    assert (line.state, "stored without features" in line.why) == ("to do", True)
    for file in (
        next(copy.glob("v-*/matrices/*/*.npy")),
        next(copy.glob("v-*/features/*.parquet")),
    ):
        data = file.read_bytes()
        file.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
        damaged = damaged_files(LocalFiles(copy), read_manifest(LocalFiles(copy)))
        assert damaged == [str(file.relative_to(copy))]
        with pytest.raises(IntegrityError, match=file.name):
            make_plan(recipe, write=True)
        file.write_bytes(data)


@pytest.mark.numeric
def test_projected_values_leave_with_their_matrix_and_serve(tmp_path: Path) -> None:
    """A row alone says by what file it was made, and the teacher is gone."""
    shape = {"hidden_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4}
    teacher = save_tiny_llama(tmp_path / "teacher", **shape)
    features = [{"what": "values", "layers": [1], "project": 128}]
    loss = {"match": "relations", "of": ["values"], "relation_heads": 1, "project": 128}
    house = House(
        tmp_path, teacher, score={"k": 4, "features": features}, loss={"features": [loss]}
    )
    folder, _ = house.export("served", rows_of=house.recipe)
    matrices = {row["projection"] for row in published(folder)}
    assert [folder / matrix_file(one) for one in matrices] == [*folder.glob("matrices/*/*.npy")]
    card = (folder.parent / "README.md").read_text()
    for words in (
        "the matrix by which vectors of 160 numbers became 128",
        "projection, mean",
        "`values_128 1 float16`",
        '"what": "values", "layers": [1], "bits": 16, "project": 128',
    ):
        assert words in card
    right = trained(house.recipe, house.store, make_plan(house.recipe), tmp_path / "right")
    copy = shutil.copytree(folder.parent, tmp_path / "copy")
    shutil.rmtree(teacher)
    shutil.rmtree(tmp_path / "store")
    recipe = house.from_folder(copy, tmp_path / "other", features)
    plan = make_plan(recipe, write=True)
    assert plan.line("score").state == "done"
    store = open_store(recipe.storage.dir, recipe.storage.sources)
    assert trained(recipe, store, plan, tmp_path / "found") == right
