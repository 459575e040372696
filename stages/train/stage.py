"""Stage `train`: a student learns from a snapshot.

Steps, checkpoints, validation, and the folder it ends up in.

A run that was stopped or killed goes on from its last checkpoint and sees what an undisturbed run
would have seen. In the run's folder: `checkpoints/` (the last and the best), `tensorboard/`,
`student/`, and last `train.json`, whose existence means done.
"""

import json
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from ...storage.errors import IntegrityError, Stopped, UsageError
from ...storage.files.local import LocalFiles
from ...storage.joined import open_store
from ...storage.snapshots.snapshot import load_snapshot
from ...storage.store.store import Store
from ..loader.samples import Cursor, Samples, Step, steps
from ..recipe.fields import Arm, Split, extremes
from ..recipe.sections import Loss, Recipe
from ..targets.spec import wanted
from ..workers.job import Job, StageResult
from .scalars import Board, loss_scalars, open_wandb, step_scalars
from .speed import Meter, Speed

if TYPE_CHECKING:
    from ..loader.classification import ClassPasses
    from ..loader.packing import Packing
    from ..loader.prefetch import Prefetch
    from .trainer import StepResult, Trainer

DONE = "train.json"
HISTORY_POINTS = 200


def run(job: Job) -> StageResult:
    """Train the student of one arm, or say what was done if it is done.

    Raises:
        UsageError: student, snapshot and settings do not fit together.
        Stopped: a signal came; a checkpoint was written.
    """
    files = LocalFiles(job.train_dirs[job.arm])
    now = (0, 0) if files.exists(DONE) else _Run(job, files).train()
    summary = json.loads(files.read(DONE))
    lists = ("history", "validation", "speed")
    return StageResult(
        rows=now[0], tokens=now[1], details={k: v for k, v in summary.items() if k not in lists}
    )


def arm_loss(recipe: Recipe, arm: Arm) -> Loss:
    """The recipe's loss; for the baseline, and where nothing was scored, cross-entropy alone."""
    if arm == "baseline" or recipe.score is None:
        return recipe.loss.model_copy(update={"soft_weight": 0.0, "hard_weight": 1.0})
    return recipe.loss


@dataclass(kw_only=True, slots=True)
class Record:
    """What a run has done so far; kept in each checkpoint."""

    cursor: Cursor = field(default_factory=Cursor)
    scored_tokens: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    speed: Speed = field(default_factory=Speed)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """Of a checkpoint.

        Raises:
            UsageError: another version of Stillroom wrote it.
        """
        try:
            parts = {"cursor": Cursor(**state["cursor"]), "speed": Speed(**state["speed"])}
            return cls(**state | parts)
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"train: another version of Stillroom wrote this run's checkpoints ({error}). "
                "Remove `checkpoints/` from its folder, and it is trained from the start."
            ) from error


class _Run:
    """One arm's training, from where it stands to the end."""

    def __init__(self, job: Job, files: LocalFiles) -> None:
        with job.clock.span("start"):
            from .checkpoints import Checkpoints

        self._job, self._files, self._train = job, files, job.recipe.train
        with job.clock.span("disk"):
            store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
            self._teacher_dir = store.teacher_dir(job.teacher_id)
            self._loss = arm_loss(job.recipe, job.arm)
            self._samples = self._open(store, "train")
            self._lengths = self._samples.lengths()
            self._validation = None
            if self._train.evaluate_every_tokens is not None and "validation" in job.snapshots:
                self._validation = self._open(store, "validation")
        epochs = self._train.epochs
        self._stop_samples = None if epochs is None else max(1, round(epochs * len(self._samples)))
        self._total = self._train.tokens or max(1, round((epochs or 0) * self._lengths.tokens))
        self._checkpoints = Checkpoints(files)
        self._record = Record()
        with job.clock.span("start"):
            self._trainer = self._prepared()
        with job.clock.span("disk"):
            self._audit(store)

    def _open(self, store: Store, split: Split) -> Samples:
        snapshot = load_snapshot(store, self._job.snapshots[split])
        soft, seed = extremes(self._loss.soft_weight)[1] > 0, self._job.recipe.run.seed
        return Samples(store, snapshot, soft=soft, seed=seed, classified=self._classified)

    def _prepared(self) -> "Trainer":
        """The student on its device, checked, with the state of the last checkpoint; and the meter of its speed."""
        from ..models.device import device_and_dtype
        from ..models.head import split_head
        from ..models.student import check_vocabulary, initial_student
        from .flops import ModelFlops, Peak
        from .trainer import Trainer

        recipe = self._job.recipe
        check_vocabulary(recipe, self._teacher_dir)
        self._job.progress.say(f"loading the student ({self._job.arm})")
        device, dtype = device_and_dtype(recipe.student)
        model: Any = initial_student(recipe, self._teacher_dir).to(device)
        self._check_context(model.config.get_text_config())
        packing = self._class_passes(model) if self._classified else self._packing(model, dtype)
        if self._train.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        trainer = Trainer(model, packing=packing, loss=self._loss, train=self._train, dtype=dtype)
        if done := self._checkpoints.steps():
            trainer.load_state(self._checkpoints.tensors(done[-1]))
            self._record = Record.of(self._checkpoints.state(done[-1]))
            self._job.progress.say(f"going on after step {done[-1]}")
        flops = ModelFlops.of(model, head=None if self._classified else split_head(model).weight)
        self._meter = Meter(self._record.speed, flops, Peak.at(device, dtype))
        return trainer

    def _audit(self, store: Store) -> None:
        """Refuse rows whose text, tokens and targets do not belong together, before any step."""
        from ..audit.before_training import audit_rows, fit_of

        model: Any = self._trainer.model
        vocab_size = model.config.get_text_config().vocab_size
        soft = extremes(self._loss.soft_weight)[1] > 0
        fit = fit_of(self._job.recipe, self._teacher_dir, vocab_size=vocab_size, soft=soft)
        try:
            notes = audit_rows(store, self._samples.snapshot, fit)
        except IntegrityError as error:
            if self._train.audit == "refuse":
                raise
            notes = [f"audit: {error}"]
        for note in notes:
            self._job.progress.say(note)

    def _packing(self, model: Any, dtype: Any) -> "Packing":
        from ..loader.packing import Packing, packs_apart
        from ..models.attention import attend_apart
        from ..models.device import uses_triton
        from ..models.head import check_head, split_head

        check_head(model)
        uses_triton(self._train.kernel, split_head(model).weight.device, setting="train.kernel")
        even = self._train.row_tokens is not None
        obstacle = None if even else attend_apart(model, self._lengths.longest, dtype)
        flat = not even and obstacle is None
        shared = flat or packs_apart(model)
        if not shared:
            self._job.progress.say(
                "this architecture mixes packed samples: each gets a row of its own"
            )
        elif obstacle is not None:
            self._job.progress.say(
                f"this student cannot attend within samples of one row ({obstacle}): rows get "
                "padding"
            )
        score, vocab_size = self._job.recipe.score, split_head(model).vocab_size
        return Packing(
            tokens_per_pass=self._train.tokens_per_pass,
            flat=flat,
            row_tokens=self._train.row_tokens,
            shared_rows=shared,
            kept=wanted(score, vocab_size) if score is not None else None,
            unstored_temperature=self._loss.unstored_temperature,
            vocab_size=vocab_size,
            kernel=self._train.kernel,
        )

    def _class_passes(self, model: Any) -> "ClassPasses":
        from ..loader.classification import ClassPasses
        from ..models.classifier import Inputs

        inputs = Inputs.of(model, self._teacher_dir)
        vocab_size = model.get_input_embeddings().num_embeddings
        return ClassPasses(
            tokens_per_pass=self._train.tokens_per_pass, inputs=inputs, vocab_size=vocab_size
        )

    @property
    def _classified(self) -> bool:
        return self._job.recipe.run.task == "classification"

    def _check_context(self, config: Any) -> None:
        """Refuse samples that the student cannot read, before any step."""
        longest, limit = self._lengths.longest, getattr(config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise UsageError(
                f"student: reads at most {limit} tokens (max_position_embeddings), the longest "
                f"sample has {longest}. Lower data.window_tokens or generate.max_tokens, or take "
                "a student with a longer context."
            )
        if self._train.row_tokens is not None and longest > self._train.row_tokens:
            raise UsageError(
                f"train.row_tokens: {self._train.row_tokens} is shorter than the longest sample "
                f"({longest} tokens). Set it to {longest} or more, or leave it out."
            )

    def train(self) -> tuple[int, int]:
        """Train to the end and write the student; samples and tokens of this process."""
        samples, tokens = self._consumed, self._record.cursor.tokens
        try:
            self._loop()
            self._finish()
        except Stopped:
            self._save()
            raise
        return self._consumed - samples, self._record.cursor.tokens - tokens

    @property
    def _consumed(self) -> int:
        return self._record.cursor.epoch * len(self._samples) + self._record.cursor.sample

    def _loop(self) -> None:
        from ..loader.prefetch import Prefetch

        job, record, train = self._job, self._record, self._train
        job.progress.start(
            total=self._total, unit="tokens", done=min(record.cursor.tokens, self._total)
        )
        saved = time.monotonic()
        beside = open_wandb(job, self._files)
        with Board(self._files.path("tensorboard"), record.cursor.tokens, beside=beside) as board:
            self._validate(board)
            with (
                closing(self._steps()) as read,
                Prefetch(read, self._passes, clock=job.clock) as feed,
            ):
                began, waited = time.monotonic(), 0.0
                for step in feed:
                    result = self._step(step, feed)
                    now, waited_by_now = time.monotonic(), feed.waited_seconds
                    self._note(
                        step, result, board, seconds=now - began, waited=waited_by_now - waited
                    )
                    self._validate(board)
                    every = train.checkpoint_every_steps
                    due = every is not None and record.cursor.step % every == 0
                    if due or time.monotonic() - saved >= train.checkpoint_every_seconds:
                        self._save()
                        saved = time.monotonic()
                    job.stop.check()
                    began, waited = time.monotonic(), waited_by_now
            self._validate(board, last=True)

    def _steps(self) -> Generator[Step, None, None]:
        return steps(
            self._samples,
            self._record.cursor,
            tokens_per_step=self._train.tokens_per_step,
            stop_tokens=self._train.tokens,
            stop_samples=self._stop_samples,
        )

    def _passes(self, step: Step) -> Iterator[Any]:
        return self._trainer.passes(step, done=step.after.tokens / self._total)

    def _step(self, step: Step, feed: "Prefetch") -> "StepResult":
        tokens_per_pass = self._trainer.tokens_per_pass
        done = step.after.tokens / self._total
        with self._job.clock.span("model"):
            result = self._trainer.step(
                step, done=done, passes=feed.passes, between_passes=self._job.stop.check
            )
        self._say_if_smaller(tokens_per_pass)
        return result

    def _say_if_smaller(self, tokens_per_pass: int) -> None:
        if self._trainer.tokens_per_pass < tokens_per_pass:
            self._job.progress.say(
                f"out of memory: passes now hold {self._trainer.tokens_per_pass} tokens"
            )

    def _note(
        self, step: Step, result: "StepResult", board: Board, *, seconds: float, waited: float
    ) -> None:
        """Bring the record up to the end of a step, and show it."""
        record, meter = self._record, self._meter
        slots = [
            min(c.tokens, self._total) * (HISTORY_POINTS - 1) // self._total
            for c in (record.cursor, step.after)
        ]
        record.cursor = step.after
        record.scored_tokens += step.scored_tokens
        this = meter.add(step, positions=result.positions, seconds=seconds, waited=waited)
        if not record.history or slots[0] < slots[1]:
            rates = {"learning_rate": result.learning_rate, "grad_norm": result.grad_norm}
            record.history.append(
                {"tokens": step.after.tokens, **asdict(result.losses), **rates, **result.scheduled}
            )
            meter.point(step.after.tokens)
        with self._job.clock.span("disk"):
            shown = {name: this.rates[name] for name in ("tokens_per_second", "mfu")}
            board.write(step.after.tokens, step_scalars(result) | shown)
        note = f"loss {result.losses.loss:.4f}, {meter.note(this)}"
        self._job.progress.advance(step.tokens, tokens=step.tokens, note=note)

    def _validate(self, board: Board, *, last: bool = False) -> None:
        """Validate if it is due: asked of the record, so a run stopped in between makes up for it."""
        record, every = self._record, self._train.evaluate_every_tokens
        if self._validation is None or every is None:
            return
        tokens = record.cursor.tokens
        before = record.validation[-1]["tokens"] if record.validation else 0
        if not (tokens // every > before // every or (last and tokens > before)):
            return
        size = self._trainer.tokens_per_pass
        passes = steps(
            self._validation, Cursor(), tokens_per_step=size, stop_samples=len(self._validation)
        )
        with self._job.clock.span("model"):
            losses = self._trainer.validate(
                passes, between_passes=self._job.stop.check, clock=self._job.clock
            )
        self._say_if_smaller(size)
        point = {"step": record.cursor.step, "tokens": tokens, **asdict(losses)}
        record.validation.append(point)
        board.write(tokens, loss_scalars("validation", losses))
        self._job.progress.say(f"validation after {tokens} tokens: loss {losses.loss:.4f}")
        if record.best is None or losses.loss < record.best["loss"]:
            record.best = point
            self._save()

    def _save(self) -> None:
        """Write a checkpoint and keep none but this and the best."""
        record = self._record
        if record.cursor.step:
            with self._job.clock.span("disk"):
                self._checkpoints.save(record.cursor.step, self._trainer.state(), asdict(record))
                self._checkpoints.keep(
                    record.cursor.step, record.best["step"] if record.best else None
                )

    def _finish(self) -> None:
        """Write the student (the best where there was validation, else the last), then `train.json`."""
        from ..models.student import save_student, student_tokenizer

        self._save()
        record, trainer = self._record, self._trainer
        clock = self._job.clock
        if record.best is not None and record.best["step"] != record.cursor.step:
            with clock.span("disk"):
                trainer.load_weights(self._checkpoints.tensors(record.best["step"])["weights"])
        counts = [
            sum(p.numel() for p in trainer.model.parameters()),
            sum(map(_numel, trainer.weights().values())),
        ]
        with clock.span("tokenizer"):
            tokenizer = student_tokenizer(self._job.recipe, self._teacher_dir)
        with clock.span("disk"):
            lora = self._job.recipe.student.lora
            adapter = (
                self._files.path("adapter") if lora is not None and lora.keep_adapter else None
            )
            save_student(trainer.model, tokenizer, self._files.path("student"), adapter=adapter)
        summary = {
            "arm": self._job.arm,
            "steps": record.cursor.step,
            "tokens": record.cursor.tokens,
            "scored_tokens": record.scored_tokens,
            "samples": self._consumed,
            "epochs": round(self._consumed / len(self._samples), 4),
            **self._meter.summary(),
            "snapshot": self._job.snapshots["train"],
            "best": record.best,
            "parameters": counts[0] - (counts[1] if self._job.recipe.student.lora else 0),
            "trained_parameters": counts[1],
            "history": record.history,
            "validation": record.validation,
        }
        self._files.put_if_absent(DONE, json.dumps(summary, indent=1).encode() + b"\n")


def _numel(tensor: Any) -> int:
    return tensor.numel()
