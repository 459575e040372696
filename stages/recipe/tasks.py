"""The tasks: what models can be distilled to do, and what follows from it wherever a stage, the plan or a card asks.

What needs torch is in one module per room that bears the task's name: `models/classification.py`,
`score/classification.py`, `loader/classification.py`, `evaluate/classification.py`. So a new task
is a line here and a module in each of these rooms.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from .formats import FORMATS


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The facts of one task."""

    head: Literal["lm", "classes"]
    """What a teacher's distribution is over: its vocabulary, at each scored token; or its classes,
    once a text."""
    formats: tuple[str, ...]
    """Values of `data.format`; the first is what a recipe with another one is pointed to."""
    targets: tuple[str, ...] = ()
    """Values of `score.targets`; (): any."""
    text_alone: bool
    """Whether a student can learn without `score`, from text alone."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Settings that it has no use for, by their dotted paths, and what to say of them."""
    unit: str
    """What a number is a mean over, for people; as a plural in `evaluation.json`."""
    hub_name: str
    """Of its models on the Hub, where it is called a pipeline tag or a task category."""

    @property
    def labelled(self) -> bool:
        """Whether a text is read as a whole: one target, and a gold label or none. Else text is continued."""
        return self.head == "classes"


# Settings of text that is continued; a text that has one target is read as a whole, in a row of its
# own.
_OF_CONTINUED_TEXT = (
    "generate",
    "evaluate.generate",
    "data.chat_template_kwargs",
    "train.row_tokens",
)

TASKS: dict[str, Task] = {
    "causal_lm": Task(
        head="lm",
        formats=tuple(sorted(name for name in FORMATS if not FORMATS[name].labelled)),
        text_alone=True,
        unit="token",
        hub_name="text-generation",
    ),
    "classification": Task(
        head="classes",
        formats=("labelled",),
        targets=("full",),
        text_alone=False,
        refused=dict.fromkeys(_OF_CONTINUED_TEXT, "has no meaning for classification. Remove it")
        | {
            "teacher.trust_remote_code": "no classifier's code is ever run. Use one whose class transformers has",
        },
        unit="text",
        hub_name="text-classification",
    ),
}

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]


def module_of(task: str, room: str) -> Any:
    """The module of a task in a room, which is a package: `module_of(recipe.run.task, __package__)`."""
    return import_module(f"{room}.{task}")
