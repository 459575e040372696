"""A plan's lines: what each stage has, what it lacks, and why."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...stages.recipe.fields import Arm, Split
from ...storage.snapshots.snapshot import Snapshot
from .resolve import Bound
from .teachers import BoundTeacher

State = Literal["done", "to do", "waits"]


@dataclass(kw_only=True, slots=True)
class StagePlan:
    """One line of the plan."""

    name: str
    state: State
    planned: int = 0
    committed: int = 0
    rejected: int = 0
    pending: int = 0
    tokens: int = 0
    tokens_to_do: int = 0
    """Of the pending rows; an upper bound where they are still to be written."""
    usd_to_do: float | None = None
    """What an endpoint takes for the pending rows, about. None: nobody asks for money, or no prices
    are known."""
    prompts_priced: bool = True
    """Whether it has the prompts, whose tokens an endpoint's first answers tell."""
    bytes_to_do: int = 0
    """Estimate of what they will take on disk."""
    equal: int = 0
    """Texts that are not planned: another one has the same tokens and stands for them."""
    why: str = ""
    lengths: dict[str, Any] = field(default_factory=dict)
    """The limit of data that is read, and how many rows and tokens were cut and rejected."""
    sources: dict[str, int] = field(default_factory=dict)
    """Of the committed rows, those that a read-only source serves, by its name."""


def equal_texts(count: int) -> str:
    """Why fewer texts are scored than there are."""
    return f"{count} equal to others, scored once"


@dataclass(kw_only=True, slots=True)
class Plan:
    """All lines, and what the stages need to know of one another."""

    bound: Bound
    write: bool
    """Whether models may be downloaded and hashes remembered."""
    teachers: tuple[BoundTeacher, ...] = ()
    """In the recipe's order; of the first, `bound`."""
    stages: list[StagePlan] = field(default_factory=list)
    train_dirs: dict[Arm, Path] = field(default_factory=dict)
    snapshots: dict[Split, Snapshot] = field(default_factory=dict)
    partners: dict[Split, Snapshot] = field(default_factory=dict)
    """Of several teachers, the rows of the samples beside the first one's."""
    features: Snapshot | None = None
    """The features that the loss needs; None: it needs none, or they are not all there."""
    embeddings: str = ""
    """Id of the matrix of the teacher's embeddings that the loss needs; empty: it needs none."""
    settings: dict[Arm, dict[str, Any]] = field(default_factory=dict)
    evaluation_id: str = ""
    unread: str = ""
    """What to say of rows that the student cannot read, or see as far as it must; empty: it can."""
    warning: str = ""
    """What people should know before anything else, if there is any. It is the first note too."""
    notes: tuple[str, ...] = ()
    """What people should know of the run: a sentence each."""
    sources: dict[str, str] = field(default_factory=dict)
    """Read-only sources by their names in the recipe: what each is, in which version."""

    def note(self, *sentences: str) -> None:
        """Say something more, each once."""
        self.notes = tuple(dict.fromkeys((*self.notes, *sentences)))

    def line(self, name: str) -> StagePlan:
        """The line of a stage that the recipe has."""
        return next(line for line in self.stages if line.name == name)

    def teacher_of(self, line: str) -> BoundTeacher:
        """Whose line of `score` it is; of other lines the first teacher."""
        return next((one for one in self.teachers if one.line == line), self.teachers[0])

    def stage(self, name: str) -> StagePlan | None:
        """The line of a stage, None where the recipe has no such stage."""
        return next((line for line in self.stages if line.name == name), None)
