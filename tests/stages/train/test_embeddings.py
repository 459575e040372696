"""Training that matches the teacher's embeddings.

It is tested for the definition, a live teacher, both tasks, and what is refused.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_features import Causal, losses_of
from feature_references import embedding_mse as definition
from live import assert_trained_alike, live_training
from tiny_classes import World, records
from tiny_models import save_tiny_bert
from torch import Tensor

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.losses.features.embeddings import EmbeddingsPart
from stillroom.stages.losses.features.part import StepSize
from stillroom.stages.targets.features.batch import FeatureTargets
from stillroom.stages.targets.features.shown import Shown
from stillroom.stages.train import stage as train
from stillroom.storage.errors import UsageError
from stillroom.storage.files.local import LocalFiles

KEPT = [{"what": "embeddings", "bits": 32}]
ASKED = [{"match": "embeddings", "weight": 0.5}]


@pytest.mark.numeric
@pytest.mark.parametrize("width", [3, 4])
def test_a_pass_is_summed_over_all_its_tokens(width: int) -> None:
    """A pass of two samples in float16 is compared with its definition in float64.

    Value and gradient agree, with a map and without.
    """
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(9, 4)).astype(np.float16)
    student = torch.from_numpy(rng.normal(size=(11, width))).float().requires_grad_()
    part = EmbeddingsPart(teacher, width, asked=0, seed=1)
    ids = [np.array([3, 0, 3], np.int32), np.array([8, 3], np.int32)]
    targets = FeatureTargets.of(
        [{}, {}],
        lengths=[3, 2],
        starts=[0, 3],
        compared=[np.arange(3), np.arange(2)],
        token_ids=ids,
    )
    found = part(Shown({}, {}, {}, student), targets)
    found.backward()
    exact = student.detach().double().requires_grad_()
    weight = None if part.map is None else part.map.detach().double().requires_grad_()
    identity = torch.eye(4, dtype=torch.float64)
    expected = definition(
        torch.from_numpy(teacher).double(),
        exact,
        np.concatenate(ids).tolist(),
        identity if weight is None else weight,
    ).sum()
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    pairs: list[tuple[Any, Any]] = [(student, exact)]
    pairs += [] if weight is None else [(part.map, weight)]
    for mine, right in pairs:
        torch.testing.assert_close(mine.grad.double(), right.grad, rtol=1e-5, atol=1e-6)
    assert (part.map is None) == (width == 4)
    assert part.count(StepSize(compared=2, tokens=5, samples=2)) == 5
    assert [*part.state_dict()] == ([] if part.map is None else ["map"]), "not in checkpoints"


class LiveEmbeddings:
    """The embeddings of a text's tokens.

    Transformers shows them as `hidden_states[0]` of a Llama.
    """

    every_token = True

    def __init__(self, weight: float, map: Tensor) -> None:
        self.weight, self.map = weight, map
        self.leaves, self.shown = [map], {"output_hidden_states": True}

    def loss(self, theirs: Any, mine: Any, start: int) -> Tensor:
        t, s = theirs.hidden_states[0][0], mine.hidden_states[0][0] @ self.map.T
        return self.weight * (s - t).square().mean(-1).sum()


@pytest.mark.numeric
def test_training_is_training_with_the_live_teacher(tmp_path: Path) -> None:
    causal = Causal(tmp_path, features=KEPT, asked=ASKED)
    job = causal.job(tmp_path / "student", train={"epochs": 3})
    assert job.features_id == "", "there are no rows"
    samples = causal.samples(job)
    texts = [(s.token_ids.tolist(), int(s.spans[0, 0])) for s in samples.read(0, 3 * len(samples))]
    begun = EmbeddingsPart(np.zeros((2, 16), np.float32), 8, asked=0, seed=0).map
    matched = LiveEmbeddings(0.5, begun.detach().requires_grad_())
    total = 3 * samples.lengths().tokens
    truth = live_training(job.recipe, texts, total_tokens=total, matched=matched)
    stored = losses_of(job)
    assert len(stored) >= 20
    assert_trained_alike(stored, tmp_path / "student" / "student", truth)
    plan = make_plan(job.recipe)
    assert plan.settings["student"]["embeddings"] == plan.embeddings != ""
    lora = causal.recipe(
        student={"model": str(causal.teacher), "config": None, "lora": {"rank": 2}}
    )
    with pytest.raises(UsageError, match=r"which student\.lora freezes"):
        make_plan(lora)


@pytest.mark.numeric
def test_a_classifier_learns_them_too(tmp_path: Path) -> None:
    score = {"targets": "full", "features": [{"what": "embeddings"}]}
    world = World(
        tmp_path,
        save_tiny_bert(tmp_path / "teacher"),
        records(24),
        score=score,
        loss={"features": ASKED, "soft_weight": 0.0, "hard_weight": 0.0},
        train={"epochs": 6, "tokens_per_step": 80, "learning_rate": 1e-2},
        student={"config": {"num_hidden_layers": 1}},
    ).scored()
    job = world.job(tmp_path)
    train.run(job)
    files = LocalFiles(job.train_dirs["student"])
    history = json.loads(files.read("train.json"))["history"]
    assert history[-1]["features"]["embeddings_mse"] < history[0]["features"]["embeddings_mse"]
