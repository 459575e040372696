"""The loss of texts that are classified, a batch of them at a time.

It is tested for definitions, padding, and texts without a label.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from objectives import objective_of
from tiny_models import save_tiny_bert
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from stillroom.stages.loader.classification import ClassPasses
from stillroom.stages.loader.norms import fails_alone
from stillroom.stages.loader.samples import Cursor, Sample, Step
from stillroom.stages.losses.objective import Aim, Objective
from stillroom.stages.models.classification import Inputs, class_logits
from stillroom.stages.recipe.sections import Loss, Train
from stillroom.stages.train.trainer import Trainer
from stillroom.storage.errors import UsageError
from stillroom.storage.tables.soft_targets import SoftTargets

pytestmark = pytest.mark.numeric


def make_text(length: int, label: int | None, seed: int = 0) -> Sample:
    """A random text, with a random teacher over three classes."""
    rng = np.random.default_rng(seed)
    logprobs = torch.from_numpy(rng.normal(scale=2, size=(1, 3))).log_softmax(-1).float().numpy()
    one = np.zeros(1, np.float32)
    targets = SoftTargets(
        ids=None,
        logprobs=logprobs,
        tail_logprob=one - np.inf,
        token_logprob=one,
        entropy=one,
        entries=None,
    )
    ids = np.array([2, *rng.integers(5, 24, length - 2), 3], np.int32)
    return Sample(token_ids=ids, spans=np.array([[length - 1, 1]]), targets=targets, label=label)


LENGTHS = [(14, 2), (12, 1), (9, 0), (7, 1), (5, None)]  # as passes have them: the longest first
TEXTS = [make_text(n, label, seed) for seed, (n, label) in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_tiny_bert(tmp_path_factory.mktemp("student") / "bert", seed=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model, Inputs.of(model, folder)


def passes(inputs: Inputs, tokens_per_pass: int = 1000) -> ClassPasses:
    return ClassPasses(tokens_per_pass=tokens_per_pass, inputs=inputs, vocab_size=32)


def losses_of(student: Any, samples: list[Sample], objective: Objective | None, **more: Any) -> Any:
    model, inputs = student
    temperature = objective.temperature if objective else None
    ready = passes(inputs, **more)
    found = [
        ready.losses(model, batch, aim=aimed(objective), dtype=torch.float32)
        for batch in ready.batches(samples, temperature)
    ]
    soft = torch.cat([part.soft for part in found]) if objective else None
    return soft, torch.cat([part.hard for part in found]), [part.total for part in found]


def aimed(objective: Objective | None) -> Aim:
    return Aim(soft_weight=1.0, hard_weight=0.5, objective=objective)


class TestLoss:
    @pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
    def test_value_and_gradient_are_those_of_the_definition(
        self, student: Any, temperature: float
    ) -> None:
        """T^2 sum t (log t - log p) + 0.5 * cross-entropy, with t and p at T.

        Their gradients are T (p - t) and p - y.
        """
        model, _ = student
        soft, hard, (total,) = losses_of(student, TEXTS, objective_of(temperature=temperature))
        model.zero_grad()
        total.backward()
        assert float(total.detach()) == pytest.approx(
            float(soft.sum() + 0.5 * hard.sum()), rel=1e-6
        )
        assert len(hard) == 4  # the last text has no label, and no cross-entropy
        bias = torch.zeros(3, dtype=torch.float64)
        for number, text in enumerate(TEXTS):
            with torch.no_grad():
                z = (
                    model(input_ids=torch.from_numpy(text.token_ids[None]).long())
                    .logits[0]
                    .double()
                )
            t = (torch.from_numpy(text.targets.logprobs[0]).double() / temperature).softmax(-1)
            p = (z / temperature).softmax(-1)
            expected = temperature**2 * float((t * (t.log() - p.log())).sum())
            bias += temperature * (p - t)
            if text.label is not None:
                cross_entropy = -float(z.log_softmax(-1)[text.label])
                assert float(hard[number]) == pytest.approx(cross_entropy, abs=1e-5)
                bias += 0.5 * (z.softmax(-1) - torch.eye(3, dtype=torch.float64)[text.label])
            # Logits of a padded row of five and of a row alone, up to 10: 8 eps of that, and T^2
            # times it.
            assert float(soft[number]) == pytest.approx(
                expected, abs=1e-5 * max(1.0, temperature**2)
            )
        assert model.classifier.bias.grad.tolist() == pytest.approx(
            bias.tolist(), abs=5e-5
        )  # of all five

    @pytest.mark.parametrize("tokens_per_pass", [1, 1000])
    def test_means_of_a_step_are_over_the_texts_that_have_it(
        self, student: Any, tokens_per_pass: int
    ) -> None:
        """It holds however they share passes.

        Weights are as given, and a text without a label has no cross-entropy.
        """
        model, inputs = student
        soft, hard, _ = losses_of(student, TEXTS, objective_of())
        loss = Loss(soft_weight=1.0, hard_weight=0.5)
        ready = passes(inputs, tokens_per_pass)
        trainer = Trainer(model, packing=ready, loss=loss, train=Train(epochs=1))
        found = trainer.validate([Step(samples=TEXTS, after=Cursor())])
        assert found.soft == pytest.approx(float(soft.mean()), rel=1e-5)
        assert found.hard == pytest.approx(float(hard.sum()) / 4, rel=1e-5)
        total = float(soft.sum() + 0.5 * hard.sum()) / 5
        assert found.loss == pytest.approx(total, rel=1e-5)
        alone = trainer.validate([Step(samples=TEXTS[-1:], after=Cursor())])
        assert (alone.hard, alone.loss) == (None, alone.soft)

    def test_how_texts_share_passes_changes_nothing(self, student: Any) -> None:
        model, _ = student
        found = []
        for tokens in (1, 20, 1000):
            soft, hard, totals = losses_of(
                student, TEXTS, objective_of(temperature=2.0), tokens_per_pass=tokens
            )
            model.zero_grad()
            torch.stack(totals).sum().backward()
            gradient = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            )
            found.append((soft, hard, gradient))
            assert len(totals) == {1: 5, 20: 4, 1000: 1}[tokens]
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=5e-5)  # gradients of up to 10

    def test_texts_of_like_length_share_a_pass(self, student: Any) -> None:
        mixed = [TEXTS[i] for i in (4, 0, 3, 1, 2)]
        shapes = [
            batch.inputs["input_ids"].shape for batch in passes(student[1], 28).batches(mixed)
        ]
        assert [tuple(shape) for shape in shapes] == [(2, 14), (3, 9)]

    def test_its_bytes_are_those_of_all_that_is_copied(self, student: Any) -> None:
        (batch,) = passes(student[1], 1000).batches([TEXTS[0]])
        targets = batch.targets
        copied = [*batch.inputs.values(), targets.labels, targets.logprobs, targets.tail_logprob]
        assert batch.nbytes == sum(part.numel() * part.element_size() for part in copied)

    def test_half_precision_moves_the_losses_by_its_rounding_only(self, student: Any) -> None:
        model, inputs = student
        ready, objective = passes(inputs), objective_of(temperature=2.0)
        (batch,) = ready.batches(TEXTS, 2.0)
        made: list[torch.dtype] = []
        watched = model.classifier.register_forward_hook(
            lambda *about: made.append(about[-1].dtype)
        )
        exact, half = (
            ready.losses(model, batch, aim=aimed(objective), dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
        watched.remove()
        assert made == [torch.float32, torch.bfloat16]
        for one, two in ((exact.soft, half.soft), (exact.hard, half.hard)):
            assert two.dtype == torch.float32
            torch.testing.assert_close(one, two, rtol=0.1, atol=0.1)

    def test_without_an_objective_only_labels_count(self, student: Any) -> None:
        soft, hard, _ = losses_of(student, TEXTS, None)
        assert soft is None
        assert len(hard) == sum(text.label is not None for text in TEXTS) == len(TEXTS) - 1

    def test_a_token_that_the_student_does_not_know(self, student: Any) -> None:
        _, inputs = student
        ready = replace(passes(inputs), vocab_size=10)
        with pytest.raises(UsageError, match="its vocabulary has 10 ids, but a text has token"):
            list(ready.batches(TEXTS))


def test_a_decoder_classifies_by_its_last_token_whatever_the_padding(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=32, **sizes, num_key_value_heads=1, pad_token_id=0, num_labels=3
    )
    model = LlamaForSequenceClassification(config).eval()
    inputs = Inputs(padding=0, separator=None)
    texts = [text.token_ids for text in TEXTS]
    with torch.no_grad():
        together = class_logits(model, inputs.tensors(texts))
        for number, text in enumerate(texts):
            alone = model(input_ids=torch.from_numpy(text[None]).long()).logits[0]
            torch.testing.assert_close(together[number], alone, rtol=1e-4, atol=1e-5)
    model.config.pad_token_id = None
    with pytest.raises(UsageError, match="names no pad_token_id"):
        Inputs.of(model, tmp_path)


def test_no_text_is_alone_where_a_pass_takes_three_of_the_longest(student: Any) -> None:
    rng = np.random.default_rng(5)
    for trial in range(40):
        lengths = rng.integers(2, 15, rng.integers(2, 12)).tolist()
        texts = [make_text(length, 0, seed) for seed, length in enumerate(lengths)]
        room = replace(passes(student[1], 3 * max(lengths)), never_alone=True)
        sizes = [batch.inputs["input_ids"].shape for batch in room.batches(texts)]
        assert min(rows for rows, _ in sizes) >= 2, (trial, lengths)
        assert sum(rows for rows, _ in sizes) == len(texts)
        assert max(rows * width for rows, width in sizes) <= 3 * max(lengths)


def test_a_norm_that_fails_on_one_sample_is_found_without_a_trace() -> None:
    class Net(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.layer = norm, nn.Linear(4, 4)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.norm(self.layer(rows))

    row = {"rows": torch.ones(1, 4)}
    for norm, fails in ((nn.BatchNorm1d(4), True), (nn.LayerNorm(4), False)):
        model = Net(norm).eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert fails_alone(model, row) == fails
        assert not model.training
        assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    wide = Net(nn.BatchNorm1d(2))
    assert not fails_alone(wide, {"rows": torch.ones(1, 2, 4)})
