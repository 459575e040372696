"""The stage from snapshot to student: exact resume, validation, baseline, black-box, refusals."""

import builtins
import json
import random
from copy import copy
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_llama import save_tiny_llama
from tiny_store import StopAfter, make_job, make_recipe, make_store, random_texts, snapshot_of
from transformers import AutoTokenizer, DbrxConfig, JetMoeConfig, LlamaConfig, MixtralConfig

from stillroom.stages.loader.samples import Cursor, Samples, steps
from stillroom.stages.models.causal_lm import KIND
from stillroom.stages.models.students.student import initial_student
from stillroom.stages.train import stage as train
from stillroom.stages.train.record import Record
from stillroom.stages.train.run import HISTORY_POINTS, left_out
from stillroom.storage.errors import StillroomError, Stopped, UsageError

TEXTS = random_texts(60)
LONGEST = max(map(len, TEXTS[12:]))


@pytest.fixture
def world(shared_world, tmp_path):
    """The store is shared and never written; the runs are the test's own."""
    mine = copy(shared_world)
    mine.folder = tmp_path
    return mine


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return World(save_tiny_llama(folder / "teacher", initializer_range=0.6), folder)


class World:
    """A teacher, a store of its targets, and a way to train from them."""

    def __init__(self, teacher, folder, **more):
        self.teacher, self.folder = teacher, folder
        self.store = make_store(folder / "store", teacher, **{"texts": TEXTS} | more)
        self.train = snapshot_of(self.store, rows=slice(12, None)).id
        self.validation = snapshot_of(self.store, rows=slice(0, 12)).id

    def recipe(self, **sections):
        return make_recipe(self.store, self.teacher, **sections)

    def job(self, name, recipe=None, *, validate=False, **more):
        splits = {"train": self.train} | ({"validation": self.validation} if validate else {})
        return make_job(recipe or self.recipe(), self.folder / name, **splits | more)


def summary(folder):
    return json.loads((folder / "train.json").read_text())


def weights(folder):
    return dict(KIND.student(folder / "student").named_parameters())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_time(report):
    timed = ("seconds", "tokens_per_second", "mfu", "waited_share", "peak", "speed")
    return {k: v for k, v in report.items() if k not in timed}


@pytest.mark.numeric
def test_a_run_trains_and_reports(world):
    recipe = world.recipe(train={"tokens": 4000})
    job = world.job("run", recipe)
    result = train.run(job)
    report = summary(world.folder / "run")
    assert report["arm"] == "student"
    assert 4000 <= report["tokens"] < 4100
    assert report["scored_tokens"] == report["tokens"] - 2 * report["samples"]
    assert report["epochs"] == pytest.approx(report["samples"] / 48, abs=1e-4)
    assert (result.rows, result.tokens) == (report["samples"], report["tokens"])
    assert result.details["steps"] == report["steps"]
    assert report["snapshot"] == world.train
    assert report["best"] is None
    assert report["parameters"] == report["trained_parameters"]
    first, last = report["history"][0], report["history"][-1]
    assert set(first) == {"tokens", "loss", "soft", "hard", "learning_rate", "grad_norm"}
    assert last["loss"] < 0.6 * first["loss"]
    assert last["loss"] == pytest.approx(last["soft"] + 0.1 * last["hard"])
    assert last["learning_rate"] == pytest.approx(0.1 * 1e-2)
    assert (job.progress.total, job.progress.tokens) == (4000, report["tokens"])
    assert job.progress.notes[-1].startswith(f"loss {last['loss']:.4f}, ")
    assert job.progress.notes[-1].endswith(
        "% of a matrix product's rate"
    )  # no vendor states one for a CPU
    assert not any("padding" in line for line in job.progress.said)
    assert not report["peak"]["vendor"]
    assert report["padding_share"] == 0
    assert 0 < report["mfu"] < 1
    assert 0 <= report["waited_share"] < 1
    assert report["tokens_per_second"] == pytest.approx(
        report["tokens"] / report["seconds"], rel=0.01
    )
    assert [point["tokens"] for point in report["speed"]] == [
        point["tokens"] for point in report["history"]
    ]
    clock = job.clock.seconds()
    assert clock["model"] > clock["tokenizer"] == 0  # stored rows are tokens already
    assert min(clock["start"], clock["disk"]) > 0
    assert AutoTokenizer.from_pretrained(world.folder / "run" / "student")("the cat")[
        "input_ids"
    ] == [1, 4, 6]
    before = dict(initial_student(recipe, world.teacher).named_parameters())
    assert not same(weights(world.folder / "run"), before)


def test_a_finished_run_is_left_alone(world):
    train.run(world.job("run"))
    before = summary(world.folder / "run")
    again = train.run(world.job("run"))
    assert (again.rows, again.tokens) == (0, 0)
    assert again.details["tokens"] == before["tokens"]
    assert summary(world.folder / "run") == before


def test_history_is_thinned(world):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.run(world.job("run", world.recipe(train={"tokens": 6000, "tokens_per_step": 20})))
    report = summary(world.folder / "run")
    assert report["steps"] > 250
    assert 150 < len(report["history"]) == len(report["speed"]) <= HISTORY_POINTS
    # No step's norm is above all that the points say, theirs and the largest until the next.
    board = EventAccumulator(str(world.folder / "run" / "tensorboard")).Reload()
    norms = [event.value for event in board.Scalars("grad_norm")]
    said = [max(p["grad_norm"], p.get("grad_norm_most", 0.0)) for p in report["history"]]
    assert len(norms) == report["steps"]
    assert max(said) == pytest.approx(max(norms))
    assert sum("grad_norm_most" in point for point in report["history"]) > 10
    # What lies between two points, and before the first: together the whole run.
    tokens = [0] + [point["tokens"] for point in report["speed"]]
    spent = sum(
        (b - a) / p["tokens_per_second"]
        for (a, b), p in zip(pairwise(tokens), report["speed"], strict=True)
    )
    assert spent == pytest.approx(report["seconds"] * tokens[-1] / report["tokens"], rel=0.05)


def test_history_and_board_show_what_is_scheduled(world):
    loss = {"soft_weight": {"shape": "linear", "start": 1.0, "end": 0.0}, "hard_weight": 0.5}
    train.run(world.job("run", world.recipe(loss=loss)))
    report = summary(world.folder / "run")
    for point in report["history"]:
        assert "hard_weight" not in point
        assert point["soft_weight"] == pytest.approx(max(0.0, 1 - point["tokens"] / 1200))
        assert point["loss"] == pytest.approx(
            point["soft_weight"] * point["soft"] + 0.5 * point["hard"]
        )
    board = EventAccumulator(str(world.folder / "run" / "tensorboard")).Reload()
    assert len(board.Scalars("soft_weight")) == report["steps"]
    assert "hard_weight" not in board.Tags()["scalars"]


def test_epochs_feed_every_sample_so_often(world):
    recipe = world.recipe(train={"tokens": None, "epochs": 1.5})
    job = world.job("run", recipe)
    train.run(job)
    report = summary(world.folder / "run")
    assert (report["samples"], report["epochs"]) == (72, 1.5)
    texts = sum(len(t) for t in TEXTS[12:])
    assert texts < report["tokens"] < 2 * texts


@pytest.mark.parametrize("validate", [False, True])
def test_stopping_anywhere_and_going_on_changes_nothing(world, validate):
    """Whatever look at the stop flag raises, the end is bit-equal.

    The look is between passes or steps, or in a validation.
    """
    recipe = world.recipe(
        loss={
            "soft_weight": {"shape": "wsd", "start": 0.2, "peak": 0.9, "end": 0.5},
            "hard_weight": {"shape": "cosine", "start": 1.0, "end": 0.1},
            "temperature": {"shape": "linear", "start": 2.0, "end": 1.0},
            "unstored_temperature": "approximate",
        },
        train={"evaluate_every_tokens": 300 if validate else None, "tokens_per_step": 50},
    )
    counting = StopAfter(10**9)
    train.run(world.job("whole", recipe, validate=validate, stop=counting))
    looks = 10**9 - counting.looks
    expected = summary(world.folder / "whole")
    stops = 0
    while not (world.folder / "stopped" / "train.json").exists():
        stop = StopAfter(random.randint(1, looks // 2))
        try:
            train.run(world.job("stopped", recipe, validate=validate, stop=stop))
        except Stopped:
            stops += 1
    assert stops
    assert without_time(summary(world.folder / "stopped")) == without_time(expected)
    assert same(weights(world.folder / "stopped"), weights(world.folder / "whole"))


@pytest.mark.numeric
def test_a_killed_run_goes_on_from_its_last_checkpoint(world, monkeypatch):
    from stillroom.stages.train.trainer import Trainer

    recipe = world.recipe(train={"checkpoint_every_steps": 3})
    train.run(world.job("whole", recipe))
    step = Trainer.step

    def killed_at_eight(self, which, **more):
        if which.after.step == 8:
            raise SystemExit
        return step(self, which, **more)

    monkeypatch.setattr(Trainer, "step", killed_at_eight)
    with pytest.raises(SystemExit):
        train.run(world.job("killed", recipe))
    assert [f.name for f in (world.folder / "killed" / "checkpoints").iterdir()] == [
        "step-00000006"
    ]
    monkeypatch.setattr(Trainer, "step", step)
    job = world.job("killed", recipe)
    train.run(job)
    assert "going on after step 6" in job.progress.said
    assert 0 < job.progress.tokens < summary(world.folder / "whole")["tokens"]
    assert without_time(summary(world.folder / "killed")) == without_time(
        summary(world.folder / "whole")
    )
    assert same(weights(world.folder / "killed"), weights(world.folder / "whole"))


def test_imports_of_torch_are_start_up(world, monkeypatch):
    job, charged, real = world.job("run"), {}, builtins.__import__

    def watched(name, *how, **more):
        if name in ("checkpoints", "trainer"):  # the first that need torch
            charged.setdefault(name, job.clock._name)
        return real(name, *how, **more)

    monkeypatch.setattr(builtins, "__import__", watched)
    train.run(job)
    assert charged == {"checkpoints": "start", "trainer": "start"}


def test_checkpoints_come_by_the_clock_too(world):
    recipe = world.recipe(train={"checkpoint_every_seconds": 1e-6, "tokens": 300})
    train.run(world.job("run", recipe))
    names = [f.name for f in (world.folder / "run" / "checkpoints").iterdir()]
    assert names == [f"step-{summary(world.folder / 'run')['steps']:08d}"]


@pytest.mark.numeric
def test_validation_keeps_the_best_student(world):
    """Far too high a rate at the end: the last student is worse than one before it."""
    sections = {
        "learning_rate": 6.0,
        "schedule": "constant",
        "warmup_fraction": 0.99,
        "evaluate_every_tokens": 200,
    }
    recipe = world.recipe(train=sections | {"tokens": 3000})
    train.run(world.job("run", recipe, validate=True))
    report = summary(world.folder / "run")
    losses = [point["loss"] for point in report["validation"]]
    assert report["best"] == report["validation"][losses.index(min(losses))]
    assert report["best"]["step"] < report["steps"]
    assert [p["tokens"] // 200 for p in report["validation"]][:3] == [1, 2, 3]
    kept = sorted(f.name for f in (world.folder / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{report['best']['step']:08d}", f"step-{report['steps']:08d}"]
    assert validation_loss(world, world.folder / "run") == pytest.approx(
        report["best"]["loss"], rel=1e-4
    )


def validation_loss(world, folder):
    """Of a saved student, with each sample alone and the definitions of the tests."""
    from references import cross_entropy, over_bucket

    from stillroom.storage.snapshots.snapshot import load_snapshot

    model, total, scored = KIND.student(folder / "student").eval(), 0.0, 0
    samples = Samples(world.store, load_snapshot(world.store, world.validation), soft=True)
    for step in steps(samples, Cursor(), tokens_per_step=1, stop_samples=len(samples)):
        (sample,) = step.samples
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sample.token_ids.tolist()])).logits[0]
        for n in range(sample.scored_tokens):
            position = sample.spans[0, 0] - 1 + n
            t = torch.from_numpy(sample.targets.logprobs[n]).double().exp().tolist()
            tail = float(torch.tensor(float(sample.targets.tail_logprob[n])).exp())
            total += float(
                over_bucket("forward_kl", logits[position], sample.targets.ids[n].tolist(), t, tail)
            )
            total += 0.1 * float(
                cross_entropy(logits[position], int(sample.token_ids[position + 1]))
            )
        scored += sample.scored_tokens
    return total / scored


@pytest.mark.numeric
def test_the_baseline_differs_in_the_loss_alone(world):
    recipe = world.recipe(loss={"soft_weight": 2.0, "hard_weight": 0.5})
    train.run(world.job("student", recipe))
    train.run(world.job("baseline", recipe, arm="baseline"))
    plain = world.recipe(loss={"soft_weight": 0.0, "hard_weight": 1.0})
    train.run(world.job("plain", plain))
    student, baseline = summary(world.folder / "student"), summary(world.folder / "baseline")
    for name in ("steps", "tokens", "scored_tokens", "samples", "snapshot", "parameters"):
        assert student[name] == baseline[name]
    assert [p["tokens"] for p in student["history"]] == [p["tokens"] for p in baseline["history"]]
    assert {p["soft"] for p in baseline["history"]} == {None}
    # The same start and first batch: another of either moves the loss by a hundredth. One arm sums
    # with entries and the other without, and each logarithm in the sums is known to a few eps =
    # 1.2e-7 of itself.
    assert student["history"][0]["hard"] == pytest.approx(baseline["history"][0]["hard"], rel=1e-5)
    assert same(weights(world.folder / "baseline"), weights(world.folder / "plain"))
    assert not same(weights(world.folder / "baseline"), weights(world.folder / "student"))


def test_black_box_learns_from_text_alone(world):
    world.train = snapshot_of(world.store, "generations").id
    recipe = world.recipe(score=None, loss={"hard_weight": 1.0}, train={"tokens": 3000})
    train.run(world.job("run", recipe))
    history = summary(world.folder / "run")["history"]
    assert {point["soft"] for point in history} == {None}
    assert history[-1]["hard"] < 0.8 * history[0]["hard"]


@pytest.fixture(scope="module")
def shared_world_of_spans(tmp_path_factory):
    """Of every text two spans are scored, two tokens between them are not."""
    folder = tmp_path_factory.mktemp("spans")
    teacher = save_tiny_llama(folder / "teacher", initializer_range=0.6)
    spans = {n: [[2, 1], [5, len(text) - 5]] for n, text in enumerate(TEXTS)}
    return World(teacher, folder, spans=spans)


@pytest.fixture
def world_of_spans(shared_world_of_spans, tmp_path):
    mine = copy(shared_world_of_spans)
    mine.folder = tmp_path
    return mine


@pytest.mark.numeric
@pytest.mark.parametrize("table", ["soft_targets", "generations"])
def test_rows_of_several_spans_train_and_resume_exactly(world_of_spans, table):
    world, recipe = world_of_spans, world_of_spans.recipe(train={"tokens": 800})
    if table == "generations":
        # Black-box: what is between the spans is not learnt from either.
        world.train = snapshot_of(world.store, "generations", slice(12, None)).id
        recipe = world.recipe(score=None, loss={"hard_weight": 1.0}, train={"tokens": 800})
    train.run(world.job("whole", recipe))
    report = summary(world.folder / "whole")
    assert report["scored_tokens"] == report["tokens"] - 4 * report["samples"]
    for looks in (7, 11, 10**9):
        try:
            train.run(world.job("stopped", recipe, stop=StopAfter(looks)))
        except Stopped:
            assert looks < 10**9
    assert without_time(summary(world.folder / "stopped")) == without_time(report)
    assert same(weights(world.folder / "stopped"), weights(world.folder / "whole"))


@pytest.mark.numeric
@pytest.mark.parametrize("k", [20, None])
def test_what_else_the_store_holds_changes_nothing(world, tmp_path, k):
    """Rows stored with more entries, or all of them, serve a recipe that asks for fewer."""
    more, points = World(world.teacher, tmp_path / "more", k=k), []
    one_step = {"tokens": None, "epochs": 1, "tokens_per_step": 10_000}
    for each in (world, more):
        train.run(each.job("run", each.recipe(score={"k": 6}, train=one_step)))
        points += summary(each.folder / "run")["history"]
    assert len(points) == 2
    assert points[0] == pytest.approx(points[1], rel=1e-5)


@pytest.mark.numeric
@pytest.mark.parametrize(
    "student", ["tied", "lora", "checkpointing", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_kinds_of_students(world, tiny_llama, student):
    sections = {
        "tied": {"student": {"config": {"tie_word_embeddings": True}}},
        "lora": {
            "student": {
                "model": str(tiny_llama("small", seed=3, initializer_range=0.6)),
                "lora": {"rank": 2},
            }
        },
        "checkpointing": {"train": {"gradient_checkpointing": True}},
        "bfloat16": {"student": {"config": {}, "dtype": "bfloat16"}},
    }
    recipe = world.recipe(**sections[student])
    train.run(world.job("run", recipe))
    report = summary(world.folder / "run")
    losses = [point["loss"] for point in report["history"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert (report["trained_parameters"] < report["parameters"]) == (student == "lora")
    assert report["parameters"] == sum(
        p.numel() for p in KIND.student(world.folder / "run" / "student").parameters()
    )
    assert {p.dtype for p in weights(world.folder / "run").values()} == {torch.float32}


@pytest.mark.numeric
def test_lora_resumes_exactly(world, tiny_llama):
    recipe = world.recipe(
        student={"model": str(tiny_llama("small", seed=3)), "lora": {"rank": 2, "dropout": 0.2}}
    )
    train.run(world.job("whole", recipe))
    with pytest.raises(Stopped):
        train.run(world.job("stopped", recipe, stop=StopAfter(9)))
    train.run(world.job("stopped", recipe))
    assert same(weights(world.folder / "whole"), weights(world.folder / "stopped"))


def test_scalars_are_shown_over_tokens(world):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = world.recipe(train={"evaluate_every_tokens": 400})
    with pytest.raises(Stopped):
        train.run(world.job("run", recipe, validate=True, stop=StopAfter(17)))
    train.run(world.job("run", recipe, validate=True))
    board = EventAccumulator(str(world.folder / "run" / "tensorboard")).Reload()
    report = summary(world.folder / "run")
    names = {
        "loss/total",
        "loss/soft",
        "loss/hard",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "mfu",
    }
    assert names | {"validation/total", "validation/soft", "validation/hard"} == set(
        board.Tags()["scalars"]
    )
    shown = [event.step for event in board.Scalars("loss/total")]
    assert shown == sorted(set(shown))
    assert len(shown) == report["steps"]
    assert shown[-1] == report["tokens"]


def test_a_loss_that_breaks_overwrites_nothing(world, monkeypatch):
    from stillroom.stages.train import trainer

    recipe = world.recipe(train={"checkpoint_every_steps": 2})
    gradients = trainer.Trainer._gradients

    def broken_at_five(self, step, *more):
        losses = gradients(self, step, *more)
        return replace(losses, loss=float("nan")) if step.after.step == 5 else losses

    monkeypatch.setattr(trainer.Trainer, "_gradients", broken_at_five)
    with pytest.raises(StillroomError, match="the loss is nan"):
        train.run(world.job("run", recipe))
    assert [f.name for f in (world.folder / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (world.folder / "run" / "train.json").exists()


class TestRefusals:
    def test_another_tokenizer(self, world, tiny_llama):
        student = tiny_llama("other")
        path = student / "tokenizer.json"
        path.write_text(path.read_text().replace('"cat": 6', '"lynx": 6'))
        with pytest.raises(
            UsageError, match=r"student\.model: the tokenizer of .*other is not that of the teacher"
        ):
            train.run(world.job("run", world.recipe(student={"model": str(student)})))

    def test_a_temperature_that_the_rows_do_not_have(self, world):
        """As a snapshot named in the recipe may: `plan` looks at the recipe only."""
        recipe = world.recipe(loss={"temperature": 2.0}, score={"temperatures": [1.0, 2.0]})
        with pytest.raises(
            UsageError,
            match=r"loss\.temperature: 2 is not stored with these targets, which have 1\.",
        ):
            train.run(world.job("run", recipe))
        assert not (world.folder / "run" / "train.json").exists()

    def test_a_student_with_too_small_a_vocabulary(self, world):
        with pytest.raises(UsageError, match="its vocabulary has 12 ids, but the text has token"):
            train.run(world.job("run", world.recipe(student={"config": {"vocab_size": 12}})))

    def test_a_student_with_too_short_a_context(self, world):
        recipe = world.recipe(student={"config": {"max_position_embeddings": 20}})
        with pytest.raises(
            UsageError, match=f"reads at most 20 tokens .* the longest sample has {LONGEST}"
        ):
            train.run(world.job("run", recipe))

    def test_rows_that_are_too_short(self, world):
        with pytest.raises(
            UsageError,
            match=rf"train\.row_tokens: 16 is shorter than the longest sample \({LONGEST} tokens\)",
        ):
            train.run(world.job("run", world.recipe(train={"row_tokens": 16})))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, Triton runs")
    def test_a_kernel_that_cannot_run_here(self, world, monkeypatch):
        """Before the rows are looked at, which may take long."""
        monkeypatch.setattr(
            "stillroom.stages.audit.before_training.audit_rows",
            lambda *_: pytest.fail("rows were audited"),
        )
        with pytest.raises(
            UsageError, match=r"train\.kernel: triton cannot run, .* 'cpu', expected an NVIDIA GPU"
        ):
            train.run(world.job("run", world.recipe(train={"kernel": "triton"})))


@pytest.mark.numeric
def test_a_larger_teacher_vocabulary_goes_into_the_tail(tiny_llama, tmp_path):
    """The teacher's embedding is padded to 40, and the student's ends at 32.

    So it is with models of one family.
    """
    world = World(tiny_llama("teacher", vocab_size=40, initializer_range=0.6), tmp_path, k=30)
    recipe = world.recipe(
        score={"k": 30}, student={"model": str(tiny_llama("small", seed=3, vocab_size=32))}
    )
    train.run(world.job("run", recipe))
    history = summary(world.folder / "run")["history"]
    assert history[-1]["soft"] < history[0]["soft"]
    assert min(point["soft"] for point in history) >= 0


@pytest.mark.assets
def test_a_real_teacher_teaches(assets, tmp_path):
    teacher = assets / "models" / "stories260k-llama-hd32"
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside with her "
        "dog {} in the {}."
    )
    pairs = [
        (a, b)
        for a in ("Max", "Spot", "Tim", "Sam")
        for b in ("park", "sun", "garden", "rain", "snow")
    ]
    texts = [tokenizer(story.format(*pair))["input_ids"] for pair in pairs]
    world = World(teacher, tmp_path, texts=texts, k=16)
    recipe = world.recipe(
        score={"k": 16},
        student={"config": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}},
        train={
            "tokens": 6000,
            "tokens_per_step": 300,
            "tokens_per_pass": 300,
            "learning_rate": 2e-2,
        },
    )
    train.run(world.job("run", recipe))
    history = summary(world.folder / "run")["history"]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


@pytest.mark.numeric
def test_rows_with_padding_where_they_are_asked_for_or_needed(world, tiny_llama):
    """The same training, but for the rounding of its sums."""
    flat, rows = ({"tokens": 1200}, {"tokens": 1200, "row_tokens": LONGEST})
    for name, settings in (("flat", flat), ("rows", rows)):
        train.run(world.job(name, world.recipe(train=settings)))
    reports = [summary(world.folder / name) for name in ("flat", "rows")]
    assert reports[0]["padding_share"] == 0 < reports[1]["padding_share"] < 0.5
    for one, other in zip(*(report["history"] for report in reports), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_what_a_run_took_counts_over_its_stops(world):
    recipe = world.recipe(train={"tokens": 3000})
    with pytest.raises(Stopped):
        train.run(world.job("run", recipe, stop=StopAfter(40)))
    train.run(world.job("run", recipe))
    report = summary(world.folder / "run")
    steps = [point["tokens"] for point in report["speed"]]
    assert steps == sorted(set(steps)) == [point["tokens"] for point in report["history"]]
    assert report["tokens_per_second"] == pytest.approx(
        report["tokens"] / report["seconds"], rel=0.01
    )


def test_a_student_that_attends_otherwise_gets_rows_with_padding(world, monkeypatch):
    monkeypatch.setattr(
        "stillroom.stages.loader.causal_lm.attend_apart", lambda *_: "it has dropout"
    )
    job = world.job("run", world.recipe(train={"tokens": 300}))
    train.run(job)
    said = "this student cannot attend within samples of one row (it has dropout): rows get padding"
    assert said in job.progress.said
    assert summary(world.folder / "run")["tokens"] >= 300


def test_a_checkpoint_of_another_version_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"another version of Stillroom.*Remove `checkpoints/`"):
        Record.of({"cursor": {}, "seconds": 1.0})


@pytest.mark.parametrize(
    "bad",
    [
        {"cursor": {"epoch": None}},
        {"cursor": {"sample": -1}},
        {"cursor": {"step": "3"}},
        {"cursor": 3},
        {"scored_tokens": None},
        {"best": [1]},
        {"history": 3},
        {"speed": {"seconds": "x"}},
        {"more": 1},
    ],
)
def test_a_checkpoint_that_says_what_no_run_writes_is_refused_by_name(bad: dict[str, Any]) -> None:
    written = json.loads(json.dumps(asdict(Record())))
    assert Record.of(written) == Record()
    with pytest.raises(UsageError, match=r"wrote this run's checkpoints.*Remove `checkpoints/`"):
        Record.of(written | bad)


@pytest.mark.parametrize("config", [MixtralConfig, JetMoeConfig, DbrxConfig])
def test_a_balancing_loss_that_a_config_asks_for_is_said_to_be_left_out(config):
    (note,) = left_out(config(output_router_logits=True))
    assert "balancing loss of experts" in note
    assert not left_out(config())
    assert not left_out(LlamaConfig())
