"""Training that matches attention and relations is the same as with the live teacher.

That holds however samples share passes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_features import Causal, assert_baseline_is_as_without, losses_of, trained
from live import LiveAttention, assert_trained_alike, live_training, saved_weights
from tiny_classes import World, records
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert
from transformers import AutoModelForSequenceClassification

from stillroom.stages.loader.classification import ClassPasses
from stillroom.stages.loader.features import open_features
from stillroom.stages.loader.samples import Samples, Step
from stillroom.stages.losses.features.matching import Matching, pairs_of, parts_of
from stillroom.stages.losses.features.part import StepSize
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.classification import Inputs
from stillroom.stages.recipe.features import learnt
from stillroom.stages.train import stage as train
from stillroom.stages.train.together.means import StepResult
from stillroom.stages.train.trainer import Trainer
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.snapshots.snapshot import save_snapshot

pytestmark = pytest.mark.numeric

EXACT = [
    {"what": what, "layers": [1], "bits": 32} for what in ("queries", "keys", "values", "hidden")
]
ATTENTION = {"match": "attention", "layers": {1: 0}, "weight": 0.5}
RELATIONS = {
    "match": "relations",
    "relation_heads": 2,
    "weight": {"shape": "linear", "start": 1, "end": 0.1},
}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Causal:
    """Grouped keys in the teacher; its student is half as wide, with as many heads."""
    return Causal(
        tmp_path_factory.mktemp("causal"),
        features=EXACT,
        asked=[ATTENTION],
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def test_training_from_stored_queries_and_keys_is_training_with_the_live_teacher(
    causal: Causal, tmp_path: Path
) -> None:
    job = causal.job(tmp_path, train={"epochs": 8})
    stored = losses_of(job)
    samples = causal.samples(job)
    texts = [(s.token_ids.tolist(), int(s.spans[0, 0])) for s in samples.read(0, 8 * len(samples))]
    truth = live_training(
        job.recipe,
        texts,
        total_tokens=8 * samples.lengths().tokens,
        matched=LiveAttention(teacher=1, student=0, weight=0.5),
    )
    assert len(stored) >= 60
    assert_trained_alike(stored, tmp_path / "student", truth)


def test_a_student_comes_to_look_where_its_teacher_looks(causal: Causal, tmp_path: Path) -> None:
    """On the same texts, before and after: at `STEADY` other texts would decide it."""
    loss = {"features": [ATTENTION], "soft_weight": 0.0, "hard_weight": 0.0}
    how = {"learning_rate": 1e-2, "evaluate_every_tokens": 300, "validation_prompts": 4}
    points = trained(causal.job(tmp_path, loss=loss, train=how))["validation"]
    first, *_, last = (point["features"]["attention_1_to_0"] for point in points)
    assert 0 < last < first


def test_how_samples_share_passes_changes_nothing(causal: Causal, tmp_path: Path) -> None:
    """How samples share passes changes nothing.

    They are a single row a pass, rows with padding, one sample a row, and blocks computed again.
    """
    ways = (
        {},
        {"tokens_per_pass": 32},
        {"row_tokens": 40},
        {"tokens_per_pass": 1},
        {"gradient_checkpointing": True},
    )
    loss = {"features": [ATTENTION, RELATIONS, ATTENTION | {"heads": "average"}]}
    found = [
        losses_of(causal.job(tmp_path / str(number), train={"epochs": 1} | how, loss=loss))
        for number, how in enumerate(ways)
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


def test_a_killed_student_of_teacher_layers_goes_on_to_the_same_student(
    causal: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks where its teacher looks before the first step, as its blocks are the teacher's."""
    how = {
        "student": {"config": None, "from_teacher_layers": [0, 1]},
        "loss": {"features": [ATTENTION | {"layers": {1: 1}}]},
        "train": {"epochs": 1, "checkpoint_every_steps": 3},
    }
    whole = trained(causal.job(tmp_path / "whole", **how))
    attention = [point["features"]["attention_1_to_1"] for point in whole["history"]]
    assert abs(attention[0]) < 1e-6 < attention[-1]
    step = Trainer.step

    def killed_at_five(self: Trainer, which: Step, **more: Any) -> StepResult:
        if which.after.step == 5:
            raise SystemExit
        return step(self, which, **more)

    job = causal.job(tmp_path / "killed", **how)
    monkeypatch.setattr(Trainer, "step", killed_at_five)
    with pytest.raises(SystemExit):
        train.run(job)
    monkeypatch.setattr(Trainer, "step", step)
    names = [file.name for file in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert names == ["step-00000003"]
    again = trained(job)
    assert again["history"] == whole["history"]
    one, other = (saved_weights(tmp_path / name / "student") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_baseline_of_a_student_that_matches_attention(causal: Causal, tmp_path: Path) -> None:
    assert_baseline_is_as_without(causal, tmp_path, [ATTENTION, RELATIONS])


def test_an_adapter_is_trained_too_and_each_part_is_named(causal: Causal, tmp_path: Path) -> None:
    base = save_tiny_llama(
        tmp_path / "base", seed=3, hidden_size=8, num_attention_heads=4, num_key_value_heads=4
    )
    student = {"model": str(base), "config": None, "lora": {"rank": 2}}
    job = causal.job(
        tmp_path / "run",
        student=student,
        train={"epochs": 1},
        loss={"features": [ATTENTION, RELATIONS, {"match": "hidden"}]},
    )
    names = ["attention_1_to_0", *(f"relations_1_to_1_{k}" for k in ("queries", "keys", "values"))]
    for point in trained(job)["history"]:
        assert [*point["features"]] == [*names, "hidden_1_to_1_mse"]
        assert all(value > 0 for value in point["features"].values())


def test_an_encoder_is_compared_at_every_token_and_never_in_its_padding(tmp_path: Path) -> None:
    """Texts and pairs that share passes, against eager maps of plain transformers text by text."""
    teacher = save_tiny_bert(tmp_path / "teacher", num_hidden_layers=3)
    score = {"targets": "full", "features": EXACT[:2]}
    loss = {"features": [ATTENTION]}
    student = {"config": {"num_hidden_layers": 2, "hidden_size": 8}}
    world = World(tmp_path, teacher, records(30), score=score, loss=loss, student=student).scored()
    plan = world.plan()
    save_snapshot(world.store, plan.features)
    job = world.job(tmp_path, features_id=plan.features.id)
    assert trained(job)["history"][0]["features"]["attention_1_to_0"] > 0
    source = open_features(
        world.store,
        plan.snapshots["train"],
        plan.features,
        wanted=learnt(job.recipe.loss.features, job.recipe.score.features),
        files=LocalFiles(tmp_path / "student"),
    )
    samples = Samples(world.store, plan.snapshots["train"], soft=True, features=source)
    few = list(samples.read(0, 9))
    folder = tmp_path / "student" / "student"
    big, small = (
        AutoModelForSequenceClassification.from_pretrained(f, attn_implementation="eager").eval()
        for f in (teacher, folder)
    )
    shown = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = Inputs.of(shown, teacher)
    (pair,) = pairs_of(job.recipe.loss.features, job.recipe.score.features, student_blocks=2)
    matching = Matching(parts_of(pair, layouts=source.layouts(), student_width=8, seed=0))
    passes = ClassPasses(tokens_per_pass=40, vocab_size=32, inputs=inputs, matching=matching)
    aim = Aim(soft_weight=0.0, hard_weight=0.0, objective=None, features=(1.0,))
    with torch.no_grad():
        total = sum(
            float(passes.losses(shown, batch, aim=aim, dtype=torch.float32).total)
            for batch in passes.batches(few)
        )
        expected = 0.0
        for sample in few:
            tensors = inputs.tensors([sample.token_ids])
            t = big(**tensors, output_attentions=True).attentions[1][0].double()
            s = small(**tensors, output_attentions=True).attentions[0][0].double()
            expected += float((t * (t / s).log()).sum(-1).mean(0).sum())
    assert total == pytest.approx(expected, rel=1e-5)
    tokens = sum(map(len, few))
    assert passes.counts(few) == [tokens]
    assert matching.counts(StepSize(compared=1, tokens=tokens, samples=9)) == [tokens]
