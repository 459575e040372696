"""Measuring the arms: one model at a time over all held-out rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...storage.errors import UsageError
from ...storage.joined import open_store
from ...storage.tables.soft_targets import SoftTargets
from ..targets.alignment import predicting_positions, scored_tokens
from ..targets.spec import wanted
from ..workers.clock import Clock
from ..workers.job import Job
from .answers import Quiz
from .held_out import HeldOut

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..models.classifier import Inputs
    from .metrics import Tally
    from .views import ArmViews, Views

Arms = dict[str, Callable[[], "nn.Module"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What came of the arms."""

    views: "Views"
    """Distributions and single tokens, for the report."""
    tallies: dict[str, "Tally"] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    """Of the students, where they were asked."""
    gradients: dict[str, dict[str, float | int | None] | None] = field(default_factory=dict)
    """Of the student before and after training, sparse against full."""


def measure_arms(
    job: Job, held_out: HeldOut, students: Arms, *, quiz: Quiz | None, found: Measured
) -> None:
    """All arms, one model at a time, into `found`."""
    with job.clock.span("start"):
        import torch

        from ..models.student import merged

    questions = len(quiz.questions) if quiz else 0
    total = held_out.rows * (held_out.scored + len(students)) + questions * len(students)
    job.progress.start(total=total, unit="rows")
    if held_out.scored:
        found.tallies["teacher"] = _teacher_tally(job, held_out, found.views)
    for arm, load in students.items():
        with job.clock.span("start"):
            model: Any = merged(load())
            model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        found.tallies[arm] = _student_tally(
            job, held_out, model, view=found.views.arm(arm), arm=arm
        )
        if quiz:
            with job.clock.span("model"):
                found.answers[arm] = quiz.answers(model, job)
        if arm != "baseline":
            with job.clock.span("model"):
                found.gradients[arm] = _gradient(job, held_out, model, arm=arm)
        del model  # before the next one is loaded


def _teacher_tally(job: Job, held_out: HeldOut, views: "Views") -> "Tally":
    import torch

    from .metrics import Tally, measure_teacher

    tally = Tally()
    for row in held_out.targets():
        job.stop.check()
        with job.clock.span("disk"):
            targets = SoftTargets.from_row(row).normalised()
        with job.clock.span(
            "model"
        ):  # no pass of the teacher, but the same sums over its vocabulary
            measures = measure_teacher(targets, torch.as_tensor(_asked(row)))
        views.add_teacher(row, targets)
        tally.add(row["prompt_key"], measures | _accuracy(row, measures))
        job.progress.advance(tokens=row["span_tokens"], note="teacher")
    return tally


def _student_tally(
    job: Job, held_out: HeldOut, model: "nn.Module", *, view: "ArmViews", arm: str
) -> "Tally":
    from .metrics import Tally

    tally = Tally()
    inputs = None
    if job.recipe.run.task == "classification":
        from ..models.classifier import Inputs

        store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
        inputs = Inputs.of(model, store.teacher_dir(job.teacher_id))
    for row in held_out.targets():
        job.stop.check()
        if inputs is None:
            _measure_row(model, row, tally, view=view, clock=job.clock)
        else:
            with job.clock.span("model"):
                _measure_text(model, inputs, row, tally=tally)
        job.progress.advance(tokens=row["span_tokens"], note=arm)
    return tally


def _measure_row(
    model: "nn.Module", row: dict[str, Any], tally: "Tally", *, view: "ArmViews", clock: Clock
) -> None:
    import torch

    from ..models.head import hidden_states, split_head
    from .metrics import chunk_tokens, measure

    head = split_head(model)
    ids = torch.as_tensor(row["token_ids"]).long().to(head.weight.device)
    _check_fits(model, ids, head.vocab_size)
    with clock.span("disk"):
        targets = SoftTargets.from_row(row).normalised() if "logprobs" in row else None
    with torch.inference_mode():
        with clock.span("model"):
            states = hidden_states(model, input_ids=ids[None])[0]
        states = states[predicting_positions(row["start"], row["span_tokens"])]
        following = scored_tokens(ids, row["start"], row["span_tokens"])
        step = chunk_tokens(head.vocab_size)
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            reference = None if targets is None else targets.positions(part)
            with clock.span("model"):
                logits = head.logits(states[part])
                measures = measure(logits, following[part], reference)
            tally.add(row["prompt_key"], measures)
            view.add(row, start, measures=measures, logits=logits)


def _measure_text(model: Any, inputs: "Inputs", row: dict[str, Any], *, tally: "Tally") -> None:
    import torch

    from ..models.classifier import class_logits
    from .metrics import measure

    _check_fits(
        model, torch.as_tensor(row["token_ids"]), model.get_input_embeddings().num_embeddings
    )
    targets = SoftTargets.from_row(row).normalised()
    with torch.inference_mode():
        tensors = {
            name: tensor.to(model.device)
            for name, tensor in inputs.tensors([row["token_ids"]]).items()
        }
        label = torch.as_tensor(_asked(row)).to(model.device)
        measures = measure(class_logits(model, tensors), label, targets)
    tally.add(row["prompt_key"], measures | _accuracy(row, measures))


def _asked(row: dict[str, Any]) -> np.ndarray:
    """[N] what the targets of a row are about: the tokens of its span, or the class of its text."""
    if "label" in row:
        return np.array([row["label"]], np.int64)
    tokens: np.ndarray = scored_tokens(row["token_ids"], row["start"], row["span_tokens"])
    return tokens


def _accuracy(
    row: dict[str, Any], measures: dict[str, "torch.Tensor"]
) -> dict[str, "torch.Tensor"]:
    """How often the best class is the gold one; of text, that would be how often the next token is guessed."""
    return {"accuracy": measures["correct"]} if "label" in row else {}


def _gradient(
    job: Job, held_out: HeldOut, model: "nn.Module", *, arm: str
) -> dict[str, float | int | None] | None:
    """How far the recipe's targets turn the gradient of the soft loss, as training begins or as it ends.

    None where there is no such loss, or no choice of targets (black-box, classification,
    soft_weight 0), or where
    `evaluate.gradient_tokens` is 0.
    """
    import torch

    from ..loader.packing import Packing
    from ..losses.objective import aim_at
    from ..models.head import split_head
    from .gradients import compare_gradients

    loss, score = job.recipe.loss, job.recipe.score
    objective = aim_at(loss, 0.0 if arm == "student_before" else 1.0).objective
    asked = score is not None and objective is not None and job.recipe.evaluate.gradient_tokens > 0
    if not asked or held_out.classified or not held_out.scored:
        return None
    assert score is not None
    assert objective is not None
    vocab_size = split_head(model).vocab_size
    packing = Packing(
        tokens_per_pass=1,
        shared_rows=False,
        unstored_temperature=loss.unstored_temperature,
        vocab_size=vocab_size,
    )
    kept = wanted(score, vocab_size)
    job.progress.say(f"gradient of sparse against full targets ({arm})")
    try:
        return compare_gradients(
            model, _first_rows(job, held_out), kept=kept, objective=objective, packing=packing
        )
    except torch.OutOfMemoryError:
        job.progress.say("out of memory: the gradient, three times the weights, is left out")
        return None


def _first_rows(job: Job, held_out: HeldOut) -> Iterator[dict[str, Any]]:
    """Rows until they hold `evaluate.gradient_tokens`."""
    left = job.recipe.evaluate.gradient_tokens
    for row in held_out.targets():
        job.stop.check()
        yield row
        left -= row["span_tokens"]
        if left <= 0:
            return


def _check_fits(model: "nn.Module", ids: "torch.Tensor", vocab_size: int) -> None:
    """Refuse a row that the student cannot read, before an embedding does so in its own words."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        raise UsageError(
            f"student: reads at most {limit} tokens (max_position_embeddings), a held-out row has "
            f"{len(ids)}. Lower data.window_tokens or generate.max_tokens, or take a student with "
            "a longer context."
        )
    if int(ids.max()) >= vocab_size:
        raise UsageError(
            f"student: its vocabulary has {vocab_size} ids, but a held-out row contains token "
            f"{int(ids.max())}. Choose a student with the teacher's tokenizer and at least its "
            "vocabulary."
        )
