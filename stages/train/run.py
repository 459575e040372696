"""One training run, from where it stands to the end.

It is steps, checkpoints, validation and the student.
"""

import json
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ...storage.errors import IntegrityError, Stopped, UsageError
from ...storage.files.local import LocalFiles
from ...storage.joined import open_store
from ...storage.snapshots.snapshot import Snapshot, load_snapshot
from ...storage.store.store import Store
from ..audit.every_row import check_rows
from ..loader.samples import Cursor, Samples, Step, in_company, steps
from ..recipe.fields import Split, extremes
from ..recipe.run_folder import ADAPTER, STUDENT, TRAINED
from ..recipe.sections import Loss
from ..workers.job import Job
from .experts import left_out
from .features import feature_snapshots, find_features, group_notes
from .record import Record
from .scalars import Board, loss_scalars, step_scalars
from .speed import Meter
from .teachers import find_teachers, partner_snapshots

if TYPE_CHECKING:
    from torch import nn

    from ..loader.prefetch import Prefetch
    from .together.means import StepResult
    from .trainer import Trainer

HISTORY_POINTS = 200


class Run:
    """One arm's training, from where it stands to the end; of several ranks each has one.

    What the ranks decide they decide alike: of numbers that all have, or of what the first one
    tells.
    """

    def __init__(self, job: Job, files: LocalFiles, loss: Loss) -> None:
        with job.clock.span("start"):
            from .checkpoints import Checkpoints

        self._job, self._files, self._ranks = job, files, job.ranks
        self._train, self._loss = job.train, loss
        with job.clock.span("disk"):
            store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
            self._teacher_dir = store.teacher_dir(job.teacher_id)
            self._snapshots = self._asked(store)
            self._partners = partner_snapshots(job, store, self._snapshots) if self._soft else {}
            asked = [*self._snapshots.values(), *self._partners.values()]
            asked += feature_snapshots(job, loss, store)
            self._held = check_rows(store, asked, job, lenient=self._train.audit == "warn")
            self._samples, self._validation = self._open(store, "train"), None
            if "validation" in self._snapshots:
                self._validation = self._open(store, "validation")
            self._lengths = self._samples.lengths()
        epochs = self._train.epochs
        self._stop_samples = None if epochs is None else max(1, round(epochs * len(self._samples)))
        self._total = self._train.tokens or max(1, round((epochs or 0) * self._lengths.tokens))
        self._checkpoints = Checkpoints(files, job.ranks)
        self._record = Record()
        with job.clock.span("start"):
            self._trainer = self._prepared(store)
        with job.clock.span("disk"):
            self._audit(store)

    def _asked(self, store: Store) -> dict[Split, Snapshot]:
        """What is learnt from, validated on and judged on, while no training is paid for yet."""
        return {
            split: load_snapshot(store, name)
            for split, name in self._job.snapshots.items()
            if split != "validation" or self._train.evaluate_every_tokens is not None
        }

    def _open(self, store: Store, split: Split) -> Samples:
        snapshot = self._snapshots[split]
        features = find_features(self._job, self._loss, store, snapshot, files=self._files)
        teachers = None
        if self._soft:
            beside = self._partners.get(split)
            teachers = find_teachers(self._job, store, snapshot, beside, files=self._files)
        return Samples(
            store,
            snapshot,
            soft=self._soft,
            seed=self._job.recipe.run.seed,
            features=features,
            teachers=teachers,
        )

    @property
    def _read(self) -> list[Snapshot]:
        """What is learnt from and validated on."""
        read = [one.snapshot for one in (self._samples, self._validation) if one is not None]
        return read + [one for split, one in self._partners.items() if split != "test"]

    @property
    def _soft(self) -> bool:
        """Whether the teacher's targets are learnt from, at some time at least."""
        return extremes(self._loss.soft_weight)[1] > 0

    def _prepared(self, store: Store) -> "Trainer":
        """The student on its device, checked, as the last checkpoint has it; its speed's meter."""
        from ..models.device import device_and_dtype
        from ..models.students.student import check_vocabulary
        from .flops import ModelFlops, Peak
        from .together.root import within
        from .together.student import packed, placed
        from .trainer import Trainer

        job, train = self._job, self._train
        check_vocabulary(job.recipe, self._teacher_dir)
        device, dtype = device_and_dtype(job.student)
        job.progress.say(f"loading the student ({job.arm})")
        model, root = placed(job, self._teacher_dir, device=device, dtype=dtype)
        self._check_lengths(model)
        self._left_out = left_out(model.config.get_text_config())
        for note in self._left_out:
            job.progress.say(note)
        work = partial(
            packed,
            job=job,
            loss=self._loss,
            samples=self._samples,
            store=store,
            files=self._files,
            lengths=self._extremes(),
            dtype=dtype,
        )
        passes = within(root, model, work)
        for note in group_notes(passes.group, self._lengths, train):
            job.progress.say(note)
        trainer = Trainer(
            model,
            packing=passes,
            loss=self._loss,
            train=train,
            dtype=dtype,
            ranks=self._ranks,
            root=root,
        )
        if done := self._checkpoints.steps():
            trainer.load_state(self._checkpoints.tensors(done[-1]))
            self._record = Record.of(self._checkpoints.state(done[-1]))
            job.progress.say(f"going on after step {done[-1]}")

        def counted(model: "nn.Module") -> ModelFlops:
            return ModelFlops.of(model, head=passes.head_weight(model), example=passes.example)

        peak, flops = Peak.at(device, dtype), within(root, model, counted)
        self._meter = Meter(self._record.speed, flops, peak, devices=self._ranks.count)
        return trainer

    def _extremes(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest sample that is trained on or validated."""
        read = [self._lengths, *([self._validation.lengths()] if self._validation else [])]
        return min(one.shortest for one in read), max(one.longest for one in read)

    def _audit(self, store: Store) -> None:
        """Refuse rows whose text, tokens and targets do not belong together, before any step."""
        from ..audit.before_training import audit_rows, fit_of
        from ..audit.every_row import check_places, check_vocabulary

        model: Any = self._trainer.model
        vocab_size = getattr(model.config.get_text_config(), "vocab_size", 1)  # 1: images
        for snapshot in self._read:
            check_vocabulary(store, snapshot, self._held, vocab_size=vocab_size)
        if self._soft:
            check_places(store, self._read, self._job, lenient=self._train.audit == "warn")
        fit = fit_of(self._job.recipe, self._teacher_dir, vocab_size=vocab_size, soft=self._soft)
        try:
            read = [self._samples.snapshot, *filter(None, [self._partners.get("train")])]
            notes = [note for snapshot in read for note in audit_rows(store, snapshot, fit)]
        except IntegrityError as error:
            if self._train.audit == "refuse":
                raise
            notes = [f"audit: {error}"]
        for note in notes:
            self._job.progress.say(note)

    def _check_lengths(self, model: Any) -> None:
        """Refuse samples that do not fit into the student or a row, before any step."""
        from ..models.inputs.reads import check_length

        longest = self._lengths.longest
        check_length(longest, model, "the longest sample has")
        most = self._train.row_tokens
        if most is not None and longest > most:
            raise UsageError(
                f"train.row_tokens: {most} is shorter than the longest sample "
                f"({longest} tokens). Set it to {longest} or more, or leave it out."
            )

    def train(self) -> tuple[int, int]:
        """Train to the end and write the student; samples and tokens of this process."""
        from .together.smaller import OutOfMemory, leave

        samples, tokens = self._consumed, self._record.cursor.tokens
        try:
            self._loop()
            self._finish()
        except Stopped:
            self._save()
            raise
        except OutOfMemory as error:
            leave(self._files, error)
            raise
        return self._consumed - samples, self._record.cursor.tokens - tokens

    @property
    def _consumed(self) -> int:
        return self._record.cursor.epoch * len(self._samples) + self._record.cursor.sample

    def _loop(self) -> None:
        from ..loader.prefetch import Prefetch

        job, tokens = self._job, self._record.cursor.tokens
        job.progress.start(total=self._total, unit="tokens", done=min(tokens, self._total))
        saved = time.monotonic()
        with Board(job, self._files, tokens) as board:
            self._validate(board)
            with (
                closing(self._steps()) as read,
                Prefetch(read, self._passes, clock=job.clock) as feed,
            ):
                began, waited = time.monotonic(), 0.0
                for step in feed:
                    result = self._step(step, feed)
                    seconds = time.monotonic() - began
                    waiting = feed.waited_seconds - waited
                    self._note(step, result, board, seconds=seconds, waited=waiting)
                    self._validate(board)
                    if self._due(time.monotonic() - saved):
                        self._save()
                        saved = time.monotonic()
                    job.agreed_stop()
                    began, waited = time.monotonic(), feed.waited_seconds
            self._validate(board, last=True)

    def _due(self, seconds: float) -> bool:
        """Whether a checkpoint is to be written, so many seconds after the one before."""
        every = self._train.checkpoint_every_steps
        if every is not None and self._record.cursor.step % every == 0:
            return True
        late = seconds >= self._train.checkpoint_every_seconds
        return self._ranks.any(self._ranks.first and late)

    def _steps(self) -> Generator[Step, None, None]:
        found = steps(
            self._samples,
            self._record.cursor,
            tokens_per_step=self._train.tokens_per_step,
            stop_tokens=self._train.tokens,
            stop_samples=self._stop_samples,
        )
        return in_company(found) if self._trainer.never_alone else found

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
        # The curve has about HISTORY_POINTS points, evenly over the tokens.
        # There is one where a slot begins.
        before, after = (
            min(cursor.tokens, self._total) * (HISTORY_POINTS - 1) // self._total
            for cursor in (record.cursor, step.after)
        )
        record.cursor = step.after
        record.scored_tokens += step.scored_tokens
        this = meter.add(step, positions=result.positions, seconds=seconds, waited=waited)
        if not record.history or before < after:
            rates = {"learning_rate": result.learning_rate, "grad_norm": result.grad_norm}
            losses = {"tokens": step.after.tokens} | result.losses.parts()
            record.history.append(losses | rates | result.scheduled)
            meter.point(step.after.tokens)
        elif result.grad_norm > record.history[-1]["grad_norm"]:
            # Of the steps without a point of their own the largest norm is kept: spikes are short.
            point = record.history[-1]
            point["grad_norm_most"] = max(result.grad_norm, point.get("grad_norm_most", 0.0))
        with self._job.clock.span("disk"):
            shown = {name: this.rates[name] for name in ("tokens_per_second", "mfu")}
            board.write(step.after.tokens, step_scalars(result) | shown)
        note = f"loss {result.losses.loss:.4f}, {meter.note(this)}"
        self._job.progress.advance(step.tokens, tokens=step.tokens, note=note)

    def _validate(self, board: Board, *, last: bool = False) -> None:
        """Validate if the record says it is due, so a run stopped in between makes up for it."""
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
                passes, between_passes=self._job.agreed_stop, clock=self._job.clock
            )
        self._say_if_smaller(size)
        point = {"step": record.cursor.step, "tokens": tokens, **losses.parts()}
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
        """Write the student (the best where validated, else the last), then `train.json`."""
        from .together.student import made_whole

        self._save()
        record, trainer, disk = self._record, self._trainer, self._job.clock.span("disk")
        if record.best is not None and record.best["step"] != record.cursor.step:
            with disk:
                trainer.load_weights(self._checkpoints.tensors(record.best["step"]))
        plain: nn.Module | None = None
        if trainer.sharded:
            with disk:
                plain = made_whole(self._job, self._teacher_dir, trainer.model)
        self._ranks.by_first(lambda: self._write(plain))
        self._ranks.any(False)  # the first rank may keep the store where that is told: it goes last

    def _write(self, plain: "nn.Module | None") -> None:
        """The first rank's part of `_finish`. `plain`: a sharded student, gathered."""
        from ..models.students.saving import save_student

        record, trainer, job = self._record, self._trainer, self._job
        parameters = sum(weight.numel() for weight in trainer.model.parameters())
        trained = sum(weight.numel() for weight in trainer.weights().values())
        lora, ranks = job.student.lora, self._ranks.count
        held = "fsdp2" if trainer.sharded else "ddp"
        with job.clock.span("disk"):
            saved = save_student(
                trainer.model if plain is None else plain,
                job.recipe,
                teacher_dir=self._teacher_dir,
                folder=self._files.path(STUDENT),
                adapter=self._files.path(ADAPTER) if lora and lora.keep_adapter else None,
            )
        for note in saved.notes:
            job.progress.say(f"student: {note}")
        summary = {
            "arm": job.arm,
            "samples": self._consumed,
            "epochs": round(self._consumed / len(self._samples), 4),
            **self._meter.summary(),
            "snapshot": job.snapshots["train"],
            # An adapter is merged into the weights: it adds none.
            "parameters": parameters - (trained if lora else 0),
            "trained_parameters": trained,
            "saved_dtype": saved.dtype,
            "notes": [*self._left_out, *saved.notes],
            **({"ranks": ranks, "sharding": held} if ranks > 1 else {}),
        } | record.summary()
        self._files.put_if_absent(TRAINED, json.dumps(summary, indent=1).encode() + b"\n")
