"""Training that matches relations of projected values.

It is as with the live teacher, and is never done without their matrix.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_features import Causal, trained
from live import LiveValues, live_training, saved_weights
from planting import rows_of

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.audit.every_row import check_rows
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job
from stillroom.storage.errors import IntegrityError
from stillroom.storage.integrity.repair import repair
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.matrices import matrix_file
from stillroom.storage.store.store import Store

EXACT = [{"what": "values", "layers": [1], "project": 128, "bits": 32}]
ASKED = {
    "match": "relations",
    "layers": {1: 0},
    "of": ["values"],
    "relation_heads": 1,
    "project": 128,
    "weight": 0.5,
}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Causal:
    """160 numbers of values, small enough that no token is related to itself alone."""
    return Causal(
        tmp_path_factory.mktemp("projected"),
        features=EXACT,
        asked=[ASKED],
        hidden_size=160,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.05,
    )


def matrix_of(store: Store) -> str:
    (found,) = {row["projection"] for row in rows_of(store, "features")}
    return str(found)


@pytest.mark.numeric
def test_training_from_projected_values_is_training_with_the_live_teacher(
    causal: Causal, tmp_path: Path
) -> None:
    job = causal.job(tmp_path, train={"epochs": 8, "learning_rate": 3e-3})
    summary = trained(job)
    stored = [point["loss"] for point in summary["history"]]
    samples = causal.samples(job)
    texts = [(s.token_ids.tolist(), int(s.spans[0, 0])) for s in samples.read(0, 8 * len(samples))]
    matrix = np.load(causal.store.files.path(matrix_file(matrix_of(causal.store))))
    assert matrix.shape == (160, 128)
    truth = live_training(
        job.recipe,
        texts,
        total_tokens=8 * samples.lengths().tokens,
        matched=LiveValues(teacher=1, student=0, weight=0.5, matrix=torch.from_numpy(matrix)),
    )
    assert len(stored) == len(truth.losses) >= 60
    assert max(abs(a - b) for a, b in zip(stored, truth.losses, strict=True)) <= 1e-5
    weights = saved_weights(tmp_path / "student")
    assert max(float((weights[n] - truth.weights[n]).abs().max()) for n in weights) <= 1e-4
    part = [point["features"]["relations_1_to_0_values_128"] for point in summary["history"]]
    assert 0 < sum(part[-10:]) < sum(part[:10])


def copy_of(causal: Causal, folder: Path) -> tuple[Store, dict[str, Any]]:
    """A store of its own to damage, and where a job finds it."""
    shutil.copytree(causal.store.files.root, folder / "store")
    store = Store.open(folder / "store")
    return store, {"storage": {"dir": str(folder / "store")}}


@pytest.mark.parametrize("how", ["lost", "altered"])
def test_without_its_matrix_nothing_is_learnt(causal: Causal, tmp_path: Path, how: str) -> None:
    store, where = copy_of(causal, tmp_path)
    job = causal.job(tmp_path / "run", train={"epochs": 1}, **where)
    check_rows(store, [_features(job)], job)
    name = matrix_file(matrix_of(store))
    path = store.files.path(name)
    assert name not in vacuum(store, older_than_hours=0).files
    if how == "lost":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = verify(store).problems
    assert {problem.file for problem in found} >= {name}
    assert any(problem.column == "projection" for problem in found)
    with pytest.raises(
        IntegrityError, match=f"the matrix is {dict(lost='missing').get(how, 'damaged')}"
    ):
        train.run(job)
    assert not (tmp_path / "run" / "train.json").exists()
    # Rows go with their matrix, and are to be made again with another.
    assert repair(store).ok
    assert not store.commits("features")
    line = make_plan(causal.recipe(**where)).line("score")
    assert (line.state, "without features" in line.why) == ("to do", True)


def _features(job: Job) -> Any:
    snapshot = make_plan(job.recipe).features
    assert snapshot is not None
    return snapshot
