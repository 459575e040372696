"""Classes of a model as its config names them, and gold labels by index or by name.

No torch: the plan asks too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....storage.errors import RowError, UsageError
from ....storage.tables.heads import HEADS
from ...recipe.sections import Recipe
from ...recipe.stages import needed
from ...recipe.tasks import MODELS, TASKS, task_of
from .files import read_json

NO_LABEL = -1
"""In place of a gold label where a row has none; Parquet holds null."""


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes of a model with this config.json, in the order of its logits.

    They are empty if its head has none.

    transformers leaves out what is its default: two classes, LABEL_0 and LABEL_1.
    """
    if head_over_classes(config) is None:
        return ()
    named = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return tuple(str(named[index]) for index in sorted(named, key=int))


def head_over_classes(config: Mapping[str, Any]) -> str | None:
    """Which of the heads over classes a model with this config.json has (`Task.head`), or None."""
    names = [str(name) for name in config.get("architectures") or ()]
    over_classes = [head for head in MODELS if HEADS[head].classes]
    fitting = (h for h in over_classes if any(n.endswith(MODELS[h].suffix) for n in names))
    return next(fitting, None)


def names_in(folder: Path, field: str = "teacher.model") -> tuple[str, ...]:
    """`class_names` of the model in a folder, whose weights need not be there.

    `field` is the recipe's, for messages.
    """
    return class_names(read_json(folder / "config.json", field))


def label_index(value: Any, names: Sequence[str]) -> int | None:
    """A record's gold label as the index of its class, or None where it has none.

    Args:
        value: An index, or a class's name; null, an empty cell or -1, under which data sets hide
            the labels of their test splits: no label.
        names: The teacher's classes.

    Raises:
        RowError: no such class.
    """
    if value is None or value == "" or value != value:  # a cell that holds no number is not itself
        return None
    index = _as_index(value, len(names))
    if str(value) in names:
        named = list(names).index(str(value))
        if index not in (None, named):
            raise RowError(
                "unknown_label",
                f"label {value!r} may be the class of that name or the one of that index, which "
                "are two. Give names that are no numbers, in the data and in the teacher's "
                "config.json (id2label)",
            )
        return named
    if index is not None:
        return index
    if _whole(value) == NO_LABEL:
        return None
    raise RowError(
        "unknown_label",
        (
            f"label {value!r} is no class of the teacher. It knows 0 to {len(names) - 1}, or "
            f"{', '.join(names)}; {NO_LABEL} or nothing is no label"
        ),
    )


def _as_index(value: Any, classes: int) -> int | None:
    number = _whole(value)
    return number if number is not None and 0 <= number < classes else None


def _whole(value: Any) -> int | None:
    """The whole number that a cell holds, also as 1.0 or "1.0".

    A column with a gap is one of floats.
    """
    try:
        number = float(value)
        return int(number) if number.is_integer() and not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        return None


def refuse_without_head(config: Mapping[str, Any], model: str, head: str) -> None:
    """Refuse a teacher whose classes were never trained: transformers would give it random ones.

    Args:
        config: Of the teacher, with what its adapter says of classes.
        model: As the recipe names it.
        head: That the task asks for (`Task.head`).

    Raises:
        UsageError: no such head, or one that is not softmax over two classes or more.
    """
    names, has, asked = class_names(config), head_over_classes(config), MODELS[head]
    found = ", ".join(config.get("architectures") or ()) or "no architecture"
    if has != head:
        what = asked.table.lower().replace("sequence_", "").replace("_", " ")
        other = "" if has is None else f", or set run.task to {task_of(has)}"
        raise UsageError(
            f"teacher.model: {model} has no {what} head (config.json names {found}, "
            f"expected one that ends in {asked.suffix}). Fine-tune it on labelled rows first, and "
            f"name the folder of the result{other}."
        )
    kind = config.get("problem_type") or "single_label_classification"
    if len(names) < 2 or kind != "single_label_classification":
        raise UsageError(
            f"teacher.model: {model} has {len(names)} outputs and problem_type {kind!r}, expected "
            "two classes or more of which one is right. Regression and several labels at once "
            "are not supported."
        )


def refuse_other_head(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Refuse a teacher without the trained classes that the task asks for.

    `config` is as for `refuse_without_head`.

    Raises:
        UsageError: it has none, or some that are not softmax over two or more.
    """
    task = TASKS[recipe.run.task]
    if task.labelled:
        refuse_without_head(config, recipe.teacher.model, task.head)


def refuse_other_classes(recipe: Recipe, folder: Path | None, names: Sequence[str]) -> None:
    """Refuse a student that has other classes than its teacher.

    Args:
        recipe: Its student gives changes to the teacher's config, or names a model.
        folder: Of that model; None for fresh weights.
        names: The teacher's classes; (): it has none, and any student will do.

    Raises:
        UsageError: other classes, other in number, or the same in another order.
    """
    if not names:
        return
    student, head = needed(recipe.student, "student"), TASKS[recipe.run.task].head
    if folder is not None:
        found, where = names_in(folder, "student.model"), f"student.model: {student.model}"
        _refuse_other_kind(folder, where, head)
    else:
        overrides = student.config or {}
        given = {"id2label", "num_labels"} & overrides.keys()
        found = class_names({"architectures": [MODELS[head].suffix]} | overrides) if given else ()
        where = "student.config"
    if not found:  # a body without this head gets a new one, of the teacher's classes
        return
    reordered = found != tuple(names) and sorted(found) == sorted(names)
    if len(found) != len(names) or reordered:
        how = "the same in another order" if reordered else f"{len(names)}"
        raise UsageError(
            f"{where} has {len(found)} classes ({', '.join(found)}), the teacher {how} "
            f"({', '.join(names)}). A student learns the teacher's classes one by one: take one "
            "with the same, or one without a classification head."
        )


def _refuse_other_kind(folder: Path, where: str, head: str) -> None:
    """Refuse a student with trained classes of another kind.

    Its head would be taken for one of this kind.
    """
    has = head_over_classes(read_json(folder / "config.json", "student.model"))
    if has not in (None, head):
        raise UsageError(
            f"{where} is {MODELS[str(has)].use}, expected {MODELS[head].words}, or one without a "
            f"classification head. Use one of these, or set run.task to {task_of(str(has))}."
        )
