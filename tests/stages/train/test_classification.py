"""Classification.

It is tested for the teacher's classes in the store, the loss, training, evaluation, and kinds of
students.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import write_jsonl
from tiny_classes import World, records, rows_of
from tiny_models import CLASSES, save_tiny_bert
from tiny_store import StopAfter
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
)

from stillroom.pipeline.plan.plan import make_plan
from stillroom.pipeline.report import markdown
from stillroom.pipeline.report.classes import by_class
from stillroom.pipeline.report.report import outcome
from stillroom.pipeline.report.results import results
from stillroom.stages.evaluate import stage as evaluate
from stillroom.stages.loader.samples import Samples
from stillroom.stages.models.classification import of_classes
from stillroom.stages.models.students.student import initial_student
from stillroom.stages.train import stage as train
from stillroom.storage.errors import IntegrityError, Stopped, UsageError
from stillroom.storage.snapshots.snapshot import load_snapshot, make_snapshot, save_snapshot
from stillroom.storage.store.store import CommitLimits, Store
from stillroom.storage.tables.doubts import doubts
from stillroom.storage.tables.invariants import check_shape


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("classes")
    return World(folder, save_tiny_bert(folder / "teacher"), records(60)).scored()


@pytest.fixture(scope="module")
def prompts(world: World) -> dict[bytes, dict[str, Any]]:
    return {row["prompt_key"]: row for row in world.rows("prompts")}


class TestStore:
    @pytest.mark.numeric
    def test_a_row_is_the_teachers_distribution_over_the_classes_of_its_text(
        self, world: World, prompts: dict[bytes, dict[str, Any]]
    ) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(world.teacher).eval()
        tokenizer = AutoTokenizer.from_pretrained(world.teacher)
        rows = world.rows()
        assert len(rows) == 60
        for row in rows:
            prompt = prompts[row["prompt_key"]]
            encoded = tokenizer(prompt["text"], prompt["text_pair"], return_tensors="pt")
            assert row["token_ids"].tolist() == encoded["input_ids"][0].tolist()
            with torch.no_grad():
                expected = model(**encoded).logits[0].double().log_softmax(-1)
            assert (row["kind"], row["k"], row["span_tokens"]) == ("full", 3, 1)
            assert row["span_start"] == len(row["token_ids"]) - 1
            assert row["logprobs"].tolist() == pytest.approx(expected.tolist(), abs=2e-6)
            asked = int(expected.argmax()) if row["label"] is None else row["label"]
            assert row["token_logprob"][0] == row["logprobs"][asked]
            assert row["entropy"][0] == pytest.approx(
                float(-(expected.exp() * expected).sum()), abs=2e-6
            )

    def test_labels_are_those_of_the_source_by_index_and_by_name(
        self, world: World, prompts: dict[bytes, dict[str, Any]]
    ) -> None:
        expected = {}
        for record in records(60):
            label = record["label"]
            expected[record["text"], record.get("text_pair")] = (
                CLASSES.index(label) if label in CLASSES else label
            )
        found = [(prompts[row["prompt_key"]], row["label"]) for row in world.rows()]
        assert {(prompt["text"], prompt["text_pair"]): label for prompt, label in found} == expected
        assert sum(label is None for _, label in found) == 5

    def test_a_pair_is_read_as_two_texts(
        self, world: World, prompts: dict[bytes, dict[str, Any]]
    ) -> None:
        """Without its segments the same tokens would give other numbers."""
        model = AutoModelForSequenceClassification.from_pretrained(world.teacher).eval()
        (row, *_) = [row for row in world.rows() if prompts[row["prompt_key"]]["text_pair"]]
        with torch.no_grad():
            blind = (
                model(input_ids=torch.tensor(row["token_ids"][None]).long())
                .logits[0]
                .log_softmax(-1)
            )
        assert float(np.abs(row["logprobs"] - blind.numpy()).max()) > 1e-3

    def test_shards_say_that_these_are_classes(self, world: World) -> None:
        for commit in world.store.commits("soft_targets"):
            about = world.store.shard("soft_targets", commit.shard.sha256).about
            assert (about["head"], about["class_names"]) == ("classes", list(CLASSES))

    def test_the_books_close_and_nothing_is_left_to_do(self, world: World) -> None:
        lines = {line.name: line for line in world.plan().stages}
        assert (lines["data"].state, lines["score"].state, lines["train"].state) == (
            "done",
            "done",
            "to do",
        )
        assert (lines["score"].planned, lines["score"].committed, lines["score"].tokens) == (
            60,
            60,
            60,
        )

    def test_a_label_that_is_put_right_is_another_row(self, tmp_path: Path) -> None:
        """What the teacher says of the text is the same.

        A row that kept the old label would teach the mistake.
        """
        rows = records(20)
        world = World(tmp_path, save_tiny_bert(tmp_path / "teacher"), rows).scored()
        rows[0]["label"] = CLASSES.index("bad") if rows[0]["label"] != 0 else 1
        write_jsonl(world.source, rows)
        lines = {line.name: line for line in world.plan().stages}
        assert lines["data"].state == "to do"
        world.scored()
        assert len(world.rows()) == 21
        plan = world.plan()
        assert sum(snapshot.rows for snapshot in plan.snapshots.values()) == 20
        judged = [row for s in plan.snapshots.values() for row in rows_of(world.store, s)]
        labels = [
            row["label"]
            for row in judged
            if row["prompt_key"] == _prompt_key(world, rows[0]["text"])
        ]
        assert labels == [rows[0]["label"]]


def _prompt_key(world: World, text: str) -> bytes:
    return next(row["prompt_key"] for row in world.rows("prompts") if row["text"] == text)


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "train.json").read_text())
    return found


def same_weights(one: Path, other: Path) -> bool:
    a, b = (
        dict(of_classes(CLASSES).student(folder / "student").named_parameters())
        for folder in (one, other)
    )
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.numeric
class TestTraining:
    def test_a_stopped_run_goes_on_to_the_same_student(self, world: World, tmp_path: Path) -> None:
        """Dropout of 0.1 included, which BERT's config asks for."""
        train.run(world.job(tmp_path / "whole"))
        with pytest.raises(Stopped):
            train.run(world.job(tmp_path / "stopped", stop=StopAfter(9)))
        train.run(world.job(tmp_path / "stopped"))
        assert same_weights(tmp_path / "whole" / "student", tmp_path / "stopped" / "student")
        report = summary(tmp_path / "whole" / "student")
        assert report["scored_tokens"] == report["samples"] == 2 * 48

    def test_the_baseline_learns_from_labels_alone(self, world: World, tmp_path: Path) -> None:
        job = world.job(tmp_path)
        train.run(job)
        train.run(replace(job, arm="baseline"))
        student, baseline = summary(tmp_path / "student"), summary(tmp_path / "baseline")
        assert {p["soft"] for p in baseline["history"]} == {None}
        # The same start and first batch, but for the order of the sums: a few eps = 1.2e-7 of a
        # loss.
        assert baseline["history"][0]["hard"] == pytest.approx(
            student["history"][0]["hard"], rel=1e-5
        )
        assert [p["tokens"] for p in baseline["history"]] == [
            p["tokens"] for p in student["history"]
        ]

    def test_evaluation_is_what_its_definitions_say(self, world: World, tmp_path: Path) -> None:
        train_section = {"epochs": 8, "tokens_per_step": 80, "learning_rate": 2e-2}
        job = world.job(tmp_path, world.changed(train=train_section))
        train.run(job)
        evaluate.run(replace(job, train_dirs={"student": tmp_path / "student"}))
        content = json.loads((tmp_path / "student" / "evaluation.json").read_text())
        rows = rows_of(world.store, load_snapshot(world.store, job.snapshots["test"]))
        tokenizer = AutoTokenizer.from_pretrained(world.teacher)
        model = of_classes(CLASSES).student(tmp_path / "student" / "student").eval()
        teacher = np.stack([row["logprobs"] for row in rows]).astype(np.float64)
        has = np.array([row["label"] is not None for row in rows])
        labels = np.array([row["label"] for row in rows if row["label"] is not None])
        found = []
        texts = {
            row["prompt_key"]: (row["text"], row["text_pair"]) for row in world.rows("prompts")
        }
        for row in rows:
            with torch.no_grad():
                logits = model(**tokenizer(*texts[row["prompt_key"]], return_tensors="pt")).logits[
                    0
                ]
            found.append(logits.double().log_softmax(-1).numpy())
        student = np.stack(found)
        for arm, logprobs in (("teacher", teacher), ("student", student)):
            result = content["results"][arm]
            judged = logprobs[has]
            right = judged.argmax(1) == labels
            assert result["accuracy"] == pytest.approx(right.mean())
            assert result["cross_entropy"] == pytest.approx(
                -judged[np.arange(len(labels)), labels].mean(), abs=1e-5
            )
            kl = (np.exp(teacher) * (teacher - logprobs)).sum(1).mean()
            assert result["kl_teacher"] == pytest.approx(kl, abs=1e-5)
            assert result["tv_teacher"] == pytest.approx(
                np.abs(np.exp(teacher) - np.exp(logprobs)).sum(1).mean() / 2, abs=1e-5
            )
            assert result["top1_agreement"] == pytest.approx(
                (logprobs.argmax(1) == teacher.argmax(1)).mean()
            )
            assert result["ece"] == pytest.approx(
                expected_calibration_error(np.exp(judged.max(1)), right), abs=1e-5
            )
            answers = judged.argmax(1)
            cells = {(a, b): n for a, b, n in content["classes"]["arms"][arm]["confusion"]}
            assert cells == Counter(zip(labels.tolist(), answers.tolist(), strict=True))
            of_each = [
                2
                * ((labels == c) & (answers == c)).sum()
                / ((labels == c).sum() + (answers == c).sum())
                for c in np.union1d(labels, answers)
            ]
            assert result["f1_macro"] == pytest.approx(np.mean(of_each))
        assert (
            content["results"]["student"]["kl_teacher"]
            < 0.9 * content["results"]["student_before"]["kl_teacher"]
        )
        assert content["classes"]["names"] == list(CLASSES)
        measured = content["measured_on"]
        assert (measured["rows"], measured["labelled"]) == (len(rows), len(labels)) == (12, 11)
        assert (content["measured_on"]["of"], content["measured_on"]["ece_bins"]) == ("texts", 15)


class TestWithoutLabels:
    def test_half_labelled_texts_are_trained_on_and_said(self, tmp_path: Path) -> None:
        """A column that is absent, a null, and -1 as data sets hide labels.

        All of these are no label.
        """
        rows = [without(row, n) for n, row in enumerate(records(60))]
        world = World(tmp_path, save_tiny_bert(tmp_path / "teacher"), rows).scored()
        job = world.job(tmp_path)
        (note,) = [note for note in world.plan().notes if "without a label" in note]
        stored = [row["label"] for row in world.rows()]
        lacking = stored.count(None)
        assert len(stored) == 60
        assert 30 <= lacking < 60
        train.run(job)
        evaluate.run(replace(job, train_dirs={"student": tmp_path / "student"}))
        content = json.loads((tmp_path / "student" / "evaluation.json").read_text())
        measured = content["measured_on"]
        held_out = measured["rows"] - measured["labelled"]
        assert f"{lacking - held_out} of 48 to train on and {held_out} of 12 held out" in note
        assert content["results"]["student"]["kl_teacher"] > 0
        cells = content["classes"]["arms"]["student"]["confusion"]
        assert sum(texts for *_, texts in cells) == measured["labelled"]
        assert "of which" in markdown.block(results(content, world.recipe.model_dump()))

    def test_without_any_label_the_teacher_alone_teaches_and_judges(self, tmp_path: Path) -> None:
        rows = [{"text": row["text"]} for row in records(40)]
        unlabelled = {
            "loss": {"temperature": 2.0, "hard_weight": 0.0},
            "evaluate": {"baseline": False},
        }
        teacher = save_tiny_bert(tmp_path / "teacher")
        world = World(tmp_path, teacher, rows, **unlabelled)
        asks = world.changed(**unlabelled | {"loss": {"hard_weight": 0.1}})
        baseline = world.changed(**unlabelled | {"evaluate": {"baseline": True}})

        def refused() -> None:
            with pytest.raises(UsageError, match=r"^loss\.hard_weight: no row .* Set it to 0"):
                make_plan(asks)
            with pytest.raises(UsageError, match=r"^evaluate\.baseline: .* from labels alone"):
                make_plan(baseline)

        alone = world.changed(student=None, train=None, loss={}, evaluate={})
        assert make_plan(alone).stages[0].planned == 40  # nobody learns

        refused()  # before the source was read into the store, and after
        world.scored()
        refused()
        job = replace(world.job(tmp_path), train_dirs={"student": tmp_path / "student"})
        train.run(job)
        assert {point["hard"] for point in summary(tmp_path / "student")["history"]} == {None}
        found = evaluate.run(job).details["results"]
        content = json.loads((tmp_path / "student" / "evaluation.json").read_text())
        for arm in ("teacher", "student_before", "student"):
            nothing = ("accuracy", "f1_macro", "cross_entropy", "perplexity", "ece")
            assert {found[arm][name] for name in nothing} == {None}
            assert found[arm]["rows"] == 12
        assert found["student"]["kl_teacher"] < found["student_before"]["kl_teacher"]
        assert content["classes"] == {"names": list(CLASSES), "arms": {}}
        assert by_class(content) is None
        assert "none has a gold label" in markdown.block(results(content, {}))
        assert "accuracy" not in outcome(content)


def without(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Every other record without its label, in one of three ways."""
    if number % 2:
        return row
    nothing = {0: {}, 2: {"label": None}, 4: {"label": -1}}[number % 6]
    return {name: value for name, value in row.items() if name != "label"} | nothing


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """sum_b n_b / n |accuracy_b - confidence_b| over 15 bins of equal width, closed above."""
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_labels_of_other_rows_are_seen_before_a_step(world: World, tmp_path: Path) -> None:
    """Planted: the targets of a text under the label of another one."""
    planted = Store.open(tmp_path / "store", create=True)
    for folder in (world.store.root / "teachers").iterdir():
        planted.put_teacher(
            folder.name, {file.name: file.read_bytes() for file in folder.iterdir()}
        )
    rows = [row for row in world.rows() if row["label"] is not None]
    commit = next(iter(world.store.commits("soft_targets")))
    about = world.store.shard("soft_targets", commit.shard.sha256).about
    with planted.writer("soft_targets", about=about, limits=CommitLimits(rows=100)) as writer:
        for row in rows:
            writer.add(row | {"label": (row["label"] + 1) % 3})
    places = {commit.shard.sha256: range(len(rows)) for commit in planted.commits("soft_targets")}
    snapshot = make_snapshot(planted, "soft_targets", places, {})
    save_snapshot(planted, snapshot)
    recipe = world.changed(storage={"dir": str(tmp_path / "store"), "mantissa_bits": 23})
    job = replace(world.job(tmp_path), recipe=recipe, snapshots={"train": snapshot.id})
    with pytest.raises(IntegrityError, match=r"row 0 .*: token_logprob: 1 positions disagree"):
        train.run(job)
    assert not (tmp_path / "student" / "train.json").exists()


class TestStudents:
    def test_fresh_ones_have_the_teachers_classes(self, world: World) -> None:
        model = initial_student(world.recipe, world.teacher)
        assert list(model.config.id2label.values()) == list(CLASSES)
        assert model.classifier.out_features == 3

    def test_a_body_without_a_head_gets_one_by_the_seed(self, world: World, tmp_path: Path) -> None:
        full = AutoModelForSequenceClassification.from_pretrained(
            save_tiny_bert(tmp_path / "full", seed=4)
        )
        full.base_model.save_pretrained(tmp_path / "body")
        AutoTokenizer.from_pretrained(world.teacher).save_pretrained(tmp_path / "body")
        recipe = world.changed(student={"model": str(tmp_path / "body")})
        one, same = (initial_student(recipe, world.teacher) for _ in range(2))
        other = initial_student(
            recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 1})}),
            world.teacher,
        )
        assert torch.equal(one.classifier.weight, same.classifier.weight)
        assert not torch.equal(one.classifier.weight, other.classifier.weight)
        body = BertModel.from_pretrained(tmp_path / "body")
        assert torch.equal(
            one.base_model.embeddings.word_embeddings.weight, body.embeddings.word_embeddings.weight
        )

    def test_lora_trains_adapters_and_the_head(self, world: World, tmp_path: Path) -> None:
        folder = save_tiny_bert(tmp_path / "small", seed=4)
        recipe = world.changed(student={"model": str(folder), "lora": {"rank": 2}})
        train.run(world.job(tmp_path, recipe))
        report = summary(tmp_path / "student")
        assert report["trained_parameters"] < report["parameters"]
        trained = of_classes(CLASSES).student(tmp_path / "student" / "student")
        before = AutoModelForSequenceClassification.from_pretrained(folder)
        assert not torch.equal(trained.classifier.weight, before.classifier.weight)
        name = "bert.encoder.layer.0.attention.self.query.weight"
        assert not torch.equal(trained.get_parameter(name), before.get_parameter(name))
        embeddings = "bert.embeddings.word_embeddings.weight"
        assert torch.equal(trained.get_parameter(embeddings), before.get_parameter(embeddings))


class TestInvariants:
    @pytest.fixture
    def row(self, world: World) -> dict[str, Any]:
        return next(row for row in world.rows() if row["label"] is not None)

    @pytest.fixture
    def about(self, world: World) -> Any:
        commit = next(iter(world.store.commits("soft_targets")))
        return world.store.shard("soft_targets", commit.shard.sha256).about

    def test_every_row_is_sound(self, world: World, about: Any) -> None:
        for row in world.rows():
            check_shape("soft_targets", row, about)
            assert not list(doubts(row, about))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"span_start": 1}, "where texts are classified, each has one target"),
            ({"label": 3}, r"label 3, expected 0 to 2 \(bad, good, neither\)"),
            ({"label": -1}, "label -1, expected 0 to 2"),
            ({"logprobs": np.zeros(2, np.float32), "k": 2}, "kind 'full' with k 2"),
        ],
    )
    def test_a_row_that_contradicts_itself_is_not_written(
        self, row: dict[str, Any], about: Any, change: Any, message: str
    ) -> None:
        with pytest.raises(IntegrityError, match=message):
            check_shape("soft_targets", row | change, about)

    def test_a_label_of_another_row_is_seen(self, row: dict[str, Any], about: Any) -> None:
        other = row | {"label": (row["label"] + 1) % 3}
        assert [column for column, _ in doubts(other, about)] == ["token_logprob"]


def test_samples_carry_labels(world: World) -> None:
    snapshot = world.plan().snapshots["train"]
    samples = Samples(world.store, snapshot, soft=True)
    found = {
        sample.token_ids.tobytes() + str(sample.label).encode()
        for sample in samples.read(0, len(samples))
    }
    assert found == {
        r["token_ids"].tobytes() + str(r["label"]).encode() for r in rows_of(world.store, snapshot)
    }
    assert (samples.lengths().scored_tokens, samples.lengths().samples) == (48, 48)


@pytest.mark.assets
def test_real_sentences_with_a_real_tokenizer(assets: Path, tmp_path: Path) -> None:
    """sst2 has text and label (int32) in Parquet.

    The tokenizer is BERT's, and the teacher is a small random one.
    """
    import pyarrow.parquet as pq

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "tokenizer-bert-base-uncased")
    sizes = {"vocab_size": len(tokenizer), "classes": ("negative", "positive")}
    teacher = save_tiny_bert(tmp_path / "teacher", **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / name).unlink()
    tokenizer.save_pretrained(teacher)
    rows = (
        pq.read_table(assets / "classify" / "sst2" / "validation.parquet").slice(0, 40).to_pylist()
    )
    section = {"source": str(tmp_path / "rows.jsonl"), "format": "labelled", "holdout": 8}
    world = World(tmp_path, teacher, rows, data=section).scored()
    found = {row["text"]: row["label"] for row in world.rows("prompts")}
    assert found.items() <= {row["text"]: row["label"] for row in rows}.items()
    short = [row for row in rows if len(tokenizer(row["text"])["input_ids"]) <= 48]
    assert len(world.rows()) == len(short) > 30
    job = world.job(tmp_path)
    train.run(job)
    assert summary(tmp_path / "student")["scored_tokens"] == 2 * (len(short) - 8)
