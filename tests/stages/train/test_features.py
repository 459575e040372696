"""Training that matches hidden states.

It is the same as with the live teacher, goes on exactly, and leaves no map behind.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_features import ASKED, EXACT, Causal, losses_of, trained
from live import (
    LiveHidden,
    assert_trained_alike,
    fresh_student,
    live_training,
    saved_weights,
)
from planting import copied, rows_of, unchecked_writer
from tiny_classes import World, records
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert
from tiny_store import SilentProgress, StopAfter
from transformers import AutoModelForSequenceClassification

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.loader.classification import ClassPasses
from stillroom.stages.loader.features import open_features
from stillroom.stages.loader.samples import Samples
from stillroom.stages.losses.features.matching import Matching, pairs_of, parts_of
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.classification import Inputs
from stillroom.stages.recipe.features import captured
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.errors import IntegrityError, Stopped, UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.verify import verify
from stillroom.storage.snapshots import companions
from stillroom.storage.snapshots.snapshot import make_snapshot, save_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.features import Layout, Rounded

Row = dict[str, Any]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Causal:
    return Causal(tmp_path_factory.mktemp("causal"))


@pytest.mark.numeric
def test_training_from_stored_states_is_training_with_the_live_teacher(
    causal: Causal, tmp_path: Path
) -> None:
    job = causal.job(tmp_path)
    summary = trained(job)
    stored = [point["loss"] for point in summary["history"]]
    samples = causal.samples(job)
    texts = [(s.token_ids.tolist(), int(s.spans[0, 0])) for s in samples.read(0, 4 * len(samples))]
    (pair,) = pairs_of(job.recipe.loss.features, job.recipe.score.features, student_blocks=2)
    layouts = {("hidden", 1): Layout(width=16)}
    (begun,) = parts_of(pair, layouts=layouts, student_width=8, seed=0)[0].parameters()
    hidden = LiveHidden(teacher=2, student=1, weight=0.01, map=begun.detach().requires_grad_())
    truth = live_training(
        job.recipe, texts, total_tokens=4 * samples.lengths().tokens, matched=hidden
    )
    assert len(stored) >= 30
    assert_trained_alike(stored, tmp_path / "student", truth)
    assert summary["parameters"] == sum(w.numel() for w in fresh_student(job.recipe).parameters())


@pytest.mark.numeric
def test_how_samples_share_passes_changes_nothing(causal: Causal, tmp_path: Path) -> None:
    """A single row a pass, rows with padding, and one sample a row."""
    found = [
        losses_of(causal.job(tmp_path / str(number), train={"epochs": 1} | how))
        for number, how in enumerate(
            ({}, {"tokens_per_pass": 32}, {"row_tokens": 40}, {"tokens_per_pass": 1})
        )
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


def test_a_training_that_was_stopped_goes_on_with_its_maps(causal: Causal, tmp_path: Path) -> None:
    """Validated along the way, on samples that have features too."""
    how = {
        "epochs": 2,
        "evaluate_every_tokens": 300,
        "validation_prompts": 4,
        "learning_rate": 1e-2,
    }
    whole = trained(causal.job(tmp_path / "whole", train=how))
    stopped = causal.job(tmp_path / "stopped", train=how)
    with pytest.raises(Stopped):
        train.run(Job(**{f: getattr(stopped, f) for f in Job.__slots__} | {"stop": StopAfter(9)}))

    def indices() -> dict[Path, int]:
        found = (tmp_path / "stopped" / "features").glob("*/*/*.npy")
        return {path: path.stat().st_mtime_ns for path in found}

    made = indices()
    assert len(made) == 2
    again = trained(stopped)
    assert indices() == made, "what was found is not looked for again"
    assert again["history"] == whole["history"]
    assert again["validation"] == whole["validation"]
    assert len(whole["validation"]) > 2
    first, *_, last = (point["features"]["hidden_1_to_0_mse"] for point in whole["validation"])
    assert 0 < last < first, "the states come nearer"
    one, other = (saved_weights(tmp_path / name / "student") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_baseline_reads_no_features_and_has_the_same_start_and_order(
    causal: Causal, tmp_path: Path
) -> None:
    """The baseline is as without features, and the student's own start is the same with them."""
    evaluate = {"baseline": True}
    with_features = causal.job(tmp_path / "a", train={"epochs": 1}, evaluate=evaluate)
    without = causal.job(
        tmp_path / "b", train={"epochs": 1}, evaluate=evaluate, loss={"features": []}
    )
    assert with_features.snapshots == without.snapshots
    arms = [
        trained(Job(**{f: getattr(job, f) for f in Job.__slots__} | {"arm": "baseline"}))
        for job in (with_features, without)
    ]
    assert arms[0]["history"] == arms[1]["history"]
    assert "features" not in arms[0]["history"][0]
    assert not (tmp_path / "a" / "features").exists()
    plans = [make_plan(job.recipe) for job in (with_features, without)]
    assert plans[0].settings["baseline"] == plans[1].settings["baseline"]
    assert plans[0].settings["student"] != plans[1].settings["student"]
    assert "features" not in plans[1].settings["student"] | plans[1].settings["student"]["loss"]
    soft = [
        trained(causal.job(tmp_path / name, train={"epochs": 1}, loss={"features": features}))
        for name, features in (("c", []), ("d", [ASKED[0] | {"weight": 1e-9}]))
    ]
    for name in ("soft", "hard"):
        assert soft[0]["history"][0][name] == soft[1]["history"][0][name]


@pytest.mark.numeric
def test_int8_is_within_the_error_that_the_shard_states(causal: Causal, tmp_path: Path) -> None:
    exact, rounded = EXACT, [{"what": "hidden", "layers": [0, 1]}]
    found = {}
    for name, features in (("exact", exact), ("rounded", rounded)):
        job = causal.job(tmp_path, score={"targets": "full", "features": features})
        plan = make_plan(job.recipe)
        wanted = captured(job.recipe.score.features)
        source = open_features(
            causal.store,
            plan.snapshots["train"],
            plan.features,
            wanted=wanted[1:],
            files=LocalFiles(tmp_path / name),
        )
        found[name] = causal.samples(job, features=source)
    # 32 bits serve a request for 8: what is stored is read, whatever was asked for.
    for one, other in zip(*(samples.read(0, 10) for samples in found.values()), strict=True):
        np.testing.assert_array_equal(one.states()["hidden", 1], other.states()["hidden", 1])


def test_memory_is_bounded_whatever_is_read(
    causal: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups of one row, of which a few stay."""
    monkeypatch.setattr(companions, "HELD_BYTES", 20_000)
    monkeypatch.setattr(companions, "HELD_FILES", 2)
    job = causal.job(tmp_path)
    plan, wanted = make_plan(job.recipe), captured(job.recipe.score.features)
    files = LocalFiles(tmp_path)
    source = open_features(
        causal.store, plan.snapshots["train"], plan.features, wanted=wanted[1:], files=files
    )
    samples = causal.samples(job, features=source)
    for sample in samples.read(0, len(samples)):
        assert sample.states()["hidden", 1].shape == (len(sample), 16)
        held = source._companions
        assert len(held._files) <= 2
        assert len(held._held) == 1 or sum(n for _, n in held._held.values()) <= 20_000


def test_states_of_another_text_are_refused(causal: Causal, tmp_path: Path) -> None:
    job = causal.job(tmp_path)
    plan, wanted = make_plan(job.recipe), captured(job.recipe.score.features)
    names = [("hidden", 1)]
    places = companions.companion_places(
        causal.store, plan.snapshots["train"], plan.features, names
    )
    from stillroom.stages.loader.features import FeatureSource

    swapped = companions.Companions(causal.store, plan.features, np.roll(places, 1, axis=0))
    source = FeatureSource(swapped, wanted[1:])
    (sample,) = causal.samples(job, features=source).read(0, 1)
    with pytest.raises(IntegrityError, match="of another text"):
        sample.states()


def as_int8(row: Row, **changes: Any) -> Row:
    states = Rounded.from_row(row).restored()
    rounded = Rounded.of(states, "int8")
    found = {"dtype": "int8", "values": rounded.values.tobytes(), "scale": rounded.scale}
    return row | found | {"rounding_error": rounded.error(states)} | changes


def cut(row: Row, vectors: int, width: int) -> Row:
    states = Rounded.from_row(row).values[:vectors, :width]
    return row | {"vectors": vectors, "width": width, "values": states.tobytes()}


# Of layer 1, which is matched; of layer 0, which is in the same shards.
FORGED: dict[str, tuple[int, Callable[[Row], Row], str]] = {
    "a scale of nothing": (
        1,
        lambda row: as_int8(row, scale=np.full(row["vectors"], np.nan, np.float32)),
        "scale: a scale is below 0, or makes states that are not finite",
    ),
    "a state of nothing": (
        0,
        lambda row: (
            row | {"values": np.full(row["vectors"] * row["width"], np.nan, "<f4").tobytes()}
        ),
        "values: a number is not finite",
    ),
    "a layer below 0": (0, lambda row: row | {"layer": -1}, "layer -1; layers count from 0"),
    "a layer twice": (0, lambda row: row | {"layer": 1}, "has hidden of layer 1 of the same text"),
    "bytes too few": (0, lambda row: row | {"values": row["values"][4:]}, "bytes, expected"),
    "an error beyond rounding": (
        0,
        lambda row: row | {"rounding_error": 0.5},
        "rounding_error: says 0.5, rounding to float32 misses 1e-06 at most",
    ),
    "a token less": (
        1,
        lambda row: cut(row, row["vectors"] - 1, row["width"]),
        r"expected one for each of its \d+ tokens",
    ),
    "a narrower state": (1, lambda row: cut(row, row["vectors"], 8), "of (8|16) numbers"),
    "positions of its own": (
        1,
        lambda row: row | {"positions": np.arange(row["vectors"]) + 1},
        "at some positions, expected one for each",
    ),
}


@pytest.mark.parametrize("fault", FORGED)
def test_a_shard_that_was_sealed_with_a_fault_is_refused_before_training(
    causal: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    unchecked_writer(monkeypatch)
    layer, change, said = FORGED[fault]
    rows = [row for row in rows_of(causal.store, "features") if row["layer"] == layer]
    bad = rows[6]["key"]  # its text's two layers are in one shard

    def forged(row: Row) -> Row:
        return change(row) if row["key"] == bad else row

    store = copied(causal.store, tmp_path / "store", forged, table="features")
    (shard,) = [
        commit.shard.name
        for commit in store.commits("features")
        if bad in store.shard("features", commit.shard.sha256).read_all(["key"])["key"].to_pylist()
    ]
    job = causal.job(
        tmp_path / "run",
        storage={"dir": str(store.root), "commit_rows": 5},
        score={"targets": "full", "features": [{"what": "hidden", "layers": [1]}]},
    )
    with pytest.raises(IntegrityError, match=f"{shard}: .*row .*{said}") as refused:
        train.run(job)
    assert refused.value.exit_code == 3
    assert not (tmp_path / "run" / "checkpoints").exists()
    within = fault in ("a token less", "a narrower state", "positions of its own")
    assert {problem.file for problem in verify(store).problems} == (set() if within else {shard})
    baseline = Job(**{f: getattr(job, f) for f in Job.__slots__} | {"arm": "baseline"})
    assert trained(baseline)["history"], "who reads no features trains"


def test_a_feature_that_two_rows_of_the_snapshot_have_is_refused(
    causal: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are in shards of their own, each of which is sound."""
    (row, *_) = rows_of(causal.store, "features")
    other = row | {"key": b"other" + row["key"][5:]}
    store = copied(causal.store, tmp_path / "store", lambda row: row)
    about = {"teacher_id": row["teacher_id"]}
    with store.writer("features", about=about) as writer:
        writer.add(other)
    places = {c.shard.sha256: range(c.shard.rows) for c in store.commits("features")}
    both = make_snapshot(store, "features", places, {})
    samples = make_plan(causal.recipe()).snapshots["train"]
    said = f"{store.commits('features')[-1].shard.name}: row 0 .* it is there already, as data/"
    with pytest.raises(IntegrityError, match=said):
        companions.companion_places(store, samples, both, [(row["kind"], row["layer"])])


def test_a_student_that_begins_with_the_teacher_s_layers_has_their_states(
    causal: Causal, tmp_path: Path
) -> None:
    """The student's first blocks are the teacher's.

    So nothing is missing before the first step, and they need no map.
    """
    student = {"config": None, "from_teacher_layers": [0, 1]}
    loss = {"features": [{"match": "hidden", "layers": {0: 0, 1: 1}}]}
    job = causal.job(tmp_path / "run", student=student, loss=loss, train={"epochs": 1})
    first, *_, last = trained(job)["history"]
    assert list(first["features"]) == ["hidden_0_to_0_mse", "hidden_1_to_1_mse"]
    assert max(first["features"].values()) < 1e-10 < min(last["features"].values())
    with pytest.raises(UsageError, match="block 2 of the student, which has 2, 0 to 1"):
        causal.job(tmp_path, student=student, loss={"features": [ASKED[0] | {"layers": {1: 2}}]})


def test_a_pinned_snapshot_without_features_is_refused(causal: Causal, tmp_path: Path) -> None:
    """Its rows are others than those of which the features were chosen."""
    job = causal.job(tmp_path)
    plan = make_plan(job.recipe)
    with pytest.raises(UsageError, match=r"of its \d+ samples have no hidden of layer 1"):
        companions.companion_places(
            causal.store, plan.snapshots["test"], plan.features, [("hidden", 1)]
        )


@pytest.mark.numeric
def test_an_encoder_is_compared_at_every_token(tmp_path: Path) -> None:
    """Texts and pairs that share passes, against plain transformers text by text."""
    teacher = save_tiny_bert(tmp_path / "teacher", num_hidden_layers=3)
    score = {"targets": "full", "features": [{"what": "hidden", "layers": [0, 1], "bits": 32}]}
    loss = {"features": [{"match": "hidden", "layers": {1: 0}, "weight": 0.5}]}
    student = {"config": {"num_hidden_layers": 2, "hidden_size": 8}}
    world = World(tmp_path, teacher, records(40), score=score, loss=loss, student=student).scored()
    plan = world.plan()
    save_snapshot(world.store, plan.features)
    job = world.job(tmp_path, features_id=plan.features.id)
    summary = trained(job)
    assert "hidden_1_to_0_mse" in summary["history"][0]["features"]

    wanted = captured(job.recipe.score.features)[1:]
    source = open_features(
        world.store,
        plan.snapshots["train"],
        plan.features,
        wanted=wanted,
        files=LocalFiles(tmp_path / "student"),
    )
    samples = Samples(world.store, plan.snapshots["train"], soft=True, features=source)
    few = list(samples.read(0, 9))
    big = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student" / "student")
    inputs = Inputs.of(small, teacher)
    (pair,) = pairs_of(job.recipe.loss.features, job.recipe.score.features, student_blocks=2)
    matching = Matching(parts_of(pair, layouts=source.layouts(), student_width=8, seed=0))
    passes = ClassPasses(tokens_per_pass=40, vocab_size=32, inputs=inputs, matching=matching)
    aim = Aim(soft_weight=0.0, hard_weight=0.0, objective=None, features=(1.0,))
    small.eval()
    with torch.no_grad():
        total = sum(
            float(passes.losses(small, batch, aim=aim, dtype=torch.float32).total)
            for batch in passes.batches(few)
        )
        expected = 0.0
        for sample in few:
            tensors = inputs.tensors([sample.token_ids])
            t = big(**tensors, output_hidden_states=True).hidden_states[2][0]
            s = small(**tensors, output_hidden_states=True).hidden_states[1][0]
            expected += float((s @ matching.parts[0].map.T - t).square().mean(-1).sum())
    assert passes.counts(few) == [sum(map(len, few))]
    assert total == pytest.approx(expected, rel=1e-5)


def test_an_adapter_is_trained_beside_the_maps(causal: Causal, tmp_path: Path) -> None:
    """The student has blocks of another width, and its own weights stay."""
    base = save_tiny_llama(tmp_path / "base", seed=3, hidden_size=8)
    student = {"model": str(base), "config": None, "lora": {"rank": 2}}
    summary = trained(causal.job(tmp_path / "run", student=student, train={"epochs": 1}))
    assert all(point["features"]["hidden_1_to_0_mse"] > 0 for point in summary["history"])
    before, after = (saved_weights(folder) for folder in (base, tmp_path / "run" / "student"))
    assert before.keys() == after.keys(), "the adapter is merged, and no map is left"
    assert not torch.equal(*(w["model.layers.0.mlp.up_proj.weight"] for w in (before, after)))
    assert summary["trained_parameters"] < summary["parameters"]


@pytest.mark.numeric
def test_blocks_that_are_computed_again_train_the_same(causal: Causal, tmp_path: Path) -> None:
    found = [
        losses_of(
            causal.job(tmp_path / str(again), train={"epochs": 1, "gradient_checkpointing": again})
        )
        for again in (False, True)
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


def test_features_of_a_read_only_source_serve(causal: Causal, tmp_path: Path) -> None:
    """A store of its own that is empty, beside the one that has all."""
    storage = {"dir": str(tmp_path / "own"), "sources": [str(causal.folder / "store")]}
    recipe = causal.recipe(storage=storage, train={"epochs": 1})
    own = Store.open(tmp_path / "own", create=True)
    plan = make_plan(recipe, write=True)
    assert plan.line("score").state == "done"
    assert plan.line("score").sources
    assert plan.features is not None
    for snapshot in (*plan.snapshots.values(), plan.features):
        save_snapshot(own, snapshot)
    job = Job(
        recipe=recipe,
        progress=SilentProgress(),
        stop=StopFlag(),
        teacher_id=plan.bound.binding.teacher_id,
        train_dirs={"student": tmp_path / "run"},
        snapshots={split: s.id for split, s in plan.snapshots.items()},
        features_id=plan.features.id,
    )
    assert losses_of(job) == losses_of(causal.job(tmp_path / "same", train={"epochs": 1}))
    assert not own.commits("features")
