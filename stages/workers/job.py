"""What a stage is handed and what it hands back.

It is handed the recipe, a progress line and a stop flag; it hands back a result.
"""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...storage.store.stopping import stop_signals, stop_statements, stopped_by
from ..recipe.engines import Generate
from ..recipe.fields import Arm, Split
from ..recipe.kinds import Score
from ..recipe.sections import Recipe, Student, Train
from ..recipe.stages import needed
from .clock import Clock
from .ranks import Ranks


class Progress(Protocol):
    """Where a stage says how far it is; `pipeline/run/progress.py` shows it."""

    def start(self, *, total: int, unit: str, done: int = 0) -> None:
        """Begin a bar of `total` units, of which `done` were there before."""

    def advance(self, units: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """Count units and tokens done; `note` stands at the end of the line."""

    def others(self, units: int = 1) -> None:
        """Count units that other workers did meanwhile."""

    def wrote(self, *, rejects: int, size: int) -> None:
        """Rows rejected and bytes committed by this process, so far."""

    def say(self, text: str) -> None:
        """One line of its own."""


class StopFlag:
    """Set by the first signal that asks to stop; stages look at it between units of work."""

    def __init__(self, *, agreed: bool = False) -> None:
        """Begin without a signal.

        `agreed`: other processes must stop at the same place, so `Job.agreed_stop` alone looks at
        it.
        """
        self._agreed = agreed
        self.number = 0
        """The signal that came; 0: none."""

    def listen(self) -> None:
        """Turn the signals that ask to stop into this flag (main thread only)."""
        for number in stop_signals():
            signal.signal(number, self._hear)

    def _hear(self, number: int, _: object) -> None:
        self.number = self.number or number
        stop_statements()

    def check(self) -> None:
        """Raise `Stopped` if a signal came, and this process may stop by itself."""
        if self.number and not self._agreed:
            raise stopped_by(self.number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One stage's work."""

    recipe: Recipe
    progress: Progress
    stop: StopFlag
    clock: Clock = field(default_factory=Clock)
    """Told what the time is spent on; the worker puts its seconds into the result's details."""
    ranks: Ranks = field(default_factory=Ranks)
    """Who does this stage together with this process, for train and evaluate."""
    data_id: str = ""
    """Name of the inputs record: which prompts, in which split."""
    teacher_id: str = ""
    """Identity of the teacher (`models/identity.py`); its tokenizer and config are in the store
    under this name."""
    author_id: str = ""
    """Identity of who wrote the generations: the teacher, another model, or the tokenizer of given
    text."""
    earlier_author_id: str = ""
    """Of given text: an author of an earlier rule, whose equal rows serve."""
    day: str | None = None
    """What a chat template that reads the clock is told."""
    context_tokens: int = 0
    """Tokens that the teacher (data) or the author of the text (generate, score) reads at once."""
    arm: Arm = "student"
    train_dirs: dict[Arm, Path] = field(default_factory=dict)
    """Arm -> folder of its training run; for train and evaluate."""
    evaluation_id: str = ""
    """Hash of what `evaluate` is asked for; kept in its result, so that the plan knows whether it
    still holds."""
    snapshots: dict[Split, str] = field(default_factory=dict)
    """Split -> snapshot id; for train and evaluate."""
    partners: dict[Split, str] = field(default_factory=dict)
    """Split -> id of the snapshot with the rows of the other teachers of its samples; of several
    teachers, for train and evaluate."""
    teachers: dict[str, str] = field(default_factory=dict)
    """Of several teachers, in the recipe's order: name -> identity."""
    features_id: str = ""
    """Snapshot of the features that the loss needs, where it needs some; for train."""
    journal: Path | None = None
    """Where generate and score note the rows in flight (`journal.py`); a name of their own if
    None."""

    def agreed_stop(self) -> None:
        """Raise `Stopped` on every rank if a signal came to one of them.

        All ranks call it at the same places, as after each step: one that left alone would leave
        the others in a collective. A process that is alone looks at its own flag.
        """
        if self.ranks.count == 1:
            self.stop.check()
        elif number := self.ranks.most(self.stop.number):
            raise stopped_by(number)

    @property
    def generate(self) -> Generate:
        """The recipe's section; the stage `generate` has one."""
        return needed(self.recipe.generate, "generate")

    @property
    def score(self) -> Score:
        """The recipe's section; the stage `score` has one."""
        return needed(self.recipe.score, "score")

    @property
    def student(self) -> Student:
        """The recipe's section; whoever trains or judges a student has one."""
        return needed(self.recipe.student, "student")

    @property
    def train(self) -> Train:
        """The recipe's section; whoever trains or judges a student has one."""
        return needed(self.recipe.train, "train")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What a stage did, this time."""

    rows: int = 0
    tokens: int = 0
    rejected: int = 0
    left: int = 0
    """Rows that a budget had nothing for."""
    details: dict[str, Any] = field(default_factory=dict)
