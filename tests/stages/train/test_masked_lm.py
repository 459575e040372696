"""Masked language models: hidden tokens in the store, the loss where they are, what comes of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_classes import rows_of
from tiny_llama import WORDS
from tiny_masks import FAMILIES, Hidden, V, save_tiny_masked, texts
from tiny_store import StopAfter
from transformers import AutoModelForMaskedLM, AutoTokenizer

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.data import stage as data
from stillroom.stages.data.tokenizing import Tokenizing
from stillroom.stages.evaluate import stage as evaluate
from stillroom.stages.loader.masked_lm import MaskedPacking
from stillroom.stages.loader.samples import Samples
from stillroom.stages.losses.objective import aim_at
from stillroom.stages.models.classification import Inputs
from stillroom.stages.models.head import split_head
from stillroom.stages.models.masked_lm import KIND, masked_states
from stillroom.stages.recipe.checks.together import check_together
from stillroom.stages.recipe.sections import Data, Recipe
from stillroom.stages.score import stage as score
from stillroom.stages.targets.alignment import target_positions
from stillroom.stages.targets.masks import Masks, put_back
from stillroom.stages.train import stage as train
from stillroom.storage.errors import RowError, Stopped, UsageError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.snapshots.snapshot import load_snapshot
from stillroom.storage.tables.heads import HEADS
from stillroom.storage.tables.spans import positions, spans_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Hidden:
    folder = tmp_path_factory.mktemp("masks")
    return Hidden(folder, save_tiny_masked(folder / "teacher"), texts(40)).scored()


def masks(rule: str = "bert") -> Masks:
    """Masks of a vocabulary of 1000 ids, the first five special, 4 the mask token."""
    return Masks(rule=rule, mask=4, special=np.arange(5), others=np.arange(5, 1000))


class TestMasks:
    def test_shares_are_those_of_the_rule(self) -> None:
        """15 of 100 are hidden.

        Of these 80 are the mask token, 10 another, 10 themselves, within six standard errors.
        """
        rng = np.random.default_rng(0)
        ids = [np.concatenate([[2], rng.integers(5, 1000, 100), [3]]) for _ in range(400)]
        found = [masks().hide(one) for one in ids]
        read = np.concatenate([one.token_ids[positions(one.spans)] for one in found])
        there = np.concatenate([one.labels for one in found])
        assert len(there) == 400 * 15
        for share, hits in ((0.8, read == 4), (0.1, read == there)):
            assert abs(hits.mean() - share) < 6 * np.sqrt(share * (1 - share) / len(hits))
        assert ((read == 4) | (read >= 5)).all()
        where = np.concatenate([positions(one.spans) for one in found])
        assert (where.min(), where.max()) == (1, 100), "never [CLS] and [SEP]"
        # Uniform over the tokens: mean 50.5, variance (n^2 - 1) / 12.
        assert abs(where.mean() - 50.5) < 6 * np.sqrt((100**2 - 1) / 12 / len(where))
        whole = masks("all").hide(ids[0])
        assert (whole.token_ids[positions(whole.spans)] == 4).all()
        assert whole.spans.tolist() == found[0].spans.tolist()

    def test_they_are_of_the_text_alone(self) -> None:
        ids = np.arange(2, 40)
        first, again = masks().hide(ids), masks().hide(ids.tolist())
        assert first.token_ids.tolist() == again.token_ids.tolist()
        assert first.spans.tolist() == again.spans.tolist()
        row = {
            "token_ids": first.token_ids,
            "labels": first.labels,
            "spans": first.spans.reshape(-1),
        }
        assert put_back(row).tolist() == ids.tolist()
        # Known for good: stored rows have these.
        where = positions(first.spans)
        assert (where.tolist(), first.labels.tolist()) == (
            [9, 17, 22, 23, 24],
            [11, 19, 24, 25, 26],
        )
        assert first.token_ids[where].tolist() == [4, 4, 300, 4, 26]

    def test_a_short_text_hides_one_and_an_empty_one_is_rejected(self) -> None:
        assert len(masks().hide([2, 9, 3]).labels) == 1
        with pytest.raises(RowError, match="nothing to hide"):
            masks().hide([2, 3])

    def test_a_window_of_unknown_tokens_goes_without_the_others(self, tmp_path: Path) -> None:
        tokenizer = save_tiny_masked(tmp_path / "teacher")
        asked = Data(source="x", format="text", window_tokens=10)
        of_teacher = Masks.of(tokenizer, "all", name="teacher")
        reads = Tokenizing(tokenizer, asked, context_tokens=40, masks=of_teacher)
        known, unknown = " ".join(WORDS[:8]), " ".join(["zzz"] * 8)
        found = reads.texts({"format": "text", "text": f"{known} {unknown} {known}"})
        assert [len(one.token_ids) for one in found] == [10, 10]
        with pytest.raises(RowError, match="nothing to hide"):
            reads.texts({"format": "text", "text": unknown})

    def test_by_hand_a_target_is_said_where_its_token_was(self) -> None:
        """The example of `targets/alignment.py`: sat is hidden at 3, and 3 says it."""
        assert target_positions(np.array([[3, 1]]), HEADS["masked_lm"]).tolist() == [3]
        assert target_positions(np.array([[3, 1]]), HEADS["lm"]).tolist() == [2]


class TestStore:
    @pytest.mark.numeric
    def test_a_row_is_the_teachers_distribution_where_tokens_are_hidden(
        self, world: Hidden
    ) -> None:
        model = AutoModelForMaskedLM.from_pretrained(world.teacher).eval()
        tokenizer = AutoTokenizer.from_pretrained(world.teacher)
        written = {row["key"]: row for row in world.rows("generations")}
        rows = world.rows()
        assert len(rows) == len(written) == 44, "four texts are two windows each"
        for row in rows:
            generation = written[row["generation_key"]]
            assert put_back(row).tolist() == generation["token_ids"].tolist()
            assert row["tokens_key"] == generation["tokens_key"]
            ids, places = row["token_ids"].astype(np.int64), positions(spans_of(row))
            assert (ids[0], ids[-1], len(ids) <= 40) == (2, 3, True)
            assert len(places) == max(1, round(0.15 * (len(ids) - 2)))
            with torch.no_grad():
                said = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double()
            expected = said.log_softmax(-1)[places]
            k = row["k"]
            found = row["logprobs"].reshape(-1, k)
            best = expected if row["kind"] == "full" else expected.sort(-1, descending=True)[0]
            np.testing.assert_allclose(found, best[:, :k], atol=3e-6)
            there = expected[np.arange(len(places)), row["labels"].astype(np.int64)]
            np.testing.assert_allclose(row["token_logprob"], there, atol=3e-6)
        # No token of a long text is lost or there twice.
        whole = max(texts(40), key=lambda record: len(record["text"]))["text"]
        parts = sorted(
            (g["sample_index"], g["token_ids"][1:-1].tolist())
            for g in written.values()
            if g["source_key"] in {r["key"] for r in world.rows("prompts") if r["text"] == whole}
        )
        inner = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert [token for _, part in parts for token in part] == inner
        assert verify(world.store).ok

    def test_a_stopped_scoring_goes_on_to_the_same_rows_whoever_is_beside_them(
        self, world: Hidden, tmp_path: Path
    ) -> None:
        other = Hidden(tmp_path, world.teacher, texts(40)[::-1])
        other.recipe = other.changed(
            storage={"dir": str(tmp_path / "store"), "commit_rows": 5, "mantissa_bits": 23}
        )
        job, teacher = other.stage_one()
        data.run(job)
        with pytest.raises(Stopped):
            score.run(replace(job, stop=StopAfter(9)), teacher)
        assert 0 < len(other.rows()) < 44
        score.run(job, teacher)
        whole, parts = ({row["key"]: row for row in one.rows()} for one in (world, other))
        assert whole.keys() == parts.keys()
        for key, row in whole.items():
            for name in ("token_ids", "labels", "logprobs", "spans"):
                np.testing.assert_array_equal(row[name], parts[key][name])

    def test_what_is_hidden_belongs_to_the_row_and_other_rules_are_other_rows(
        self, world: Hidden
    ) -> None:
        asked = {"source": str(world.source), "format": "text", "holdout": 12, "masks": "all"}
        lines = {line.name: line for line in make_plan(world.changed(data=asked)).stages}
        assert lines["data"].state == "to do"
        lines = {line.name: line for line in world.plan().stages}
        assert {lines[name].state for name in ("data", "score")} == {"done"}


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_behind_the_transform_whatever_the_family(family: str, tmp_path: Path) -> None:
    """Logits of states and output layer are the model's own, padded rows included.

    The layer ran for no token.
    """
    model: Any = KIND.student(save_tiny_masked(tmp_path / family, family=family)).eval()
    ids = torch.arange(5, 25).reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits
        states = masked_states(model, input_ids=ids, attention_mask=mask)
    # float32, one product of 16 numbers.
    torch.testing.assert_close(split_head(model).logits(states), own, rtol=1e-5, atol=1e-5)


def passes(world: Hidden, model: Any, tokens_per_pass: int) -> MaskedPacking:
    inputs = Inputs.of(model, world.teacher)
    return MaskedPacking(
        tokens_per_pass=tokens_per_pass, padded=inputs, vocab_size=V, shared_rows=False
    )


@pytest.mark.numeric
@pytest.mark.parametrize("tokens_per_pass", [1, 90, 10_000])
def test_the_loss_is_its_definition_summed_over_hidden_tokens(
    world: Hidden, tokens_per_pass: int
) -> None:
    """T^2 KL over entries and bucket at T = 2, and cross-entropy with what was there.

    It is so whoever shares a pass.
    """
    snapshot = world.plan().snapshots["train"]
    model = KIND.student(save_tiny_masked(world.folder / "student", seed=3)).eval()
    samples = list(Samples(world.store, snapshot, soft=True).read(0, 9))
    rows = {row["token_ids"].tobytes(): row for row in rows_of(world.store, snapshot)}
    soft = hard = 0.0
    tokens = 0
    for sample in samples:
        row = rows[sample.token_ids.tobytes()]
        ids = torch.from_numpy(row["token_ids"].astype(np.int64))[None]
        with torch.no_grad():
            z = model(input_ids=ids).logits[0].double()[positions(spans_of(row))]
        k, n = row["k"], len(z)
        entries = row["ids"].reshape(n, k).astype(np.int64)
        t = row["logprobs"].reshape(n, k).astype(np.float64) / 2
        tails = row["tempered_tails"].astype(np.float64)
        # softmax(z / 2) of the teacher on its entries and the bucket: sums of p^(1/2), normalised.
        teacher = np.concatenate([np.exp(t), np.exp(tails)[:, None]], axis=1)
        teacher /= teacher.sum(1, keepdims=True)
        own = (z / 2).softmax(-1).numpy()
        kept = np.take_along_axis(own, entries, 1)
        student = np.concatenate([kept, 1 - kept.sum(1, keepdims=True)], axis=1)
        soft += 4 * (teacher * np.log(teacher / student)).sum()
        hard -= z.log_softmax(-1).numpy()[np.arange(n), row["labels"]].sum()
        tokens += n
    aim = aim_at(world.recipe.loss, 0.5)
    packing = passes(world, model, tokens_per_pass)
    batches = list(packing.batches(samples, aim.objective.temperature))
    found = [packing.losses(model, batch, aim=aim, dtype=torch.float32) for batch in batches]
    assert (len(batches) > 1) == (tokens_per_pass < 10_000)
    assert sum(len(one.hard) for one in found) == tokens
    total = sum(one.total.item() for one in found)
    # float32 sums of some tens of terms of about 1.
    assert total == pytest.approx(soft + 0.5 * hard, rel=2e-5)
    assert sum(one.hard.sum().item() for one in found) == pytest.approx(hard, rel=2e-5)


class TestTraining:
    def test_both_arms_read_the_masks_of_the_rows_and_a_stopped_run_goes_on_alike(
        self, world: Hidden, tmp_path: Path
    ) -> None:
        whole = world.job(tmp_path / "whole")
        train.run(whole)
        train.run(replace(whole, arm="baseline"))
        parts = world.job(tmp_path / "parts", stop=StopAfter(4))
        with pytest.raises(Stopped):
            train.run(parts)
        train.run(replace(parts, stop=world.job(tmp_path / "parts").stop))
        weights = [
            AutoModelForMaskedLM.from_pretrained(folder / "student" / "student").state_dict()
            for folder in (tmp_path / "whole", tmp_path / "parts")
        ]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        said = [
            json.loads((tmp_path / "whole" / arm / "train.json").read_text())
            for arm in ("student", "baseline")
        ]
        assert said[0]["scored_tokens"] == said[1]["scored_tokens"]
        assert said[0]["snapshot"] == said[1]["snapshot"]

    def test_evaluation_is_what_its_definitions_say(self, world: Hidden, tmp_path: Path) -> None:
        job = world.job(tmp_path)
        train.run(job)
        evaluate.run(replace(job, train_dirs={"student": tmp_path / "student"}))
        content = json.loads((tmp_path / "student" / "evaluation.json").read_text())
        model = KIND.student(tmp_path / "student" / "student").eval()
        kl, right, nats = [], [], []
        for row in rows_of(world.store, load_snapshot(world.store, job.snapshots["test"])):
            ids = torch.from_numpy(row["token_ids"].astype(np.int64))[None]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].double()[positions(spans_of(row))]
            own = logits.log_softmax(-1).numpy()
            assert row["kind"] == "full", "judged on whole distributions"
            teacher = row["logprobs"].reshape(-1, V).astype(np.float64)
            kl += (np.exp(teacher) * (teacher - own)).sum(-1).tolist()
            right += (own.argmax(-1) == row["labels"]).tolist()
            nats += (-own[np.arange(len(own)), row["labels"]]).tolist()
        student, measured = content["results"]["student"], content["measured_on"]
        # KL of stored float32 numbers, a few eps of terms of about 1.
        assert student["kl_teacher"] == pytest.approx(np.mean(kl), rel=1e-4)
        assert student["accuracy"] == pytest.approx(np.mean(right))
        assert student["cross_entropy"] == pytest.approx(np.mean(nats), rel=1e-5)
        assert student["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
        assert (measured["of"], measured["tokens"]) == ("masked tokens", len(kl))
        assert content["classes"] is None


class TestRefusals:
    def refused(self, world: Hidden, message: str, **sections: Any) -> None:
        with pytest.raises(UsageError, match=message):
            make_plan(world.changed(**sections))

    def test_teachers_that_guess_no_hidden_tokens(self, world: Hidden, tmp_path: Path) -> None:
        from tiny_llama import save_tiny_llama
        from tiny_models import save_tiny_bert

        llama = {"model": str(save_tiny_llama(tmp_path / "llama"))}
        says = r"is a causal language model .*run.task masked_lm cannot.* Set run.task to causal_lm"
        self.refused(world, says, teacher=llama)
        classes = {"model": str(save_tiny_bert(tmp_path / "classes"))}
        self.refused(world, "no head that guesses hidden tokens", teacher=classes)
        self.refused(world, "no head that guesses hidden tokens", student=classes)
        one_way = save_tiny_masked(tmp_path / "decoder", is_decoder=True)
        self.refused(world, "sees no later token", teacher={"model": str(one_way)})

    def test_a_tokenizer_without_a_mask_token(self, world: Hidden, tmp_path: Path) -> None:
        folder = save_tiny_masked(tmp_path / "teacher")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.mask_token = None
        tokenizer.save_pretrained(folder)
        self.refused(world, "has no mask token", teacher={"model": str(folder)})

    @pytest.mark.parametrize(
        ("path", "value", "says"),
        [
            ("data.format", "prompt", "masked_lm reads 'text' records"),
            ("generate.engine", "hf", "has no meaning for masked_lm"),
            ("train.row_tokens", 64, "has no meaning for masked_lm"),
            ("teacher.adapter", "lora", "adapters to a masked language model yet"),
            (
                "student",
                {"from_teacher_layers": [0], "lora": {"rank": 2}},
                "adapters of a masked language model yet",
            ),
            ("score.features", [{"what": "hidden", "layers": [1]}], "features of masked texts yet"),
            ("score", None, "nothing to distil. Add score: {targets: topk}"),
        ],
    )
    def test_settings_that_do_not_fit(
        self, world: Hidden, path: str, value: Any, says: str
    ) -> None:
        tree = world.recipe.model_dump(mode="json")
        section, _, name = path.partition(".")
        tree[section] = (tree[section] or {}) | {name: value} if name else value
        errors = check_together(Recipe.model_validate(tree))
        assert any(says in message for _, message in errors), errors

    def test_masks_are_of_no_other_task(self, world: Hidden) -> None:
        tree = world.recipe.model_dump(mode="json")
        tree["run"]["task"], tree["data"]["masks"] = "causal_lm", "all"
        said = dict(check_together(Recipe.model_validate(tree)))
        assert "belongs to run.task masked_lm" in said["data.masks"]
