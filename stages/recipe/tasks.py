"""The tasks: what models can be distilled to do.

What follows from a task is asked here by every stage, the plan and the cards.

What needs torch is in one module per room that bears the task's name: `models/classification.py`,
`score/classification.py`, `loader/classification.py`, `evaluate/classification.py`. So a new task
is a line here and a module in each of these rooms; with a head of its own, a line of `MODELS` and
one in `storage/tables/heads.py` besides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ...storage.tables.heads import HEADS, Head
from .formats import FORMATS


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The models that have a head, as transformers knows them."""

    table: str
    """Of its classes by model type, without what all tables are called by."""
    suffix: str
    """What the names of these classes end in, and that of the one that chooses among them."""
    use: str
    """What such a model is, in words."""
    words: str
    """What a recipe is pointed to."""


MODELS = {
    "lm": Models(
        table="CAUSAL_LM",
        suffix="ForCausalLM",
        use="a causal language model",
        words="a causal language model",
    ),
    "classes": Models(
        table="SEQUENCE_CLASSIFICATION",
        suffix="ForSequenceClassification",
        use="a text classifier",
        words="a model that transformers loads for sequence classification",
    ),
    "token_classes": Models(
        table="TOKEN_CLASSIFICATION",
        suffix="ForTokenClassification",
        use="a token classifier",
        words="a model that transformers loads for token classification",
    ),
    "masked_lm": Models(
        table="MASKED_LM",
        suffix="ForMaskedLM",
        use="a masked language model",
        words="a masked language model",
    ),
    "image_classes": Models(
        table="IMAGE_CLASSIFICATION",
        suffix="ForImageClassification",
        use="an image classifier",
        words="a model that transformers loads for image classification",
    ),
}
"""By the heads of `storage/tables/heads.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The facts of one task."""

    head: str
    """What a teacher's distribution is over, and where: a row of `MODELS` and of `HEADS`."""
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
    def structure(self) -> Head:
        """What its rows of targets consist of."""
        return HEADS[self.head]

    @property
    def models(self) -> Models:
        """Which models it has."""
        return MODELS[self.head]

    @property
    def labelled(self) -> bool:
        """Whether targets are over classes, with a gold label or none each.

        Else tokens are predicted.
        """
        return self.structure.classes


# Settings of text that is continued. A text that is classified, or of which tokens are hidden, is
# read as a whole, in a row of its own.
_OF_CONTINUED_TEXT = (
    "generate",
    "evaluate.generate",
    "data.chat_template_kwargs",
    "train.row_tokens",
)


# What no stage does with models of images.
_OF_TEXT_MODELS = {
    "score.features": "are taken of models of text alone. Remove them",
    "loss.features": "are matched by models of text alone. Remove them",
    "teacher.adapter": "no stage adds adapters to it yet. Merge it, and name the result",
    "student.lora": "no stage trains adapters of it yet. Train the weights: remove it",
    "student.from_teacher_layers": "no stage copies layers of it yet. Use `model` or `config`",
    "data.max_tokens": "an image has no tokens. Remove it",
}


def _not_of(task: str) -> dict[str, str]:
    """What a task that reads its texts whole has no use for."""
    return dict.fromkeys(_OF_CONTINUED_TEXT, f"has no meaning for {task}. Remove it") | {
        "teacher.trust_remote_code": "only a causal model's code is ever run. Use a model whose "
        "class transformers has",
    }


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
        refused=_not_of("classification"),
        unit="text",
        hub_name="text-classification",
    ),
    "token_classification": Task(
        head="token_classes",
        formats=("tagged",),
        targets=("full",),
        text_alone=False,
        refused=_not_of("token_classification")
        | {"teacher.adapter": "no stage adds adapters to it yet. Merge it, and name the result"},
        unit="word",
        hub_name="token-classification",
    ),
    "masked_lm": Task(
        head="masked_lm",
        formats=("text",),
        text_alone=False,
        refused=_not_of("masked_lm")
        | {
            "teacher.adapter": "no stage adds adapters to a masked language model yet. Merge it, "
            "and name the result",
            "student.lora": "no stage trains adapters of a masked language model yet. Remove it",
            "score.features": "no stage captures features of masked texts yet. Leave them out",
        },
        unit="masked token",
        hub_name="fill-mask",
    ),
    "image_classification": Task(
        head="image_classes",
        formats=("images",),
        targets=("full",),
        text_alone=False,
        refused=_not_of("image_classification") | _OF_TEXT_MODELS,
        unit="image",
        hub_name="image-classification",
    ),
}

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]


def task_of(head: str) -> str:
    """The first task whose models have this head.

    How they are loaded and read is the same in all of them.
    """
    return next(name for name, task in TASKS.items() if task.head == head)


def module_of(task: str, room: str) -> Any:
    """The module of a task in a room, which is a package.

    It is called as `module_of(recipe.run.task, __package__)`.
    """
    return import_module(f"{room}.{task}")
