"""Deep verification of features: the teacher agrees with what it said.

It finds what is planted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit import last_json, stillroom
from planting import copied, rows_of
from tiny_classes import World as Classes
from tiny_classes import records
from tiny_jobs import scored_store
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert
from tiny_store import SilentProgress

from stillroom.stages.audit.features import FeatureFault, FeaturesRead, choose_features, read_again
from stillroom.stages.models.identity import Identity
from stillroom.storage.store.store import Store
from stillroom.storage.tables.features import Rounded

Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    store: Store
    teacher: Identity

    def read(self, store: Store | None = None) -> FeaturesRead:
        rows = choose_features(store or self.store, self.teacher.id, rows=64, seed=0)
        return read_again(self.teacher, rows, device_map=None, progress=SilentProgress())


def features(bits: int) -> list[dict[str, Any]]:
    return [{"what": "hidden", "layers": [0, 2], "bits": bits}]


MULTIPLIED = [{"what": what, "layers": [0, 2]} for what in ("queries", "keys", "values")]


@pytest.fixture(scope="module", params=["hidden", "multiplied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("features")
    teacher = save_tiny_llama(folder / "teacher", initializer_range=0.3, num_hidden_layers=3)
    asked = features(8) if request.param == "hidden" else MULTIPLIED
    score = {"k": 4, "features": asked}
    _, store, identity = scored_store(folder, teacher, rows=12, score=score)
    return World(store, identity)


@pytest.mark.numeric
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_teacher_agrees_with_itself_to_the_rounding(tmp_path: Path, bits: int) -> None:
    teacher = save_tiny_llama(tmp_path / "teacher", initializer_range=0.3, num_hidden_layers=3)
    score = {"k": 4, "features": features(bits)}
    _, store, identity = scored_store(tmp_path, teacher, rows=8, score=score)
    found = World(store, identity).read()
    assert (found.off, found.without_text) == ([], 0)
    assert found.rows == 2 * sum(row["kind"] == "topk" for row in rows_of(store))
    least, most = {8: (1e-3, 2e-2), 16: (1e-5, 1e-3), 32: (0, 1e-5)}[bits]
    assert least <= found.worst <= most


@pytest.mark.numeric
def test_an_encoder_agrees_with_itself(tmp_path: Path) -> None:
    score = {"targets": "full", "features": [{"what": "hidden", "layers": [1]}]}
    teacher = save_tiny_bert(tmp_path / "teacher")
    world = Classes(tmp_path, teacher, records(24), score=score).scored()
    words = ("verify", tmp_path / "store", "--deep", "--teacher", teacher, "--json")
    deep = last_json(stillroom(*words))["deep"]
    assert deep["ok"]
    assert deep["rows"] == 0, "of a classification head, whose targets are not read again"
    assert deep["features"]["rows"] == len(world.rows("features"))


def planted(store: Store, root: Path, change: Callable[[Row, list[Row]], np.ndarray]) -> Store:
    """A copy in which every row of features has other states; each row is valid by itself."""
    rows = rows_of(store, "features")

    def changed(row: Row) -> Row:
        rounded = Rounded.of(change(row, rows), row["dtype"])
        return row | {"values": rounded.values.tobytes(), "scale": rounded.scale}

    return copied(store, root, changed, table="features")


def states(row: Row) -> np.ndarray:
    return Rounded.from_row(row).restored()


def one_on(row: Row, _: list[Row]) -> np.ndarray:
    return np.roll(states(row), 1, axis=0)


def one_back(row: Row, _: list[Row]) -> np.ndarray:
    return np.roll(states(row), -1, axis=0)


def of_another_layer(row: Row, rows: list[Row]) -> np.ndarray:
    mine = (r for r in rows if r["text_key"] == row["text_key"] and r["kind"] == row["kind"])
    return states(next(r for r in mine if r["layer"] != row["layer"]))


def of_another_text(row: Row, rows: list[Row]) -> np.ndarray:
    name = row["kind"], row["layer"]
    alike = [r for r in rows if (r["kind"], r["layer"]) == name]
    number = next(n for n, r in enumerate(alike) if r["key"] == row["key"])
    other, n = states(alike[(number + 1) % len(alike)]), row["vectors"]
    return np.resize(other, (n, row["width"])) if len(other) < n else other[:n]


def of_nobody(row: Row, _: list[Row]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=states(row).shape).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (one_on, "shifted by one position"),
        (one_back, "shifted by one position"),
        (of_another_layer, "another layer's"),
        (of_another_text, "another text's"),
        (of_nobody, "other numbers"),
    ],
)
def test_planted_faults_are_found_and_told_apart(
    world: World, tmp_path: Path, change: Any, fault: FeatureFault
) -> None:
    store = planted(world.store, tmp_path / "store", change)
    found = world.read(store)
    assert found.rows > 10
    assert len(found.off) == found.rows, "every row is off"
    told = [off.fault for off in found.off]
    # A shorter text that is repeated fits no text that was read.
    least = 0.5 if change is of_another_text else 0.9
    assert told.count(fault) >= least * found.rows
    assert all(off.error > 10 * off.allowed for off in found.off)


def test_the_command_says_it_and_ends_with_3(world: World, tmp_path: Path) -> None:
    store = planted(world.store, tmp_path / "store", one_on)
    teacher = world.teacher.folder
    done = stillroom("verify", store.root, "--deep", "--teacher", teacher, "--json", expect=3)
    assert "Its states are the teacher's at the position before their own" in done.stdout
    deep = last_json(done)["deep"]
    assert not deep["ok"]
    assert deep["off"] == []
    assert {off["fault"] for off in deep["features"]["off"]} == {"shifted by one position"}
    done = stillroom("verify", world.store.root, "--deep", "--teacher", teacher)
    assert "rows read again; those that are right are off by" in done.stdout


POOLED = ("cls", "mean", "last")


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An encoder, so that each pooling has something to say."""
    folder = tmp_path_factory.mktemp("pooled")
    asked = [{"what": "pooled", "layers": [0, 1], "pooling": p} for p in POOLED]
    score = {"targets": "full", "features": asked}
    teacher = save_tiny_bert(folder / "teacher")
    world = Classes(folder, teacher, records(24), score=score).scored()
    identity = world.plan().bound.teacher
    assert identity is not None
    return World(world.store, identity)


@pytest.mark.numeric
def test_pooled_rows_agree_with_the_teacher(pooled: World) -> None:
    found = pooled.read()
    assert (found.rows, found.off) == (64, [])
    assert 1e-6 < found.worst < 1e-3


def the_next_text(row: Row, rows: list[Row]) -> np.ndarray:
    alike = [r for r in rows if (r["kind"], r["layer"]) == (row["kind"], row["layer"])]
    number = next(n for n, r in enumerate(alike) if r["key"] == row["key"])
    return states(alike[(number + 1) % len(alike)])


def the_other_layer(row: Row, rows: list[Row]) -> np.ndarray:
    mine = (r for r in rows if r["text_key"] == row["text_key"] and r["kind"] == row["kind"])
    return states(next(r for r in mine if r["layer"] != row["layer"]))


def the_other_pooling(row: Row, rows: list[Row]) -> np.ndarray:
    mine = (r for r in rows if r["text_key"] == row["text_key"] and r["layer"] == row["layer"])
    return states(next(r for r in mine if r["kind"] != row["kind"]))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (the_next_text, "another text's"),
        (the_other_layer, "another layer's"),
        (the_other_pooling, "pooled otherwise"),
        (of_nobody, "other numbers"),
    ],
)
def test_a_planted_vector_is_found_and_told_apart(
    pooled: World, tmp_path: Path, change: Any, fault: FeatureFault
) -> None:
    found = pooled.read(planted(pooled.store, tmp_path / "store", change))
    assert len(found.off) == found.rows == 64, "every row is off"
    assert [off.fault for off in found.off].count(fault) >= 0.9 * found.rows
