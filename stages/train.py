"""Stage `train`: a student learns from a snapshot. Steps, checkpoints, validation, and the folder it ends up in.

A run that was stopped or killed goes on from its last checkpoint and sees what an undisturbed run would have seen. In
the run's folder: `checkpoints/` (the last and the best), `tensorboard/`, `student/`, and last `train.json`, whose
existence means done.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..storage.errors import IntegrityError, Stopped, UsageError
from ..storage.files import LocalFiles
from ..storage.snapshot import load_snapshot
from ..storage.store import Store
from .board import Board, loss_scalars, step_scalars
from .job import Arm, Job, Split, StageResult
from .kept import wanted
from .samples import Cursor, Samples, Step, steps
from .schedules import extremes
from .sections import Loss, Recipe

if TYPE_CHECKING:
    from .batches import Packing
    from .classes import ClassPasses
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
    lists = ("history", "validation")
    return StageResult(rows=now[0], tokens=now[1], details={k: v for k, v in summary.items() if k not in lists})


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
    seconds: float = 0.0
    """In steps: reading included, validation and checkpoints not."""
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)


class _Run:
    """One arm's training, from where it stands to the end."""

    def __init__(self, job: Job, files: LocalFiles) -> None:
        from .checkpoints import Checkpoints

        self._job, self._files, self._train = job, files, job.recipe.train
        store = Store.open(job.recipe.storage.dir)
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
        self._trainer = self._prepared()
        self._audit(store)

    def _open(self, store: Store, split: Split) -> Samples:
        snapshot = load_snapshot(store, self._job.snapshots[split])
        soft, seed = extremes(self._loss.soft_weight)[1] > 0, self._job.recipe.run.seed
        return Samples(store, snapshot, soft=soft, seed=seed, classified=self._classified)

    def _prepared(self) -> "Trainer":
        """The student on its device, checked, with the state of the last checkpoint."""
        from .student import check_vocabulary, initial_student
        from .trainer import Trainer, device_and_dtype

        recipe = self._job.recipe
        check_vocabulary(recipe, self._teacher_dir)
        self._job.progress.say(f"loading the student ({self._job.arm})")
        device, dtype = device_and_dtype(recipe.student)
        model: Any = initial_student(recipe, self._teacher_dir).to(device)
        self._check_context(model.config.get_text_config())
        packing = self._class_passes(model) if self._classified else self._packing(model)
        if self._train.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer = Trainer(model, packing=packing, loss=self._loss, train=self._train, dtype=dtype)
        if done := self._checkpoints.steps():
            trainer.load_state(self._checkpoints.tensors(done[-1]))
            state = self._checkpoints.state(done[-1])
            self._record = Record(**state | {"cursor": Cursor(**state["cursor"])})
            self._job.progress.say(f"going on after step {done[-1]}")
        return trainer

    def _audit(self, store: Store) -> None:
        """Refuse rows whose text, tokens and targets do not belong together, before any step."""
        from .audit_rows import audit_rows, fit_of

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

    def _packing(self, model: Any) -> "Packing":
        from .batches import Packing, packs_apart
        from .head import check_head, split_head

        check_head(model)
        shared = packs_apart(model)
        if not shared:
            self._job.progress.say("this architecture mixes packed samples: each gets a row of its own")
        score, vocab_size = self._job.recipe.score, split_head(model).vocab_size
        return Packing(
            tokens_per_pass=self._train.tokens_per_pass,
            row_tokens=self._train.row_tokens,
            shared_rows=shared,
            kept=wanted(score, vocab_size) if score is not None else None,
            unstored_temperature=self._loss.unstored_temperature,
            vocab_size=vocab_size,
        )

    def _class_passes(self, model: Any) -> "ClassPasses":
        from .classes import ClassPasses, Inputs

        inputs = Inputs.of(model, self._teacher_dir)
        vocab_size = model.get_input_embeddings().num_embeddings
        return ClassPasses(tokens_per_pass=self._train.tokens_per_pass, inputs=inputs, vocab_size=vocab_size)

    @property
    def _classified(self) -> bool:
        return self._job.recipe.run.task == "classification"

    def _check_context(self, config: Any) -> None:
        """Refuse samples that the student cannot read, before any step."""
        longest, limit = self._lengths.longest, getattr(config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise UsageError(
                f"student: reads at most {limit} tokens (max_position_embeddings), the longest sample has {longest}. "
                "Lower data.window_tokens or generate.max_tokens, or take a student with a longer context."
            )
        if self._train.row_tokens is not None and longest > self._train.row_tokens:
            raise UsageError(
                f"train.row_tokens: {self._train.row_tokens} is shorter than the longest sample ({longest} tokens). "
                f"Set it to {longest} or more, or leave it out."
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
        job, record, train = self._job, self._record, self._train
        job.progress.start(total=self._total, unit="tokens", done=min(record.cursor.tokens, self._total))
        saved = time.monotonic()
        with Board(self._files.path("tensorboard"), record.cursor.tokens) as board:
            self._validate(board)
            began = time.monotonic()
            for step in self._steps():
                result = self._step(step)
                seconds = time.monotonic() - began
                record.seconds += seconds
                self._note(step, result)
                board.write(step.after.tokens, step_scalars(result) | {"tokens_per_second": step.tokens / seconds})
                self._validate(board)
                every = train.checkpoint_every_steps
                due = every is not None and record.cursor.step % every == 0
                if due or time.monotonic() - saved >= train.checkpoint_every_seconds:
                    self._save()
                    saved = time.monotonic()
                job.stop.check()
                began = time.monotonic()
            self._validate(board, last=True)

    def _steps(self) -> Any:
        return steps(
            self._samples,
            self._record.cursor,
            tokens_per_step=self._train.tokens_per_step,
            stop_tokens=self._train.tokens,
            stop_samples=self._stop_samples,
        )

    def _step(self, step: Step) -> "StepResult":
        tokens_per_pass = self._trainer.tokens_per_pass
        done = step.after.tokens / self._total
        result = self._trainer.step(step, done=done, between_passes=self._job.stop.check)
        if self._trainer.tokens_per_pass < tokens_per_pass:
            self._job.progress.say(f"out of memory: passes now hold {self._trainer.tokens_per_pass} tokens")
        return result

    def _note(self, step: Step, result: "StepResult") -> None:
        """Bring the record up to the end of a step."""
        record = self._record
        slots = [min(c.tokens, self._total) * (HISTORY_POINTS - 1) // self._total for c in (record.cursor, step.after)]
        record.cursor = step.after
        record.scored_tokens += step.scored_tokens
        if not record.history or slots[0] < slots[1]:
            rates = {"learning_rate": result.learning_rate, "grad_norm": result.grad_norm}
            record.history.append({"tokens": step.after.tokens, **asdict(result.losses), **rates, **result.scheduled})
        self._job.progress.advance(step.tokens, tokens=step.tokens, note=f"loss {result.losses.loss:.4f}")

    def _validate(self, board: Board, *, last: bool = False) -> None:
        """Validate if it is due: asked of the record, so a run stopped in between makes up for it."""
        record, every = self._record, self._train.evaluate_every_tokens
        if self._validation is None or every is None:
            return
        tokens = record.cursor.tokens
        before = record.validation[-1]["tokens"] if record.validation else 0
        if not (tokens // every > before // every or (last and tokens > before)):
            return
        passes = steps(
            self._validation,
            Cursor(),
            tokens_per_step=self._trainer.tokens_per_pass,
            stop_samples=len(self._validation),
        )
        losses = self._trainer.validate(passes, between_passes=self._job.stop.check)
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
            self._checkpoints.save(record.cursor.step, self._trainer.state(), asdict(record))
            self._checkpoints.keep(record.cursor.step, record.best["step"] if record.best else None)

    def _finish(self) -> None:
        """Write the student (the best where there was validation, else the last), then `train.json`."""
        from .student import save_student, student_tokenizer

        self._save()
        record, trainer = self._record, self._trainer
        if record.best is not None and record.best["step"] != record.cursor.step:
            trainer.load_weights(self._checkpoints.tensors(record.best["step"])["weights"])
        counts = [sum(p.numel() for p in trainer.model.parameters()), sum(map(_numel, trainer.weights().values()))]
        tokenizer = student_tokenizer(self._job.recipe, self._teacher_dir)
        save_student(trainer.model, tokenizer, self._files.path("student"))
        summary = {
            "arm": self._job.arm,
            "steps": record.cursor.step,
            "tokens": record.cursor.tokens,
            "scored_tokens": record.scored_tokens,
            "samples": self._consumed,
            "epochs": round(self._consumed / len(self._samples), 4),
            "seconds": round(record.seconds, 3),
            "tokens_per_second": round(record.cursor.tokens / max(record.seconds, 1e-9), 1),
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
