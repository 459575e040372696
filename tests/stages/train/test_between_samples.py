"""Losses between samples in training.

They are their definitions with the teacher live, over groups that no pass splits.
"""

from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import feature_references as definition
import numpy as np
import pytest
import torch
from causal_features import Causal, assert_baseline_is_as_without, losses_of, trained
from live import LiveBetween, assert_trained_alike, live_training
from tiny_classes import World, records
from tiny_models import save_tiny_bert
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, huber_loss, normalize
from transformers import AutoModelForSequenceClassification

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.loader.classification import ClassPasses
from stillroom.stages.loader.features import open_features
from stillroom.stages.loader.passes import Passes
from stillroom.stages.loader.samples import Lengths, Sample, Samples
from stillroom.stages.losses.features.matching import Matching, pairs_of, parts_of
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.classification import Inputs
from stillroom.stages.recipe.features import learnt
from stillroom.stages.recipe.sections import Train
from stillroom.stages.train.features import group_notes
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.snapshots.snapshot import save_snapshot

pytestmark = pytest.mark.numeric

GROUP, T = 3, 0.5
POOLED = [{"what": "pooled", "layers": [1], "pooling": how, "bits": 32} for how in ("mean", "last")]


def asked(match: str, pooling: str, **more: Any) -> dict[str, Any]:
    return {"match": match, "layers": {1: 0}, "pooling": pooling, "group": GROUP} | more


ASKED = {
    "rkd": asked("rkd", "mean", weight=0.5),
    "similarity": asked("similarity", "last"),
    "infonce": asked("infonce", "mean", weight=0.3, temperature=T),
}
# The student's vector: the mean or the last of [T, d].
POOL = {"mean": lambda states: states.mean(0), "last": lambda states: states[-1]}


def distance(t: Tensor, s: Tensor) -> Tensor:
    pairs = list(permutations(range(len(t)), 2))
    if not pairs:
        return 0 * s.sum()
    theirs, mine = (torch.stack([(x[i] - x[j]).norm() for i, j in pairs]) for x in (t, s))
    return huber_loss(mine / mine.mean(), theirs / theirs.mean(), reduction="sum")


def angle(t: Tensor, s: Tensor) -> Tensor:
    total = 0 * s.sum()
    for i, j, k in permutations(range(len(t)), 3):
        theirs, mine = (cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0) for x in (t, s))
        total = total + huber_loss(mine, theirs)
    return total


def similarity(t: Tensor, s: Tensor) -> Tensor:
    theirs, mine = (normalize(x @ x.T) for x in (t, s))
    return (mine - theirs).square().sum() * (len(t) > 1)


def infonce(t: Tensor, s: Tensor) -> Tensor:
    scores = normalize(s) @ normalize(t).T / T
    return cross_entropy(scores, torch.arange(len(t)), reduction="sum") * (len(t) > 1)


LIVE: dict[str, list[Any]] = {
    "rkd": [
        (0.5, distance, lambda g: g * (g - 1)),
        (1.0, angle, lambda g: g * (g - 1) * (g - 2)),
    ],
    "similarity": [(1.0, similarity, lambda g: g * g if g > 1 else 0)],
    "infonce": [(0.3, infonce, lambda g: g if g > 1 else 0)],
}
NAMES = {
    "rkd": {"rkd_1_to_0_distance", "rkd_1_to_0_angle"},
    "similarity": {"similarity_1_to_0"},
    "infonce": {"infonce_1_to_0"},
}
every = pytest.mark.parametrize("match", ASKED)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Causal:
    folder = tmp_path_factory.mktemp("causal")
    return Causal(folder, features=POOLED, asked=[ASKED["rkd"]])


@every
def test_training_from_stored_vectors_is_training_with_the_live_teacher(
    causal: Causal, tmp_path: Path, match: str
) -> None:
    """Step by step, and each part has its name."""
    epochs = {"epochs": 8}
    job = causal.job(tmp_path, loss={"features": [ASKED[match]]}, train=epochs)
    summary = trained(job)
    stored = [point["loss"] for point in summary["history"]]
    assert all(point["features"].keys() == NAMES[match] for point in summary["history"])
    samples = causal.samples(job)
    count = 8 * len(samples)
    texts = [(s.token_ids.tolist(), int(s.spans[0, 0])) for s in samples.read(0, count)]
    maps = dict(matching_of(job, causal, tmp_path).named_parameters())
    between = LiveBetween(
        teacher=2,
        student=1,
        pool=POOL[ASKED[match]["pooling"]],
        group=GROUP,
        parts=LIVE[match],
        leaves=[m.detach().clone().requires_grad_() for m in maps.values()],
    )
    assert len(between.leaves) == (match == "infonce")
    tokens = 8 * samples.lengths().tokens
    truth = live_training(job.recipe, texts, total_tokens=tokens, between=between)
    assert len(stored) >= 60
    assert_trained_alike(stored, tmp_path / "student", truth)


def matching_of(job: Any, world: Any, folder: Path) -> Matching:
    """What the student of a job matches, as it begins."""
    plan, loss = make_plan(job.recipe), job.recipe.loss.features
    source = open_features(
        world.store,
        plan.snapshots["train"],
        plan.features,
        wanted=learnt(loss, job.recipe.score.features),
        files=LocalFiles(folder),
    )
    pairs = pairs_of(loss, job.recipe.score.features, student_blocks=2)
    known = {"layouts": source.layouts(), "student_width": 8, "seed": 0}
    return Matching([part for pair in pairs for part in parts_of(pair, **known)])


@every
def test_passes_of_any_size_and_rows_of_any_kind_train_the_same(
    causal: Causal, tmp_path: Path, match: str
) -> None:
    """A group a pass, several in one, in a single row or in rows with padding."""
    ways = ({}, {"tokens_per_pass": 1}, {"tokens_per_pass": 60}, {"row_tokens": 40})
    found = [
        losses_of(
            causal.job(
                tmp_path / str(number),
                loss={"features": [ASKED[match]]},
                train={"epochs": 1, "tokens_per_step": 160} | way,
            )
        )
        for number, way in enumerate(ways)
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


def test_the_baseline_of_a_student_that_matches_groups(causal: Causal, tmp_path: Path) -> None:
    assert_baseline_is_as_without(causal, tmp_path, [ASKED["rkd"], ASKED["infonce"]])


def test_a_schedule_weighs_both_parts_and_angles_twice(causal: Causal, tmp_path: Path) -> None:
    weight = {"shape": "linear", "start": 1.0, "end": 0.0}
    job = causal.job(
        tmp_path,
        loss={"features": [ASKED["rkd"] | {"weight": weight}]},
        train={"epochs": 1},
    )
    points, total = trained(job)["history"], causal.samples(job).lengths().tokens
    loss = job.recipe.loss
    for point in points:
        parts = point["features"]
        expected = loss.soft_weight * point["soft"] + loss.hard_weight * point["hard"]
        expected += (1 - point["tokens"] / total) * (
            parts["rkd_1_to_0_distance"] + 2 * parts["rkd_1_to_0_angle"]
        )
        assert point["loss"] == pytest.approx(expected, rel=1e-5)


def test_steps_of_one_sample_have_no_terms_and_it_is_said(causal: Causal, tmp_path: Path) -> None:
    job = causal.job(tmp_path, train={"epochs": 1, "tokens_per_step": 1})
    points = trained(job)["history"]
    assert all(set(point["features"].values()) == {0.0} for point in points)
    lengths = Lengths(samples=100, tokens=1000, scored_tokens=500, longest=20)

    def said(group: int | None, **train: Any) -> list[str]:
        return group_notes(group, lengths, Train(epochs=1, **train))

    (note,) = said(32, tokens_per_step=15)
    assert "10 tokens in the mean and train.tokens_per_step is 15: a step that holds one" in note
    (note,) = said(32, tokens_per_step=1000, tokens_per_pass=100)
    assert "a group of 32 samples has about 320 tokens, which is more than" in note
    assert not said(8, tokens_per_step=1000, tokens_per_pass=100)
    (note,) = said(32, tokens_per_step=100, tokens_per_pass=100)
    assert "a step has about 10 samples, fewer than a group of 32" in note
    (note,) = said(500, tokens_per_step=10**6, tokens_per_pass=10**6)
    assert "a step has about 100 samples, fewer than a group of 500" in note
    assert not said(None, tokens_per_step=15)


DEFINED: dict[str, list[tuple[float, Callable[[Tensor, Tensor], Tensor], Any]]] = {
    "rkd": [
        (1.0, definition.rkd_distance, LIVE["rkd"][0][2]),
        (2.0, definition.rkd_angle, LIVE["rkd"][1][2]),
    ],
    "similarity": [(1.0, definition.similarity, LIVE["similarity"][0][2])],
    "infonce": [(1.0, partial(definition.infonce, temperature=T), LIVE["infonce"][0][2])],
}


class Encoders:
    """A teacher whose texts are pooled in float32 and in float16.

    The student has half its width.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.teacher = folder, save_tiny_bert(folder / "teacher", num_hidden_layers=3)
        student = {"hidden_size": 8, "num_hidden_layers": 2}
        self.student = save_tiny_bert(folder / "student", seed=1, **student)
        self.worlds = {bits: self._world(bits) for bits in (32, 16)}

    def _world(self, bits: int) -> World:
        poolings = ("cls", "mean", "last")
        score = {
            "targets": "full",
            "features": [
                {"what": "pooled", "layers": [1], "pooling": p, "bits": bits} for p in poolings
            ],
        }
        folder = self.folder / str(bits)
        folder.mkdir()
        # Held against a student that is read from a folder, as it is.
        student = {"model": str(self.student)}
        world = World(folder, self.teacher, records(40), score=score, student=student)
        return world.scored()

    def passes(self, bits: int, loss: dict[str, Any], tokens: int) -> tuple[Passes, list[Sample]]:
        world = self.worlds[bits]
        world.recipe = world.changed(
            score=world.recipe.score.model_dump(exclude_unset=True),
            student={"model": str(self.student)},
            loss={"features": [loss]},
        )
        plan = world.plan()
        save_snapshot(world.store, plan.features)
        features = world.recipe.score.features
        source = open_features(
            world.store,
            plan.snapshots["train"],
            plan.features,
            wanted=learnt(world.recipe.loss.features, features),
            files=LocalFiles(world.folder / "found"),
        )
        samples = Samples(world.store, plan.snapshots["train"], soft=True, features=source)
        pairs = pairs_of(world.recipe.loss.features, features, student_blocks=2)
        known = {"layouts": source.layouts(), "student_width": 8, "seed": 0}
        matching = Matching([part for pair in pairs for part in parts_of(pair, **known)])
        model = AutoModelForSequenceClassification.from_pretrained(self.student)
        made = ClassPasses(
            tokens_per_pass=tokens,
            vocab_size=32,
            inputs=Inputs.of(model, self.teacher),
            matching=matching,
            group=matching.group,
        )
        return made, list(samples.read(0, 8))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return Encoders(tmp_path_factory.mktemp("encoders"))


def matched(passes: Passes, samples: list[Sample], student: Any) -> tuple[float, Tensor]:
    """What is matched of a step, each part over its terms.

    The gradient of the student's embeddings comes with it.
    """
    assert passes.matching is not None
    counts = np.maximum(passes.counts(samples), 1)
    weights = np.array(passes.matching.weights([1.0])) / counts
    aim = Aim(soft_weight=0.0, hard_weight=0.0, objective=None, features=tuple(weights))
    total, gradient = 0.0, None
    for batch in passes.batches(samples):
        loss = passes.losses(student, batch, aim=aim, dtype=torch.float32).total
        (found,) = torch.autograd.grad(loss, student.bert.embeddings.word_embeddings.weight)
        total, gradient = (
            total + float(loss.detach()),
            found if gradient is None else gradient + found,
        )
    assert gradient is not None
    return total, gradient


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@every
def test_each_is_its_definition_with_the_teacher_live(
    encoders: Encoders, match: str, pooling: str
) -> None:
    """Value and gradient are compared in float64.

    From float32 rows they agree to rounding, from float16 within what the rows state.
    """
    loss = asked(match, pooling, layers={1: 0}) | ({"temperature": T} if match == "infonce" else {})
    passes, samples = encoders.passes(32, loss, tokens=60)
    assert len(list(passes.batches(samples))) > 1
    teacher, student = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for folder in (encoders.teacher, encoders.student)
    )
    value, gradient = matched(passes, samples, student)
    expected, right = defined(passes, samples, teacher.double(), student.double())
    assert value == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-3, atol=1e-5)

    passes, samples = encoders.passes(16, loss, tokens=60)
    rounded, turned = matched(passes, samples, student.float())
    expected, right = defined(passes, samples, teacher, student.double())
    error = max(row["rounding_error"] for row in encoders.worlds[16].rows("features"))
    assert 1e-5 < error < 1e-3
    # Vectors are a few of their differences long, so these are off by so much more.
    assert rounded == pytest.approx(expected, rel=30 * error)
    assert float((turned - right).norm()) <= 30 * error * float(right.norm())


def defined(
    passes: ClassPasses, samples: list[Sample], teacher: Any, student: Any
) -> tuple[float, Tensor]:
    assert passes.matching is not None
    vectors: dict[str, list[Tensor]] = {"t": [], "s": []}
    (part, *_) = passes.matching.parts
    how = part._teacher[0].removeprefix("pooled_")
    pool = POOL | {"cls": lambda states: states[0]}
    for sample in samples:
        inputs = passes.inputs.tensors([sample.token_ids])
        for side, model, layer in (("t", teacher, 2), ("s", student, 1)):
            shown = model(**inputs, output_hidden_states=True).hidden_states[layer][0]
            vectors[side].append(pool[how](shown))
    t, s = (torch.stack(vectors[side]) for side in "ts")
    s = s if part.map is None else s @ part.map.double().T
    total = torch.zeros((), dtype=torch.float64)
    for weight, measure, terms in DEFINED[part.name.split("_")[0]]:
        groups = list(zip(t.detach().split(GROUP), s.split(GROUP), strict=True))
        sums = sum((measure(a, b) for a, b in groups), torch.zeros((), dtype=torch.float64))
        total = total + weight * sums / sum(terms(len(a)) for a, _ in groups)
    (gradient,) = torch.autograd.grad(total, student.bert.embeddings.word_embeddings.weight)
    return float(total.detach()), gradient
