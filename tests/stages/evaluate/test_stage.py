"""The evaluate stage on a real store.

There is a tiny random teacher with its own distributions as targets, and students beside it.
"""

import gc
import json
import math
import shutil
import signal
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranked_evaluation import judge, shared
from together import together
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stillroom.pipeline.report import results
from stillroom.pipeline.report.blocks import Bullets
from stillroom.stages.evaluate import causal_lm, measure, metrics
from stillroom.stages.evaluate import stage as evaluate
from stillroom.stages.evaluate.quiz import patterns
from stillroom.stages.models.students import student
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.errors import Stopped, UsageError
from stillroom.storage.keys import content_key
from stillroom.storage.snapshots.snapshot import make_snapshot, save_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets

VOCABULARY, END = 61, 1
TEACHER, DATA = "ab" * 16, "cd" * 16
PROMPTS, PROMPT_TOKENS, COMPLETION_TOKENS = 9, (2, 7), 12


@dataclass
class Quiet:
    """A progress line that only counts."""

    total: int = 0
    done: int = 0
    tokens: int = 0
    notes: set[str] = field(default_factory=set)

    def start(self, *, total: int, unit: str, done: int = 0) -> None:
        self.total, self.done, self.tokens = total, done, 0

    def advance(self, units: int = 1, *, tokens: int = 0, note: str = "") -> None:
        self.done += units
        self.tokens += tokens
        self.notes.add(note)

    def say(self, text: str) -> None: ...


def tiny_llama(seed: int, *, vocabulary: int = VOCABULARY, hidden: int = 24) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # far from uniform
        bos_token_id=0,
        eos_token_id=END,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def words() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "</s>": END, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


def logits(model: LlamaForCausalLM, token_ids: list[int]) -> np.ndarray:
    """[T, V] straight from transformers, no code of ours."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids])).logits[0].double().numpy()


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclass
class World:
    """A store with held-out rows of a tiny teacher, and the folders of two students."""

    root: Path
    store: Store
    teacher: LlamaForCausalLM
    generations: list[dict[str, Any]]
    recipe: dict[str, Any]

    def job(self, snapshot: str, *, arms: tuple[str, ...] = ("student",), **recipe: Any) -> Job:
        return Job(
            recipe=Recipe.model_validate(self.recipe | recipe),
            progress=Quiet(),
            stop=StopFlag(),
            data_id=DATA,
            teacher_id=TEACHER,
            author_id=TEACHER,
            train_dirs={arm: self.root / f"train-{arm}" for arm in arms},  # type: ignore[misc]
            evaluation_id="ef" * 16,
            snapshots={"test": snapshot},
        )

    def snapshot(self, table: Any, rows: int | None = None) -> str:
        places: dict[str, list[int]] = {}
        for place in self.store.index(table, ["key"]).slice(0, rows).to_pylist():
            places.setdefault(place["shard"], []).append(place["row"])
        snapshot = make_snapshot(self.store, table, places, {"split": "test"})
        save_snapshot(self.store, snapshot)
        return snapshot.id

    def score(self, kind: str, k: int, bits: int = 23) -> str:
        """Write the teacher's targets of every generation; returns the snapshot of them."""
        about = {
            "teacher_id": TEACHER,
            "tokenizer_id": "t",
            "vocab_size": VOCABULARY,
            "mantissa_bits": bits,
        }
        with self.store.writer("soft_targets", about=about) as writer:
            for row in self.generations:
                writer.add(self._target_row(row, kind, k, bits))
        return self.snapshot("soft_targets")

    def _target_row(self, row: dict[str, Any], kind: str, k: int, bits: int) -> dict[str, Any]:
        start = max(row["prompt_tokens"], 1)
        ids = row["token_ids"]
        logprobs = log_softmax(logits(self.teacher, ids))[start - 1 : len(ids) - 1]
        best = np.argsort(-logprobs, axis=1)[:, :k]
        outside = logprobs.copy()
        np.put_along_axis(outside, best, -np.inf, axis=1)
        targets = SoftTargets(
            ids=None if kind == "full" else best.astype(np.int32),
            logprobs=(logprobs if kind == "full" else np.take_along_axis(logprobs, best, 1)).astype(
                np.float32
            ),
            tail_logprob=np.full(len(logprobs), -np.inf, np.float32)
            if kind == "full"
            else np.log(np.exp(outside).sum(axis=1)).astype(np.float32),
            token_logprob=logprobs[np.arange(len(logprobs)), ids[start:]].astype(np.float32),
            entropy=-(np.exp(logprobs) * logprobs).sum(axis=1).astype(np.float32),
        )
        return {
            "key": content_key("row", of=row["key"], targets=kind, bits=bits),
            "reuse_key": content_key("reuse", of=row["key"]),
            "tokens_key": row["tokens_key"],
            "generation_key": row["key"],
            "prompt_key": row["prompt_key"],
            "teacher_id": TEACHER,
            "kind": kind,
            "token_ids": ids,
            "span_start": start,
            **targets.columns(bits),
        }


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, LlamaForCausalLM, list[dict[str, Any]]]:
    """The parts that every test starts from: a folder to copy, the teacher, what it wrote."""
    root = tmp_path_factory.mktemp("made")
    store = Store.open(root / "store", create=True)
    teacher, tokenizer = tiny_llama(1), words()
    teacher.save_pretrained(root / "train-student" / "student")
    tiny_llama(2).save_pretrained(root / "train-baseline" / "student")
    teacher.config.save_pretrained(root / "files")
    tokenizer.save_pretrained(root / "files")
    files = {file.name: file.read_bytes() for file in (root / "files").iterdir()}
    store.put_teacher(TEACHER, files | {"identity.json": b"{}"})
    rng = np.random.default_rng(3)
    generations = [generation(teacher, tokenizer, rng) for _ in range(PROMPTS)]
    with store.writer("generations", about={}) as writer:
        for row in generations:
            writer.add(row)
    return root, teacher, generations


@pytest.fixture
def world(tmp_path: Path, made: tuple[Path, LlamaForCausalLM, list[dict[str, Any]]]) -> World:
    root, teacher, generations = made
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    store = Store.open(tmp_path / "store")
    recipe = {
        "run": {"dir": str(tmp_path)},
        "storage": {"dir": str(tmp_path / "store")},
        "teacher": {"model": "unused"},
        "student": {"config": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}},
        "data": {"source": "unused", "format": "prompt"},
        "generate": {"temperature": 0.0},
        "score": {},
        "train": {"tokens": 1},
        "evaluate": {"samples": 0},
    }
    return World(tmp_path, store, teacher, generations, recipe)


def generation(
    teacher: LlamaForCausalLM, tokenizer: Any, rng: np.random.Generator
) -> dict[str, Any]:
    """A random prompt and the teacher's greedy continuation, token by token."""
    prompt = [int(i) for i in rng.integers(2, VOCABULARY, rng.integers(*PROMPT_TOKENS))]
    ids = list(prompt)
    while len(ids) < len(prompt) + COMPLETION_TOKENS and ids[-1] != END:
        ids.append(int(logits(teacher, ids)[-1].argmax()))
    key = content_key("generation", ids=ids)
    return {
        "key": key,
        "reuse_key": key,
        "prompt_key": content_key("prompt", ids=prompt),
        "source_key": None,
        "author_id": TEACHER,
        "sampling_id": TEACHER,
        "tokens_key": bytes(16),
        "sample_index": 0,
        "token_ids": ids,
        "prompt_tokens": len(prompt),
        "completion_tokens": len(ids) - len(prompt),
        "text": tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True),
        "finish_reason": "length",
        "max_tokens": COMPLETION_TOKENS,
        "row_seed": 0,
    }


def put_prompts(world: World, references: list[str | None]) -> None:
    """The prompts rows and the inputs record of the generations, with these references."""
    import pyarrow as pa

    rows = []
    for row, reference in zip(world.generations, references, strict=True):
        key = content_key("prompts", prompt=row["prompt_key"], reference=reference)
        text = {"text": "unused", "source": "test", "format": "prompt"}
        rows.append(text | {"key": key, "prompt_key": row["prompt_key"], "reference": reference})
    with world.store.writer("prompts", about={}) as writer:
        for row in rows:
            writer.add(row)
    columns = {name: [row[name] for row in rows] for name in ("key", "prompt_key")}
    table = pa.table(
        columns
        | {"split": ["test"] * len(rows), "windows": [1] * len(rows), "first": [True] * len(rows)}
    )
    world.store.put_inputs(DATA, table, {})


def measured(world: World, model: LlamaForCausalLM) -> dict[str, float]:
    """Cross-entropy, KL and acceptance by the teacher over all completions.

    They are computed from the definitions in float64.
    """
    losses, divergences, accepted = [], [], []
    for row in world.generations:
        ids, start = row["token_ids"], max(row["prompt_tokens"], 1)
        p, t = log_softmax(logits(model, ids)), log_softmax(logits(world.teacher, ids))
        for position in range(start - 1, len(ids) - 1):
            losses.append(-p[position, ids[position + 1]])
            divergences.append(float((np.exp(t[position]) * (t[position] - p[position])).sum()))
            accepted.append(float(np.minimum(np.exp(t[position]), np.exp(p[position])).sum()))
    means = (float(np.mean(values)) for values in (losses, divergences, accepted))
    return dict(zip(("cross_entropy", "kl_teacher", "acceptance"), means, strict=True))


def read(world: World) -> dict[str, Any]:
    return json.loads((world.root / "train-student" / "evaluation.json").read_text())


@pytest.mark.numeric
def test_every_arm_is_measured_as_defined(world: World) -> None:
    job = world.job(world.score("full", VOCABULARY), arms=("student", "baseline"))
    result = evaluate.run(job)
    results = result.details["results"]
    assert list(results) == ["teacher", "student_before", "baseline", "student"]
    before = student.initial_student(job.recipe, world.store.teacher_dir(TEACHER))
    for arm, model in (
        ("student_before", before),
        ("baseline", tiny_llama(2)),
        ("student", world.teacher),
    ):
        expected = measured(world, model)
        assert results[arm]["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-5)
        assert results[arm]["kl_teacher"] == pytest.approx(
            expected["kl_teacher"], rel=1e-4, abs=1e-6
        )
        assert results[arm]["perplexity"] == pytest.approx(
            math.exp(expected["cross_entropy"]), rel=1e-4
        )
        assert results[arm]["acceptance"] == pytest.approx(expected["acceptance"], rel=1e-5)
        assert results[arm]["tv_teacher"] == pytest.approx(
            1 - expected["acceptance"], rel=1e-5, abs=1e-6
        )
    assert results["teacher"]["cross_entropy"] == pytest.approx(
        measured(world, world.teacher)["cross_entropy"], rel=1e-5
    )
    gap = read(world)["differences"]["baseline"]["kl_teacher"]
    assert gap == pytest.approx(
        results["student"]["kl_teacher"] - results["baseline"]["kl_teacher"], abs=1e-9
    )


@pytest.mark.numeric
def test_any_number_of_ranks_finds_the_same(world: World, tmp_path: Path) -> None:
    """All of it is the same, bit for bit.

    That is numbers, errors, gradients, answers, what the report draws and what it shows.
    """
    put_prompts(world, [f"w{n + 2}" for n in range(PROMPTS)])
    asked = {"prompts": PROMPTS, "max_tokens": 4, "metric": "rouge_l"}
    job = world.job(
        world.score("full", VOCABULARY),
        arms=("student", "baseline"),
        evaluate={"generate": asked, "samples": 2, "gradient_tokens": 40},
    )
    found = []
    for ranks, at_once in ((1, 16), (2, 2), (4, 16)):
        answers = together(judge, shared(job), at_once, ranks=ranks)
        done = answers[0].pop("done")
        assert all(answer == answers[0] for answer in answers)
        found.append((read(world) | {"seconds": 0}, answers[0], done))
    assert found[0][0]["gradient"]
    assert found[0][0]["views"]["rows"]
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.numeric
@pytest.mark.parametrize(("kind", "k"), [("full", VOCABULARY), ("topk", 8)])
def test_a_student_that_is_the_teacher_is_at_no_distance_from_rounded_targets(
    world: World, kind: str, k: int
) -> None:
    results = evaluate.run(world.job(world.score(kind, k, bits=10))).details["results"]
    assert 0 <= results["student"]["kl_teacher"] < 1e-5
    assert results["student"]["top1_agreement"] == 1.0
    assert results["student"]["cross_entropy"] == pytest.approx(
        results["teacher"]["cross_entropy"], rel=1e-3
    )
    assert results["student"]["ece"] == pytest.approx(results["teacher"]["ece"], abs=1e-3)
    assert results["student_before"]["kl_teacher"] > 0.5


def test_evaluation_json_says_what_was_measured_on_what(world: World) -> None:
    snapshot = world.score("topk", 8)
    result = evaluate.run(world.job(snapshot, arms=("student", "baseline")))
    written = read(world)
    tokens = sum(row["completion_tokens"] for row in world.generations)
    assert written["id"] == "ef" * 16
    assert written["results"] == result.details["results"]
    assert written["arms"] == {"student": "train-student", "baseline": "train-baseline"}
    assert written["measured_on"] == {
        "snapshot": snapshot,
        "table": "soft_targets",
        "rows": PROMPTS,
        "prompts": PROMPTS,
        "tokens": tokens,
        "reference": "topk",
        "k": 8,
        "kl_is_lower_bound": True,
        "ece_bins": 15,
        "of": "tokens",
    }
    assert (result.rows, result.tokens) == (PROMPTS, tokens)
    assert all(sum(b["tokens"] for b in bins) == tokens for bins in written["reliability"].values())


@pytest.mark.numeric
def test_the_bucketed_kl_is_below_the_full_one(world: World) -> None:
    bucketed = evaluate.run(world.job(world.score("topk", 8))).details["results"]["student_before"]
    full = measured(
        world, student.initial_student(world.job("").recipe, world.store.teacher_dir(TEACHER))
    )
    assert bucketed["kl_teacher"] < full["kl_teacher"]
    assert bucketed["acceptance"] > full["acceptance"]


@pytest.mark.numeric
def test_chunks_of_one_token_give_the_same_numbers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = world.score("full", VOCABULARY)
    whole = evaluate.run(world.job(snapshot)).details["results"]
    monkeypatch.setattr(metrics, "CHUNK_BYTES", 1)
    assert metrics.chunk_tokens(VOCABULARY) == 1
    pieces = evaluate.run(world.job(snapshot)).details["results"]
    for name in ("cross_entropy", "kl_teacher", "ece"):
        assert pieces["student_before"][name] == pytest.approx(
            whole["student_before"][name], rel=1e-5
        )


def test_without_scores_there_is_cross_entropy_and_nothing_of_the_teacher(world: World) -> None:
    results = evaluate.run(world.job(world.snapshot("generations"), score=None)).details["results"]
    assert set(results["teacher"].values()) == {None}
    assert results["student"]["kl_teacher"] is None
    assert results["student"]["top1_agreement"] is None
    assert results["student"]["acceptance"] is None
    assert read(world)["gradient"] is None
    expected = measured(world, world.teacher)["cross_entropy"]
    assert results["student"]["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert read(world)["measured_on"]["reference"] is None


@pytest.mark.numeric
def test_the_gradient_of_the_recipe_s_targets_is_compared_at_the_start_and_at_the_end(
    world: World,
) -> None:
    snapshot = world.score("full", VOCABULARY)
    score = {"targets": "topk", "k": 4}
    evaluate.run(
        world.job(snapshot, arms=("student", "baseline"), score=score, loss={"tail": "drop"})
    )
    turned = read(world)["gradient"]
    assert list(turned) == ["student_before", "student"]
    before = turned["student_before"]
    assert 5 < before["angle_degrees"] < 120
    lengths = [row["completion_tokens"] for row in world.generations]
    assert before["tokens"] == sum(lengths)
    on_a_gpu = world.recipe["train"] | {
        "kernel": "triton"
    }  # where it was trained, not where it is evaluated
    evaluate.run(world.job(snapshot, score=score, train=on_a_gpu, evaluate={"gradient_tokens": 1}))
    assert (
        read(world)["gradient"]["student"]["tokens"] in lengths
    )  # the row that reaches the bound is the last
    evaluate.run(world.job(snapshot, score=score, loss={"tail": "bucket"}))
    bucket = read(world)["gradient"]["student_before"]
    assert bucket["angle_degrees"] < before["angle_degrees"]
    evaluate.run(world.job(snapshot, score=score | {"k": VOCABULARY}))
    all_kept = read(world)["gradient"]["student_before"]
    assert all_kept["angle_degrees"] < 1e-2
    assert all_kept["norm_ratio"] == pytest.approx(1.0, abs=1e-4)


def test_there_is_no_gradient_to_compare_without_a_soft_loss(world: World) -> None:
    snapshot = world.score("full", VOCABULARY)
    evaluate.run(world.job(snapshot, loss={"soft_weight": 0.0}))
    assert read(world)["gradient"] is None
    evaluate.run(world.job(snapshot, evaluate={"gradient_tokens": 0}))
    assert read(world)["gradient"] is None


def test_gradients_that_do_not_fit_in_memory_cost_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(causal_lm, "compare_gradients", full)
    results = evaluate.run(world.job(world.score("topk", 8))).details["results"]
    assert results["student"]["kl_teacher"] is not None
    assert read(world)["gradient"] is None


def test_progress_counts_what_models_read_and_reaches_its_total(world: World) -> None:
    """Both students.

    The teacher's rows are read from the store, which says nothing of the time left.
    """
    put_prompts(world, [None] * PROMPTS)
    job = world.job(world.score("topk", 8), evaluate={"generate": {"prompts": 5, "max_tokens": 4}})
    evaluate.run(job)
    assert isinstance(job.progress, Quiet)
    assert job.progress.done == job.progress.total == 2 * PROMPTS + 2 * 5
    assert job.progress.tokens == 2 * sum(row["completion_tokens"] for row in world.generations)


def test_one_model_is_in_memory_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def watched(make: Any) -> Any:
        def load(*arguments: Any) -> Any:
            gc.collect()
            assert not [r for r in alive if r() is not None], (
                "the model before this one is still there"
            )
            model = make(*arguments)
            alive.append(weakref.ref(model))
            return model

        return load

    for name in ("initial_student", "load_student"):
        monkeypatch.setattr(student, name, watched(getattr(student, name)))
    evaluate.run(world.job(world.score("topk", 8), arms=("student", "baseline")))
    assert len(alive) == 3


def test_a_stop_leaves_no_evaluation_behind(world: World) -> None:
    job = world.job(world.score("topk", 8))
    job.stop.number = signal.SIGTERM
    with pytest.raises(Stopped):
        evaluate.run(job)
    assert not (world.root / "train-student" / "evaluation.json").exists()


def test_an_evaluation_that_is_asked_for_differently_replaces_the_old_one(world: World) -> None:
    job = world.job(world.score("topk", 8))
    evaluate.run(job)
    evaluate.run(replace(job, evaluation_id="other"))
    assert read(world)["id"] == "other"


def test_nothing_held_out_and_a_student_of_another_vocabulary_are_refused(world: World) -> None:
    with pytest.raises(UsageError, match=r"data\.holdout"):
        evaluate.run(world.job(world.snapshot("soft_targets", rows=0)))
    tiny_llama(3, vocabulary=20).save_pretrained(world.root / "train-student" / "student")
    with pytest.raises(
        UsageError, match="its vocabulary has 20 ids, but a held-out row contains token"
    ):
        evaluate.run(world.job(world.score("topk", 8)))


def test_a_student_with_a_shorter_context_than_a_held_out_row_is_refused(world: World) -> None:
    short = world.recipe["student"]["config"] | {"max_position_embeddings": 8}
    with pytest.raises(UsageError, match="reads at most 8 tokens"):
        evaluate.run(world.job(world.score("topk", 8), student={"config": short}))


def test_a_lora_student_before_training_is_its_base_model(world: World) -> None:
    base = {"model": str(world.root / "train-baseline" / "student"), "lora": {"rank": 2}}
    words().save_pretrained(base["model"])
    put_prompts(world, [None] * PROMPTS)
    quiz, score, snapshot = (
        {"generate": {"prompts": 2, "max_tokens": 4}},
        {"k": 3},
        world.score("topk", 8),
    )
    job = world.job(
        snapshot, arms=("student", "baseline"), student=base, evaluate=quiz, score=score
    )
    results = evaluate.run(job).details["results"]
    assert results["student_before"]["cross_entropy"] == pytest.approx(
        results["baseline"]["cross_entropy"], rel=1e-5
    )
    assert results["student_before"]["answers"] == results["baseline"]["answers"]
    adapted = read(world)["gradient"]["student_before"]
    evaluate.run(world.job(snapshot, student={"model": base["model"]}, score=score))
    assert read(world)["gradient"]["student_before"] == pytest.approx(
        adapted, rel=1e-4
    )  # of all weights, once merged
    assert adapted["angle_degrees"] > 1


def test_a_student_that_is_the_teacher_answers_as_the_teacher_did(world: World) -> None:
    put_prompts(world, [None] * PROMPTS)
    quiz = {"generate": {"metric": "exact_match", "prompts": 20, "max_tokens": COMPLETION_TOKENS}}
    results = evaluate.run(world.job(world.score("topk", 8), evaluate=quiz)).details["results"]
    assert results["student"]["answers"] == 1.0
    assert results["student_before"]["answers"] < 0.5
    assert "answers" not in results["teacher"]  # its text is the reference
    written = read(world)
    assert written["answers"]["against"] == "the teacher's own text"
    assert len(written["samples"]) == 8
    texts = {row["text"] for row in world.generations}
    for sample in written["samples"]:
        assert list(sample) == ["prompt", "reference", "teacher", "student_before", "student"]
        assert sample["reference"] == sample["teacher"] == sample["student"]
        assert sample["teacher"] in texts


def test_without_being_asked_for_answers_a_few_are_there_to_look_at(world: World) -> None:
    put_prompts(world, [None] * PROMPTS)
    result = evaluate.run(world.job(world.score("topk", 8), evaluate={"samples": 2}))
    written = read(world)
    assert written["answers"] is None
    assert all("answers" not in numbers for numbers in result.details["results"].values())
    assert [list(sample) for sample in written["samples"]] == [
        ["prompt", "reference", "teacher", "student_before", "student"]
    ] * 2
    assert all(sample["student"].startswith(sample["teacher"]) for sample in written["samples"])
    evaluate.run(world.job(world.score("topk", 8)))
    assert read(world)["samples"] == []


def test_the_means_by_position_are_together_the_mean_of_all_tokens(world: World) -> None:
    evaluate.run(
        world.job(world.score("full", VOCABULARY), arms=("student", "baseline"), score={"k": 4})
    )
    written = read(world)
    views, results = written["views"], written["results"]
    assert list(views["by_position"]["arms"]) == ["student_before", "baseline", "student"]
    for arm, bins in views["by_position"]["arms"].items():
        whole = sum(b["tokens"] * b["mean"] for b in bins) / sum(b["tokens"] for b in bins)
        assert whole == pytest.approx(results[arm]["kl_teacher"], rel=1e-6, abs=1e-9)
    tokens = written["measured_on"]["tokens"]
    assert sum(views["entropy"]["tokens"]) == sum(views["kept_mass"]["tokens"]) == tokens
    assert sum(views["lengths"]["rows"]) == PROMPTS
    assert views["kept_mass"]["k"] == 4
    by_key = {
        row["key"].hex(): row
        for row in world.store.rows("soft_targets", _everything(world), ["key", "token_ids"])
    }
    for row in views["rows"]:
        shown = [*row["before"], *row["token_ids"]]
        assert by_key[row["key"]]["token_ids"].tolist() == shown
        assert [views["pieces"][str(i)] for i in row["token_ids"] if i > END] == [
            f" w{i}" for i in row["token_ids"] if i > END
        ]
        assert row["arms"]["student"]["ids"] == row["teacher"]["ids"]  # the student is the teacher


def _everything(world: World) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place in world.store.index("soft_targets", ["key"]).to_pylist():
        places.setdefault(place["shard"], []).append(place["row"])
    return places


def test_references_of_the_data_come_first_and_the_teacher_is_scored_on_them_too(
    world: World,
) -> None:
    texts = [row["text"] for row in world.generations]
    references = [None, *("no " + text for text in texts[1:5]), *texts[5:]]
    put_prompts(world, references)
    quiz = {"generate": {"metric": "exact_match", "max_tokens": COMPLETION_TOKENS}}
    results = evaluate.run(
        world.job(world.snapshot("generations"), score=None, evaluate=quiz)
    ).details["results"]
    assert results["teacher"]["answers"] == results["student"]["answers"] == 4 / 8
    assert results["teacher"]["cross_entropy"] is None
    assert read(world)["answers"]["prompts"] == 8


def test_texts_that_are_no_number_are_counted(world: World) -> None:
    quiz = {"generate": {"metric": "exact_match", "normalize": "number", "max_tokens": 4}}
    put_prompts(world, ["$1,000", "forty-two", *[None] * (PROMPTS - 2)])
    found = evaluate.run(world.job(world.snapshot("generations"), score=None, evaluate=quiz))
    assert found.details["results"]["student"]["answers"] == 0.0
    asked = read(world)["answers"]
    assert asked["normalize"] == "number"
    assert asked["no_number"] == {
        "reference": 1,
        **dict.fromkeys(("teacher", "student_before", "student"), asked["prompts"]),
    }


def test_texts_that_a_pattern_comes_to_no_end_with_are_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    quiz = {"generate": {"metric": "regex", "pattern": "((?:a+)+$)", "max_tokens": 4}}
    put_prompts(world, ["aa", "a" * 40 + "b", *[None] * (PROMPTS - 2)])
    evaluate.run(world.job(world.snapshot("generations"), score=None, evaluate=quiz))
    found = read(world)
    ((key,),) = found["answers"]["unanswered"].values()
    assert bytes.fromhex(key) == world.generations[1]["prompt_key"]
    (said,) = [note for note in _notes(found) if note.startswith("Answers:")]
    assert f"came to no end with count as unanswered: reference 1 ({key[:8]})." in said


def _notes(evaluation: dict[str, Any]) -> Sequence[str]:
    _, notes = results.results(evaluation, {}).blocks
    assert isinstance(notes, Bullets)
    return notes.items


def test_numbers_are_refused_where_no_reference_is_one(world: World) -> None:
    quiz = {"generate": {"metric": "exact_match", "normalize": "number", "max_tokens": 4}}
    put_prompts(world, [None] * PROMPTS)
    with pytest.raises(UsageError, match=r"normalize: 'number', but .* none of \d+ references"):
        evaluate.run(world.job(world.snapshot("generations"), score=None, evaluate=quiz))


def test_plain_text_is_continued_from_a_prefix(world: World) -> None:
    quiz = {"generate": {"max_tokens": 3}}
    data = {"source": "unused", "format": "text"}
    job = world.job(
        world.snapshot("generations"), score=None, generate=None, data=data, evaluate=quiz
    )
    evaluate.run(job)
    written = read(world)
    assert written["answers"]["against"] == "the rest of the text"
    whole = {tuple(words().decode(row["token_ids"]).split()) for row in world.generations}
    for sample in written["samples"]:
        prompt, reference = sample["prompt"].split(), sample["reference"].split()
        assert any(text[: len(prompt) + len(reference)] == (*prompt, *reference) for text in whole)
        assert len(reference) <= 3
        assert sample["teacher"] is None


@pytest.mark.parametrize(
    ("gpus", "count", "sharding", "right"),
    [
        (True, 2, "fsdp2", True),
        (True, 2, "ddp", False),
        (True, 1, "fsdp2", False),
        (False, 2, "fsdp2", False),
    ],
)
def test_what_was_sharded_is_loaded_in_turn_onto_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: bool,
    count: int,
    sharding: str,
    right: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    (tmp_path / "train.json").write_text(json.dumps({"sharding": sharding}))
    ranks = SimpleNamespace(count=count, by_first=lambda work: work())
    job: Any = SimpleNamespace(ranks=ranks, train_dirs={"student": tmp_path})
    assert measure._loads_in_turn(job) is right
