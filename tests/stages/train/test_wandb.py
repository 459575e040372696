"""Weights & Biases when asked.

There is one run for one student however often it goes on, and no training is lost to it.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_llama import save_tiny_llama
from tiny_store import StopAfter, make_job, make_recipe, make_store, random_texts, snapshot_of

from stillroom.stages.train import scalars
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job
from stillroom.storage.errors import Stopped, UsageError


@dataclass
class FakeWandb:
    """A stand-in at the edge of the package.

    What was asked of it is kept like its server keeps runs.
    """

    broken: str = ""
    """Which call fails."""
    started: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    finished: int = 0

    Settings = SimpleNamespace

    def init(self, **asked: Any) -> Any:
        self._work("init")
        self.started.append(asked)
        points = self.runs.setdefault(asked["id"], [])

        def log(point: dict[str, Any]) -> None:
            self._work("log")
            points.append(point)

        def finish() -> None:
            self._work("finish")
            self.finished += 1

        summary = points[-1] if points else {}
        return SimpleNamespace(
            log=log, finish=finish, summary=summary, define_metric=lambda *_, **__: None
        )

    def _work(self, name: str) -> None:
        if self.broken == name:
            raise ConnectionError("api.wandb.ai: no route")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(scalars, "find_spec", lambda name: object())
    return fake


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    folder = tmp_path_factory.mktemp("wandb")
    teacher = save_tiny_llama(folder / "teacher")
    store = make_store(folder / "store", teacher, texts=random_texts(20))
    return store, teacher, snapshot_of(store).id


@pytest.fixture
def job(shared: tuple[Any, Any, str], tmp_path: Any) -> Job:
    store, teacher, snapshot = shared
    recipe = make_recipe(store, teacher, train={"tokens": 900, "wandb": "stories"})
    return make_job(recipe, tmp_path / "run" / "train-1", train=snapshot)


def test_it_gets_what_tensorboard_gets_in_one_run_also_when_stopped_and_gone_on(
    job: Job, wandb: FakeWandb
) -> None:
    with pytest.raises(Stopped):
        train.run(replace(job, stop=StopAfter(9)))
    train.run(job)
    first, second = wandb.started
    assert first["id"] == second["id"]
    assert (second["project"], second["resume"], second["name"]) == (
        "stories",
        "allow",
        "run/train-1",
    )
    assert second["config"]["recipe"]["train"]["tokens"] == 900
    assert wandb.finished == 2
    board = EventAccumulator(str(job.train_dirs["student"] / "tensorboard")).Reload()
    (points,) = wandb.runs.values()
    shown = {
        name: {e.step: e.value for e in board.Scalars(name)} for name in board.Tags()["scalars"]
    }
    logged = {name: {p["tokens"]: p[name] for p in points if name in p} for name in shown}
    assert {name: set(values) for name, values in logged.items()} == {
        name: set(v) for name, v in shown.items()
    }
    assert logged["loss/total"] == pytest.approx(shown["loss/total"], rel=1e-5)
    tokens = [point["tokens"] for point in points]
    assert tokens == sorted(tokens)


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_a_training_goes_on_without_it(job: Job, wandb: FakeWandb, broken: str) -> None:
    wandb.broken = broken
    train.run(job)
    progress: Any = job.progress
    said = [line for line in progress.said if line.startswith("wandb: ")]
    assert said == ["wandb: ConnectionError: api.wandb.ai: no route: nothing more is sent to it"]
    assert json.loads((job.train_dirs["student"] / "train.json").read_text())["tokens"] >= 900


def test_what_cannot_start_is_refused_before_any_step(
    job: Job, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.broken = "init"
    with pytest.raises(
        UsageError,
        match=r"train\.wandb: wandb does not start \(ConnectionError.*WANDB_MODE=offline",
    ):
        train.run(job)
    monkeypatch.setattr(scalars, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"'stories' asks for Weights & Biases.*pip install wandb"):
        train.run(job)
    assert not (job.train_dirs["student"] / "train.json").exists()
    scalars.refuse_without_wandb(None)


def test_it_does_not_decide_the_student(job: Job) -> None:
    from stillroom.pipeline.plan.students import train_settings

    plain = job.recipe.model_copy(
        update={"train": job.recipe.train.model_copy(update={"wandb": None})}
    )
    assert train_settings(job.recipe, "s", "student") == train_settings(plain, "s", "student")
