"""Token classification.

It is tested for a distribution for each word in the store, the loss at its first token, and what
comes of it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from ranked_evaluation import judge, shared
from tiny_classes import rows_of
from tiny_store import StopAfter
from tiny_words import TAGS, Words, save_tiny_tagger, tagged
from together import together
from transformers import AutoModelForTokenClassification, AutoTokenizer

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.evaluate import stage as evaluate
from stillroom.stages.loader.samples import Samples
from stillroom.stages.loader.token_classification import WordPasses
from stillroom.stages.losses.objective import aim_at
from stillroom.stages.models.classification import Inputs
from stillroom.stages.models.token_classification import of_classes
from stillroom.stages.train import stage as train
from stillroom.storage.errors import Stopped, UsageError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.snapshots.snapshot import load_snapshot
from stillroom.storage.tables.spans import positions, spans_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Words:
    folder = tmp_path_factory.mktemp("words")
    return Words(folder, save_tiny_tagger(folder / "teacher"), tagged(60)).scored()


def read(world: Words, text: str) -> tuple[Any, list[int]]:
    """What transformers alone makes of a prompt's words.

    It is its encoding, and each word's first token.
    """
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    encoded = tokenizer(json.loads(text), is_split_into_words=True, return_tensors="pt")
    of = encoded.word_ids(0)
    return encoded, [of.index(word) for word in sorted({w for w in of if w is not None})]


class TestStore:
    @pytest.mark.numeric
    def test_a_row_is_the_teachers_distribution_at_the_first_token_of_each_word(
        self, world: Words
    ) -> None:
        model = AutoModelForTokenClassification.from_pretrained(world.teacher).eval()
        prompts = {row["prompt_key"]: row for row in world.rows("prompts")}
        rows = world.rows()
        assert len(rows) == 60
        longer = 0
        for row in rows:
            prompt = prompts[row["prompt_key"]]
            encoded, first = read(world, prompt["text"])
            assert row["token_ids"].tolist() == encoded["input_ids"][0].tolist()
            assert positions(spans_of(row)).tolist() == first
            longer += len(row["token_ids"]) - 2 > len(first)
            with torch.no_grad():
                expected = model(**encoded).logits[0].double().log_softmax(-1)[first]
            assert (row["kind"], row["k"], row["span_tokens"]) == ("full", 5, len(first))
            found = row["logprobs"].reshape(-1, 5)
            np.testing.assert_allclose(found, expected, atol=2e-6)
            labels = prompt["labels"]
            assert (labels is None) == (row["labels"] is None)
            assert row["label"] is None
            best = expected.argmax(-1).tolist()
            known = best if labels is None else labels
            there = [b if one < 0 else one for one, b in zip(known, best, strict=True)]
            assert row["token_logprob"].tolist() == found[np.arange(len(first)), there].tolist()
        assert longer > 10, "some words have several tokens"
        assert verify(world.store).ok

    def test_labels_are_those_of_the_source_by_name_and_by_index(self, world: Words) -> None:
        found = {row["text"]: row["labels"] for row in world.rows("prompts")}
        for record in tagged(60):
            tags = record.get("labels")
            labels = found[json.dumps(record["words"])]
            if tags is None:
                assert labels is None
                continue
            named = [TAGS.index(tag) if isinstance(tag, str) else tag for tag in tags]
            assert labels.tolist() == [-1 if tag == -100 else tag for tag in named]

    def test_shards_say_where_targets_are(self, world: Words) -> None:
        for commit in world.store.commits("soft_targets"):
            about = world.store.shard("soft_targets", commit.shard.sha256).about
            assert (about["head"], about["class_names"]) == ("token_classes", list(TAGS))

    def test_the_books_close(self, world: Words) -> None:
        lines = {line.name: line for line in world.plan().stages}
        score = lines["score"]
        assert (score.state, score.planned, score.committed) == ("done", 60, 60)
        assert score.tokens == sum(len(record["words"]) for record in tagged(60))


def passes(world: Words, model: Any, tokens_per_pass: int) -> WordPasses:
    inputs = Inputs.of(model, world.teacher)
    return WordPasses(tokens_per_pass=tokens_per_pass, inputs=inputs, vocab_size=32)


@pytest.mark.numeric
class TestLoss:
    @pytest.mark.parametrize("tokens_per_pass", [1, 40, 10_000])
    def test_it_is_the_definition_summed_over_words(
        self, world: Words, tokens_per_pass: int
    ) -> None:
        """KL at temperature 2, T^2 times it, and cross-entropy where there is a label.

        It is so whoever shares a pass.
        """
        snapshot = world.plan().snapshots["train"]
        model = of_classes(TAGS).student(save_tiny_tagger(world.folder / "student", seed=3)).eval()
        samples = list(Samples(world.store, snapshot, soft=True).read(0, 12))
        aim, soft, hard, words = aim_at(world.recipe.loss, 0.5), 0.0, 0.0, 0
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].double()[positions(sample.spans)]
            assert sample.targets is not None
            teacher = torch.from_numpy(sample.targets.logprobs).double()
            t, s = (teacher / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
            soft += float(4 * (t.exp() * (t - s)).sum())
            words += len(t)
            if sample.labels is not None:
                there = np.flatnonzero(sample.labels >= 0)
                hard -= float(logits.log_softmax(-1)[there, sample.labels[there]].sum())
        assert words == sum(sample.scored_tokens for sample in samples)
        found = []
        for batch in passes(world, model, tokens_per_pass).batches(samples, 2.0):
            one = passes(world, model, tokens_per_pass)
            found.append(one.losses(model, batch, aim=aim, dtype=torch.float32))
        # A few hundred float32 terms of about 1, a few eps each.
        assert sum(float(part.soft.sum()) for part in found) == pytest.approx(soft, rel=1e-5)
        assert sum(float(part.hard.sum()) for part in found) == pytest.approx(hard, rel=1e-5)
        total = soft + 0.5 * hard
        assert sum(float(part.total) for part in found) == pytest.approx(total, rel=1e-5)


@pytest.mark.numeric
class TestTraining:
    def test_a_stopped_run_goes_on_to_the_same_student(self, world: Words, tmp_path: Path) -> None:
        train.run(world.job(tmp_path / "whole"))
        with pytest.raises(Stopped):
            train.run(world.job(tmp_path / "stopped", stop=StopAfter(9)))
        train.run(world.job(tmp_path / "stopped"))
        one, other = (
            dict(
                of_classes(TAGS).student(tmp_path / name / "student" / "student").named_parameters()
            )
            for name in ("whole", "stopped")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
        report = json.loads((tmp_path / "whole" / "student" / "train.json").read_text())
        trained = rows_of(world.store, world.plan().snapshots["train"])
        assert report["scored_tokens"] == 2 * sum(row["span_tokens"] for row in trained)

    def test_evaluation_is_what_its_definitions_say(self, world: Words, tmp_path: Path) -> None:
        job = world.job(tmp_path)
        train.run(job)
        evaluate.run(replace(job, train_dirs={"student": tmp_path / "student"}))
        content = json.loads((tmp_path / "student" / "evaluation.json").read_text())
        rows = rows_of(world.store, load_snapshot(world.store, job.snapshots["test"]))
        model = of_classes(TAGS).student(tmp_path / "student" / "student").eval()
        kl, agree, right, labelled = [], [], [], 0
        for row in rows:
            ids = torch.from_numpy(row["token_ids"].astype(np.int64))[None]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].double()[positions(spans_of(row))]
            own = logits.log_softmax(-1).numpy()
            teacher = row["logprobs"].reshape(-1, 5).astype(np.float64)
            kl += (np.exp(teacher) * (teacher - own)).sum(-1).tolist()
            agree += (own.argmax(-1) == teacher.argmax(-1)).tolist()
            if row["labels"] is not None:
                known = row["labels"] >= 0
                labelled += int(known.sum())
                right += (own.argmax(-1) == row["labels"])[known].tolist()
        student, measured = content["results"]["student"], content["measured_on"]
        # KL of stored float32 numbers, a few eps of terms of about 1.
        assert student["kl_teacher"] == pytest.approx(np.mean(kl), rel=1e-4)
        assert student["top1_agreement"] == pytest.approx(np.mean(agree))
        assert student["accuracy"] == pytest.approx(np.mean(right))
        assert student["f1_micro"] == pytest.approx(np.mean(right))
        assert (measured["of"], measured["tokens"], measured["labelled"]) == (
            "words",
            len(kl),
            labelled,
        )
        assert (measured["rows"], student["rows"]) == (12, 12)
        assert {"entity_precision", "entity_recall", "entity_f1"} <= student.keys()
        assert set(content["classes"]["arms"]["student"]["entities"]) == {"PER", "LOC"}
        if torch.get_num_threads() == 1:  # as ranks have: with two the sums are rounded otherwise
            judged = shared(replace(job, train_dirs={"student": tmp_path / "student"}))
            together(judge, judged, 2, ranks=2)
            by_two = json.loads((tmp_path / "student" / "evaluation.json").read_text())
            assert by_two | {"seconds": 0} == content | {"seconds": 0}, (
                "words and entities by two ranks"
            )

    def test_lora_trains_adapters_and_the_head(self, world: Words, tmp_path: Path) -> None:
        folder = save_tiny_tagger(tmp_path / "small", seed=4)
        student = {"model": str(folder), "lora": {"rank": 2, "keep_adapter": True}}
        train.run(world.job(tmp_path, world.changed(student=student)))
        before, after = (
            of_classes(TAGS).student(path).state_dict()
            for path in (folder, tmp_path / "student" / "student")
        )
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert {"classifier.weight", "bert.encoder.layer.0.attention.self.query.weight"} <= changed
        assert "bert.embeddings.word_embeddings.weight" not in changed
        kept = PeftModel.from_pretrained(
            of_classes(TAGS).student(folder), tmp_path / "student" / "adapter"
        ).merge_and_unload()
        for name, tensor in kept.state_dict().items():
            torch.testing.assert_close(tensor, after[name], rtol=1e-5, atol=1e-6)

    def test_an_adapter_on_the_head_is_refused(self, world: Words, tmp_path: Path) -> None:
        folder = save_tiny_tagger(tmp_path / "small")
        student = {"model": str(folder), "lora": {"target_modules": ["query", "classifier"]}}
        with pytest.raises(UsageError, match=r"Name modules below its head, or write all-linear"):
            train.run(world.job(tmp_path, world.changed(student=student)))


class TestRefusals:
    def refused(self, world: Words, message: str, **sections: Any) -> None:
        with pytest.raises(UsageError, match=message):
            make_plan(world.changed(**sections))

    def test_a_teacher_of_texts_and_one_of_words(self, world: Words, tmp_path: Path) -> None:
        from tiny_models import save_tiny_bert

        of_texts = {"model": str(save_tiny_bert(tmp_path / "texts"))}
        says = (
            r"no token classification head \(config.json names BertForSequenceClassification, "
            r"expected one that ends in ForTokenClassification\).* or set run.task to "
            r"classification"
        )
        self.refused(world, says, teacher=of_texts)
        run = {"dir": str(tmp_path / "run"), "task": "classification"}
        data = {"source": str(world.source), "format": "labelled", "holdout": 2}
        says = (
            r"no classification head .*BertForTokenClassification.* run.task to "
            r"token_classification"
        )
        self.refused(world, says, run=run, data=data)

    def test_a_teacher_that_was_not_trained_or_continues_text(
        self, world: Words, tmp_path: Path
    ) -> None:
        from tiny_llama import save_tiny_llama
        from transformers import BertModel

        folder = save_tiny_tagger(tmp_path / "body")
        BertModel.from_pretrained(folder).save_pretrained(folder)
        self.refused(world, "has no token classification head", teacher={"model": str(folder)})
        llama = {"model": str(save_tiny_llama(tmp_path / "llama"))}
        self.refused(world, "has no token classification head", teacher=llama)

    def test_students_of_other_tags_or_kind(self, world: Words, tmp_path: Path) -> None:
        from tiny_models import save_tiny_bert

        other = {"model": str(save_tiny_tagger(tmp_path / "other", tags=("O", "B-X", "I-X")))}
        self.refused(world, r"student\.model: .* has 3 classes .*, the teacher 5", student=other)
        texts = {"model": str(save_tiny_bert(tmp_path / "texts", classes=TAGS))}
        self.refused(
            world, r"is a text classifier, expected a model that .*token class", student=texts
        )
        three = {"config": {"id2label": {0: "a", 1: "b", 2: "c"}}}
        self.refused(world, r"student\.config has 3 classes \(a, b, c\)", student=three)

    @pytest.mark.parametrize(
        ("path", "value", "says"),
        [
            ("score.targets", "topk", "token_classification keeps every class: expected 'full'"),
            ("data.format", "labelled", "token_classification reads 'tagged' records"),
            ("data.format", "text", "token_classification reads 'tagged' records"),
            ("generate.engine", "hf", "has no meaning for token_classification"),
            ("train.row_tokens", 64, "has no meaning for token_classification"),
        ],
    )
    def test_settings_that_do_not_fit(self, world: Words, path: str, value: Any, says: str) -> None:
        from stillroom.stages.recipe.checks.together import check_together
        from stillroom.stages.recipe.sections import Recipe

        tree = world.recipe.model_dump(mode="json")
        section, name = path.split(".")
        tree[section] = (tree[section] or {}) | {name: value}
        errors = check_together(Recipe.model_validate(tree))
        assert any(says in message for _, message in errors), errors

    def test_tagged_records_are_of_no_other_task(self, world: Words) -> None:
        from stillroom.stages.recipe.checks.together import check_together
        from stillroom.stages.recipe.sections import Recipe

        tree = world.recipe.model_dump(mode="json")
        tree["run"]["task"] = "causal_lm"
        said = dict(check_together(Recipe.model_validate(tree)))
        assert "'tagged' is for run.task token_classification" in said["data.format"]
