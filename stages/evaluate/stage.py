"""Stage `evaluate`: teacher and students on the same held-out tokens, one model in memory at a time.

The teacher is never loaded: its numbers come from the stored targets. Rows go through a model one by one and its logits
a chunk of tokens at a time, so memory grows with one row and not with the held-out set. `evaluation.json` is written
last: that it exists means that the evaluation is done.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...storage.errors import UsageError
from ...storage.files.local import LocalFiles
from ...storage.joined import open_store
from ...storage.snapshots.snapshot import Snapshot, load_snapshot
from ...storage.store.store import Store
from ...storage.tables.soft_targets import SoftTargets
from ..models.classes import names_in
from ..targets.alignment import predicting_positions, scored_span, scored_tokens
from ..targets.spec import wanted
from ..workers.clock import Clock
from ..workers.job import Job, StageResult
from .answers import Quiz, prepare_quiz

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..models.classifier import Inputs
    from .metrics import Tally
    from .views import ArmViews, Views

Arms = dict[str, Callable[[], "nn.Module"]]

NUMBERS = (
    "cross_entropy",
    "perplexity",
    "kl_teacher",
    "tv_teacher",
    "acceptance",
    "top1_agreement",
    "ece",
    "rows",
    "tokens",
)
"""What is known of an arm; null where it is not."""

_SPAN = {
    "soft_targets": ("key", "prompt_key", "generation_key", "token_ids", "span_start", "span_tokens"),
    "generations": ("prompt_key", "key", "token_ids", "prompt_tokens"),
}
_TARGETS = ("kind", "k", "ids", "logprobs", "tail_logprob", "token_logprob", "entropy")


def run(job: Job) -> StageResult:
    """Measure every arm on the held-out rows; write `evaluation.json` into the student's training run.

    Raises:
        UsageError: nothing is held out, or a student cannot read the held-out rows.
    """
    started = time.monotonic()
    store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
    classified = job.recipe.run.task == "classification"
    held_out = HeldOut(store, load_snapshot(store, job.snapshots["test"]), job.clock, classified=classified)
    if not held_out.rows:
        what = "held-out row has a gold label" if classified and held_out.snapshot.rows else "held-out rows"
        raise UsageError(
            f"data.holdout: no {what}, so nothing to evaluate on. Set data.holdout higher, or to 0: no evaluation."
        )
    with job.clock.span("start"):
        quiz = prepare_quiz(job, store, held_out.spans())
        found = Measured(views=_views(job, held_out, store))
        students = _students(job, store)
    _measure_arms(job, held_out, students, quiz=quiz, found=found)
    content = _content(job, held_out, found, quiz=quiz)
    content["seconds"] = round(time.monotonic() - started, 3)
    encoded = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    files = LocalFiles(job.train_dirs["student"])
    with job.clock.span("disk"):
        files.replace("evaluation.json", encoded.encode())  # in place of one that was asked for differently
    measured = content["measured_on"]
    return StageResult(rows=measured["rows"], tokens=measured["tokens"], details={"results": content["results"]})


class HeldOut:
    """The rows of the test snapshot: soft targets, or (black-box) generations."""

    def __init__(self, store: Store, snapshot: Snapshot, clock: Clock, *, classified: bool = False) -> None:
        """`classified`: texts with their classes; those without a gold label are left out, they judge nobody."""
        self._store, self.classified, self._clock = store, classified, clock
        self.snapshot = snapshot
        self.scored = snapshot.table == "soft_targets"
        self.rows = sum(row["label"] is not None for row in self._read("label")) if classified else snapshot.rows
        """How many rows are held out."""

    def spans(self) -> Iterator[dict[str, Any]]:
        """Rows with prompt_key, generation_key, token_ids, start and span_tokens."""
        return map(_with_span, self._read(*_SPAN[self.snapshot.table]))

    def targets(self) -> Iterator[dict[str, Any]]:
        """`spans` with what is stored of the teacher's distribution, where it is."""
        more = _TARGETS if self.scored else ()
        if self.classified:
            found = self._read(*_SPAN[self.snapshot.table], *more, "label")
            return (_with_span(row) for row in found if row["label"] is not None)
        return map(_with_span, self._read(*_SPAN[self.snapshot.table], *more))

    def references(self) -> set[tuple[str, int]]:
        """Kinds of reference targets and their entries per position."""
        return {(row["kind"], row["k"]) for row in self._read("kind", "k")} if self.scored else set()

    def _read(self, *columns: str) -> Iterator[dict[str, Any]]:
        for shard in self.snapshot.shards:
            rows = self._store.rows(self.snapshot.table, {shard.sha256: shard.rows}, columns)
            yield from self._clock.each("disk", rows)


def _with_span(row: dict[str, Any]) -> dict[str, Any]:
    """One form for both tables."""
    if "span_start" in row:
        return row | {"start": row["span_start"]}
    start, span = scored_span(row["prompt_tokens"], len(row["token_ids"]))
    return row | {"generation_key": row["key"], "start": start, "span_tokens": span}


def _students(job: Job, store: Store) -> Arms:
    """The student as training begins, and what became of it."""
    from ..models.student import initial_student, load_student

    teacher_dir = store.teacher_dir(job.teacher_id)
    classes = (names_in(teacher_dir),) if job.recipe.run.task == "classification" else ()
    arms: Arms = {"student_before": partial(initial_student, job.recipe, teacher_dir)}
    for arm in ("baseline", "student"):
        if arm in job.train_dirs:
            arms[arm] = partial(load_student, job.train_dirs[arm] / "student", *classes)
    return arms


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


def _views(job: Job, held_out: HeldOut, store: Store) -> "Views":
    """Where what the report shows is gathered; it has the lengths already."""
    from ..models.token_text import Pieces
    from .views import Views

    score, teacher_dir = job.recipe.score, store.teacher_dir(job.teacher_id)
    kept = None
    if score is not None and held_out.scored and not held_out.classified:
        kept = wanted(score, max(k for _, k in held_out.references()))
    views = Views(kept=kept, pieces=Pieces.of_folder(teacher_dir))
    for row in held_out.spans():
        views.add_length(len(row["token_ids"]) if held_out.classified else row["span_tokens"])
    return views


def _measure_arms(job: Job, held_out: HeldOut, students: Arms, *, quiz: Quiz | None, found: Measured) -> None:
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
        found.tallies[arm] = _student_tally(job, held_out, model, view=found.views.arm(arm), arm=arm)
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
        with job.clock.span("model"):  # no pass of the teacher, but the same sums over its vocabulary
            measures = measure_teacher(targets, torch.as_tensor(_asked(row)))
        views.add_teacher(row, targets)
        tally.add(row["prompt_key"], measures | _accuracy(row, measures))
        job.progress.advance(tokens=row["span_tokens"], note="teacher")
    return tally


def _student_tally(job: Job, held_out: HeldOut, model: "nn.Module", *, view: "ArmViews", arm: str) -> "Tally":
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


def _measure_row(model: "nn.Module", row: dict[str, Any], tally: "Tally", *, view: "ArmViews", clock: Clock) -> None:
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

    _check_fits(model, torch.as_tensor(row["token_ids"]), model.get_input_embeddings().num_embeddings)
    targets = SoftTargets.from_row(row).normalised()
    with torch.inference_mode():
        tensors = {name: tensor.to(model.device) for name, tensor in inputs.tensors([row["token_ids"]]).items()}
        label = torch.as_tensor(_asked(row)).to(model.device)
        measures = measure(class_logits(model, tensors), label, targets)
    tally.add(row["prompt_key"], measures | _accuracy(row, measures))


def _asked(row: dict[str, Any]) -> np.ndarray:
    """[N] what the targets of a row are about: the tokens of its span, or the class of its text."""
    if "label" in row:
        return np.array([row["label"]], np.int64)
    tokens: np.ndarray = scored_tokens(row["token_ids"], row["start"], row["span_tokens"])
    return tokens


def _accuracy(row: dict[str, Any], measures: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """How often the best class is the gold one; of text, that would be how often the next token is guessed."""
    return {"accuracy": measures["correct"]} if "label" in row else {}


def _gradient(job: Job, held_out: HeldOut, model: "nn.Module", *, arm: str) -> dict[str, float | int | None] | None:
    """How far the recipe's targets turn the gradient of the soft loss, as training begins or as it ends.

    None where there is no such loss, or no choice of targets (black-box, classification, soft_weight 0), or where
    `evaluate.gradient_tokens` is 0.
    """
    import torch

    from ..loader.packing import Packing
    from ..models.head import split_head
    from ..train.trainer import aim_at
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
        return compare_gradients(model, _first_rows(job, held_out), kept=kept, objective=objective, packing=packing)
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
            f"student: reads at most {limit} tokens (max_position_embeddings), a held-out row has {len(ids)}. "
            "Lower data.window_tokens or generate.max_tokens, or take a student with a longer context."
        )
    if int(ids.max()) >= vocab_size:
        raise UsageError(
            f"student: its vocabulary has {vocab_size} ids, but a held-out row contains token {int(ids.max())}. "
            "Choose a student with the teacher's tokenizer and at least its vocabulary."
        )


def _content(job: Job, held_out: HeldOut, found: Measured, *, quiz: Quiz | None) -> dict[str, Any]:
    """What `evaluation.json` holds."""
    tallies = found.tallies
    results = {arm: _result(tallies.get(arm), held_out) for arm in ("teacher", *found.answers, *tallies)}
    if quiz and quiz.scored:
        for arm, score in quiz.scores(found.answers).items():
            results[arm]["answers"] = score
    others = [arm for arm in ("student_before", "baseline") if arm in tallies]
    return {
        "id": job.evaluation_id,
        "results": results,
        "differences": {arm: tallies["student"].minus(tallies[arm]) for arm in others},
        "reliability": {arm: tally.reliability() for arm, tally in tallies.items()},
        "gradient": found.gradients if any(found.gradients.values()) else None,
        "measured_on": _measured_on(held_out, tallies["student"]),
        "arms": {arm: folder.name for arm, folder in job.train_dirs.items()},
        "answers": quiz.about() if quiz and quiz.scored else None,
        "samples": quiz.samples(found.answers) if quiz else [],
        "views": found.views.content(),
    }


def _result(tally: "Tally | None", held_out: HeldOut) -> dict[str, Any]:
    """An arm's numbers; all null for a teacher of whom no distribution is stored."""
    numbers: dict[str, Any] = dict.fromkeys(NUMBERS)
    return numbers if tally is None else numbers | tally.results() | {"rows": held_out.rows}


def _measured_on(held_out: HeldOut, tally: "Tally") -> dict[str, Any]:
    from .metrics import BINS

    references = sorted(held_out.references())
    return {
        "snapshot": held_out.snapshot.id,
        "table": held_out.snapshot.table,
        "rows": held_out.rows,
        "prompts": tally.units,
        "tokens": tally.tokens,
        "reference": "+".join(dict.fromkeys(kind for kind, _ in references)) or None,
        "k": min((k for _, k in references), default=None),
        "kl_is_lower_bound": any(kind != "full" for kind, _ in references),
        "ece_bins": BINS,
        "of": "texts" if held_out.classified else "tokens",
    }
