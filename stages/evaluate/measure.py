"""Measuring the arms: one model at a time over all held-out rows, whatever the task.

Several ranks have the rows dealt out, each with a whole model. What comes of a row is noted, and
the first rank counts it when that row's turn has come. So the numbers do not depend on how many
there are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ...storage.tables.soft_targets import SoftTargets
from ..recipe.run_folder import TRAINED, read_record
from ..recipe.tasks import module_of
from ..workers.job import Job
from .held_out import HeldOut
from .quiz.answers import Quiz

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .metrics import Noted, Tally
    from .views import ArmViews, OfTeacher, Seen, Views

Arms = dict[str, Callable[[], "nn.Module"]]
Row = dict[str, Any]
MeasureRow = Callable[[Row, "Tally", "ArmViews"], None]
"""Counts a row into a student's tally and views."""
Gradient = dict[str, float | int | None] | None
Found = TypeVar("Found")
ROWS_AT_ONCE = 16
"""Of each rank, noted before they are counted."""


class Measuring(Protocol):
    """How a task's rows are measured.

    It is the class of this name in the module that bears the task's name.
    """

    def tally(self) -> "Tally":
        """Where an arm is counted, empty."""

    def outcomes(self, row: Row) -> np.ndarray | None:
        """[N] what is there, at each of a row's targets, and -1 where it is not known.

        It is None where it is known nowhere.
        """

    def named(self, measures: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """The measures of `metrics.measure` where the outcome is known, and the task's own.

        The task's own measures are those that only this task has.
        """

    def of_student(self, model: "nn.Module") -> MeasureRow:
        """How the rows of one student are measured."""

    def gradient(self, model: "nn.Module", arm: str) -> Gradient:
        """How far stored targets turn a student's gradient from that of whole ones.

        It says nothing where there is no choice.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What came of the arms."""

    views: "Views"
    """Distributions and single tokens, for the report."""
    tallies: dict[str, "Tally"] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    """Of the students, where they were asked."""
    gradients: dict[str, Gradient] = field(default_factory=dict)
    """Of the student before and after training, sparse against full."""


def measure_arms(
    job: Job, held_out: HeldOut, students: Arms, *, quiz: Quiz | None, found: Measured
) -> None:
    """All arms, one model at a time, into `found`."""
    with job.clock.span("start"):
        room = module_of(job.recipe.run.task, __package__)
        task: Measuring = room.Measuring(job, held_out)
    questions = len(quiz.questions) if quiz else 0
    if held_out.scored:
        found.tallies["teacher"] = _teacher_tally(job, held_out, task, found.views)
    in_turn = _loads_in_turn(job)
    # The teacher's rows need no pass of a model: counted with the others they would make the time
    # left look short.
    job.progress.start(total=(held_out.rows + questions) * len(students), unit="rows")
    for arm, load in students.items():
        with job.clock.span("start"):
            place = partial(_placed, load)
            model = job.ranks.in_turn(place) if in_turn else place()
            measure_row = task.of_student(model)
        found.tallies[arm] = _student_tally(
            job, held_out, measure_row, task.tally(), view=found.views.arm(arm), arm=arm
        )
        if quiz:
            with job.clock.span("model"):
                found.answers[arm] = quiz.answers(model, job)
        if arm != "baseline":
            # By one rank: sums of gradients depend on their order, and few rows are taken.
            with job.clock.span("model"):
                found.gradients[arm] = job.ranks.by_first(partial(task.gradient, model, arm))
        del model, measure_row  # before the next one is loaded


def _placed(load: "Callable[[], nn.Module]") -> Any:
    import torch

    from ..models.students.lora import merged

    model: Any = merged(load())
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _loads_in_turn(job: Job) -> bool:
    """Whether the ranks of a machine load a student one after another, onto their GPUs.

    One that was sharded while it trained may be too large for the memory of the machine to hold it
    once for each of them.
    """
    import torch

    if job.ranks.count == 1 or not torch.cuda.is_available():
        return False

    def sharded() -> bool:
        trained = read_record(job.train_dirs["student"] / TRAINED)
        return trained.get("sharding") == "fsdp2"

    found: bool = job.ranks.by_first(sharded)
    return found


def _in_order(
    job: Job, held_out: HeldOut, work: Callable[[Row], Found]
) -> Iterator[tuple[int, Found]]:
    """Tokens of each row and what `work` makes of it, in the order of all rows.

    The first rank alone has them.
    """
    ranks = job.ranks
    rows = held_out.targets(ranks)

    def some() -> list[tuple[int, int, Found]]:
        found = []
        for row in islice(rows, ROWS_AT_ONCE if ranks.count > 1 else 1):
            job.stop.check()
            found.append((row["number"], row["span_tokens"], work(row)))
        return found

    while any(parts := ranks.each(some)):
        job.agreed_stop()
        for _, tokens, made in sorted((one for part in parts for one in part), key=_number):
            if ranks.first:
                yield tokens, made


def _number(one: tuple[int, int, Any]) -> int:
    return one[0]


def _teacher_tally(job: Job, held_out: HeldOut, task: Measuring, views: "Views") -> "Tally":
    import torch

    from .metrics import Notes

    def noted(row: Row) -> "tuple[Noted, OfTeacher]":
        notes = Notes()
        with job.clock.span("disk"):
            targets = SoftTargets.from_row(row).normalised()
        # No pass of the teacher, but the same sums over its vocabulary.
        with job.clock.span("model"):
            there = task.outcomes(row)
            known = None if there is None else torch.as_tensor(there)

            measured = partial(_of_itself, task, known)
            said, unit = held_out.said(row, targets), row["prompt_key"]
            if said is None:
                measures = measured(targets)
            else:
                measures = said.count(unit, notes, measured, outcomes=there)
        notes.add(unit, measures)
        return notes.noted, views.of_teacher(row, targets)

    tally = task.tally()
    for tokens, (measures, seen) in _in_order(job, held_out, noted):
        views.add_teacher(seen)
        tally.count(measures)
        job.progress.advance(tokens=tokens, note="teacher")
    views.tell(job.ranks)
    return tally


def _of_itself(
    task: Measuring, known: "Tensor | None", targets: SoftTargets
) -> "dict[str, Tensor]":
    """The measures of a teacher, from its own targets."""
    from .metrics import measure_teacher

    found = measure_teacher(targets, known)
    return found if known is None else task.named(found)


def _student_tally(
    job: Job,
    held_out: HeldOut,
    measure_row: MeasureRow,
    tally: "Tally",
    *,
    view: "ArmViews",
    arm: str,
) -> "Tally":
    """The tally, with all rows of an arm counted."""
    from .metrics import Notes

    def noted(row: Row) -> "tuple[Noted, list[Seen]]":
        measures, seen = Notes(), view.notes()
        measure_row(row, measures, seen)
        return measures.noted, seen.noted

    for tokens, (measures, seen) in _in_order(job, held_out, noted):
        tally.count(measures)
        for one in seen:
            view.count(one)
        job.progress.advance(tokens=tokens, note=arm)
    return tally
