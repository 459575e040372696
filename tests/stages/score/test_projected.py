"""Projected values in the pass of scoring: what is stored, what it costs, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import feature_references as definition
import numpy as np
import pytest
import torch
from kit import last_json, prompts, recipe_tree, stillroom, write_jsonl, write_recipe
from planting import copied, rows_of
from tiny_classes import World, records
from tiny_jobs import done_until_score, scored_store
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert
from tiny_store import SilentProgress
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stillroom.stages.audit.features import choose_features, read_again
from stillroom.stages.models.classification import Inputs
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.errors import UsageError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.matrices import matrix_file
from stillroom.storage.store.store import Store
from stillroom.storage.tables.features import Rounded
from stillroom.storage.tables.row_builders import text_key

Row = dict[str, Any]
GROUPED = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def asked(*layers: int, project: int = 6, bits: int = 32) -> list[Row]:
    return [{"what": "values", "layers": list(layers), "project": project, "bits": bits}]


def check_stored(store: Store, row: Row, values: torch.Tensor, *, numbers: tuple[int, int]) -> None:
    """A row against the values [T, D] of the teacher, and by how much their cosines are moved."""
    before, to = numbers
    matrix = np.load(store.files.path(matrix_file(row["projection"])))
    assert matrix.shape == (before, to)
    assert (row["kind"], row["width"]) == (f"values_{to}", to)
    assert (row["heads"], row["projected_from"]) == (None, before)
    stored = Rounded.from_row(row).restored()
    np.testing.assert_allclose(stored, values.numpy() @ matrix, atol=1e-5)
    right = definition.cosines_off(values.double(), torch.from_numpy(matrix).double())
    assert row["projection_error"] == pytest.approx(right, abs=1e-5)
    assert row["rounding_error"] == 0


@pytest.mark.numeric
def test_what_is_stored_is_the_teachers_values_by_a_matrix_of_the_store(tmp_path: Path) -> None:
    """Of grouped heads, and of texts of other lengths that share a pass with padding."""
    teacher = save_tiny_llama(tmp_path / "teacher", initializer_range=0.3, **GROUPED)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(8))
    spoken = {"engine": "hf", "temperature": 1.0, "max_tokens": 8}
    score = {"k": 4, "features": asked(0, 1), "batch_tokens": 64}
    tree = recipe_tree(tmp_path, teacher, source, generate=spoken, score=score)
    store, _ = done_until_score(Recipe.model_validate(tree))
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    said: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        block.self_attn.v_proj.register_forward_hook(
            lambda _, __, values, layer=layer: said.update({layer: values[0]})
        )
    texts = {text_key(row["token_ids"]): row["token_ids"] for row in rows_of(store)}
    rows = rows_of(store, "features")
    assert len({row["projection"] for row in rows}) == 1, "layers of one width have one matrix"
    for row in rows:
        with torch.no_grad():
            model(input_ids=torch.from_numpy(texts[row["text_key"]].astype(np.int64))[None])
        check_stored(store, row, said[row["layer"]], numbers=(16, 6))
    assert len(rows) > 6
    assert verify(store).ok


@pytest.mark.numeric
def test_an_encoders_values_are_projected_too(tmp_path: Path) -> None:
    teacher = save_tiny_bert(tmp_path / "teacher")
    score = {"targets": "full", "features": asked(1), "batch_tokens": 64}
    world = World(tmp_path, teacher, records(16), score=score).scored()
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    said: list[torch.Tensor] = []
    layer = model.bert.encoder.layer[1].attention.self.value
    layer.register_forward_hook(lambda _, __, values: said.append(values[0]))
    inputs = Inputs.of(model, teacher)
    texts = {text_key(row["token_ids"]): row["token_ids"] for row in world.rows()}
    for row in world.rows("features"):
        with torch.no_grad():
            model(**inputs.tensors([texts[row["text_key"]]]))
        check_stored(world.store, row, said[-1], numbers=(model.config.hidden_size, 6))
    assert said


def test_plan_status_and_report_know_them(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    teacher = tiny_llama(**GROUPED)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(24))
    features = asked(1, project=6, bits=16)
    alone = {"student": None, "train": None, "loss": None, "evaluate": {"tokens": 200}}
    score = {"k": 4, "features": features}
    path = write_recipe(tmp_path, teacher, source, score=score, **alone)
    notes = last_json(stillroom("plan", path, "--json"))["notes"]
    assert "features: 12 bytes a token of the rows to train on" in notes
    assert "  values of block 1 in 6 numbers: 12 bytes a token, float16" in notes
    stillroom("run", path, "--until", "score")
    store = Store.open(tmp_path / "store")
    rows = rows_of(store, "features")
    assert sum(len(row["values"]) for row in rows) == 12 * sum(row["vectors"] for row in rows)
    found = last_json(stillroom("status", path, "--json"))["stages"]["score"]["features"]
    weights = [row["vectors"] for row in rows]
    mean = np.average([row["projection_error"] for row in rows], weights=weights)
    error = found["projection_error"]["values_6 1 float16"]
    assert error["mean"] == pytest.approx(mean, abs=1e-6)
    assert error["most"] == pytest.approx(max(r["projection_error"] for r in rows), abs=1e-6)
    assert found["rounding_error"].keys() == found["projection_error"].keys()
    assert "cosines moved" in stillroom("status", path).stdout
    # Others are a kind of their own: whole values, and of other numbers.
    for other in ([{"what": "values", "layers": [1]}], asked(1, project=5, bits=16)):
        changed = write_recipe(
            tmp_path, teacher, source, score=score | {"features": other}, **alone
        )
        line = last_json(stillroom("plan", changed, "--json"))["stages"]["score"]
        assert line["why"].endswith("stored without features")


def test_numbers_that_are_no_fewer_are_refused(tmp_path: Path) -> None:
    """By the plan, and where no config says it as scoring begins."""
    teacher = save_tiny_llama(tmp_path / "teacher", **GROUPED)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    score = {"k": 4, "features": asked(1, project=16)}
    path = write_recipe(tmp_path, teacher, source, score=score)
    refused = stillroom("plan", path, expect=2).stderr
    assert "the teacher's values of block 1 have 16 numbers, and become no fewer" in refused
    assert "Set project below 16" in refused
    spoken = {"engine": "hf", "temperature": 1.0, "max_tokens": 4}
    tree = recipe_tree(tmp_path, teacher, source, generate=spoken, score=score)
    with pytest.raises(UsageError, match="have 16 numbers, and become no fewer"):
        done_until_score(Recipe.model_validate(tree))
    store = Store.open(tmp_path / "store")
    assert not store.commits("features")
    assert not store.commits("soft_targets")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Any]:
    folder = tmp_path_factory.mktemp("deep")
    teacher = save_tiny_llama(
        folder / "teacher", initializer_range=0.3, num_hidden_layers=3, **GROUPED
    )
    score = {"k": 4, "features": asked(0, 2, bits=8)}
    _, store, identity = scored_store(folder, teacher, rows=8, score=score)
    return store, identity


def read(store: Store, teacher: Any) -> Any:
    rows = choose_features(store, teacher.id, rows=64, seed=0)
    return read_again(teacher, rows, device_map=None, progress=SilentProgress())


def planted(store: Store, root: Path, change: Callable[[Row], np.ndarray]) -> Store:
    """A copy with its matrix, in which each row has other vectors."""

    def changed(row: Row) -> Row:
        rounded = Rounded.of(change(row), row["dtype"])
        return row | {"values": rounded.values.tobytes(), "scale": rounded.scale}

    copy = copied(store, root, changed, table="features")
    for name, _, _ in store.files.walk("matrices"):
        copy.files.put_if_absent(name, store.files.read(name))
    assert verify(copy).ok, "only the teacher can say it"
    return copy


@pytest.mark.numeric
def test_a_teacher_agrees_by_the_rows_own_matrix(world: tuple[Store, Any]) -> None:
    found = read(*world)
    assert (found.off, found.without_text) == ([], 0)
    assert found.rows == len(rows_of(world[0], "features"))
    assert 1e-3 < found.worst < 2e-2


@pytest.mark.parametrize("fault", ["shifted by one position", "another layer's", "other numbers"])
def test_what_is_planted_is_found(world: tuple[Store, Any], tmp_path: Path, fault: str) -> None:
    store, teacher = world
    every = {
        (r["text_key"], r["layer"]): Rounded.from_row(r).restored()
        for r in rows_of(store, "features")
    }

    def change(row: Row) -> np.ndarray:
        mine = every[row["text_key"], row["layer"]]
        match fault:
            case "shifted by one position":
                return np.roll(mine, 1, axis=0)
            case "another layer's":
                return every[row["text_key"], 2 - row["layer"]]
        return mine[:, ::-1].copy()  # as by another matrix

    found = read(planted(store, tmp_path / "planted", change), teacher)
    assert len(found.off) == found.rows
    assert {one.fault for one in found.off} == {fault}


def test_rows_without_their_matrix_are_not_read_again(
    world: tuple[Store, Any], tmp_path: Path
) -> None:
    store = planted(world[0], tmp_path / "lost", lambda row: Rounded.from_row(row).restored())
    (name,) = {matrix_file(row["projection"]) for row in rows_of(store, "features")}
    store.files.remove(name)
    assert not choose_features(store, world[1].id, rows=64, seed=0)
    assert not verify(store).ok
