"""Whether a recipe's data, targets and settings are those of its task."""

from typing import Any

from ....storage.errors import UsageError
from ..fields import extremes
from ..sections import Data, Recipe, Train
from ..tasks import TASKS, Task


def lookup(recipe: Recipe, path: str) -> Any:
    """The value at a dotted path, None where a section is absent."""
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def check_task(recipe: Recipe) -> list[tuple[str, str]]:
    """What does not go with the task: (dotted path, message)."""
    name = recipe.run.task
    task = TASKS[name]
    errors = _format(recipe.data.format, name, task) + _targets(recipe, name, task)
    errors += [(path, said) for path, said in task.refused.items() if lookup(recipe, path)]
    if recipe.masks is None and recipe.data.masks != Data.model_fields["masks"].default:
        hiding = " or ".join(other for other in TASKS if TASKS[other].structure.masked)
        errors.append(("data.masks", f"belongs to run.task {hiding}. Remove it"))
    if task.structure.images and recipe.train is not None:
        errors += _steps(recipe.train)
    if recipe.student is not None and recipe.student.factory is not None:
        errors += _made_by_code(recipe, task)
    return errors


def _made_by_code(recipe: Recipe, task: Task) -> list[tuple[str, str]]:
    """What a student of a factory cannot learn or do."""
    fitting = [name for name, one in TASKS.items() if one.structure.whole_text]
    errors = []
    if not task.structure.whole_text:
        message = f"makes students of {' and '.join(fitting)} alone. Use `model` or `config`"
        errors.append(("student.factory", message))
    no_blocks = "nothing is known of the blocks of a student that student.factory makes. Remove {}"
    for path in ("loss.features", "train.gradient_checkpointing"):
        if lookup(recipe, path):
            errors.append((path, no_blocks.format("it" if "train" in path else "them")))
    return errors


def _steps(train: Train) -> list[tuple[str, str]]:
    """Sizes whose defaults count tokens."""
    if "tokens_per_step" in train.model_fields_set:
        return []
    message = "missing: it counts images here, and its default is of tokens. Use 64 to start"
    return [("train.tokens_per_step", message)]


def refuse_without_labels(recipe: Recipe, labels: int) -> None:
    """Refuse a student that learns from labels where none of the rows to train on has one.

    Args:
        recipe: Of a task with labelled texts; without `train` nobody learns.
        labels: How many of these rows have one.

    Raises:
        UsageError: cross-entropy has a weight, or a baseline is asked for.
    """
    if labels or recipe.train is None:
        return
    field = next(name for name in recipe.data.records.columns if name in ("label", "labels"))
    column = recipe.data.columns.get(field, field)
    why = f"no row to train on has a label (column {column!r} of {recipe.data.source})"
    name = f"If there are labels, name their column: data.columns: {{{field}: ...}}"
    if recipe.evaluate.baseline:
        raise UsageError(
            f"evaluate.baseline: {why}, and the baseline learns from labels alone. Set it to "
            f"false. {name}"
        )
    if extremes(recipe.loss.hard_weight)[1] > 0:
        raise UsageError(
            f"loss.hard_weight: {why}, so there is no cross-entropy to weigh. Set it to 0: the "
            f"student learns from the teacher alone. {name}"
        )


def targets_fit(recipe: Recipe) -> bool:
    """Whether the stored targets are some that the task has.

    If they are not, nothing more can be said of them.
    """
    known = TASKS[recipe.run.task].targets
    return recipe.score is None or not known or recipe.score.targets in known


def _format(found: str, name: str, task: Task) -> list[tuple[str, str]]:
    if found in task.formats:
        return []
    if len(task.formats) == 1:
        message = f"{name} reads {task.formats[0]!r} records (got {found!r})"
    else:
        others = " or ".join(other for other in TASKS if found in TASKS[other].formats)
        message = f"{found!r} is for run.task {others}. Set that, or use {task.formats[0]!r}"
    return [("data.format", message)]


def _targets(recipe: Recipe, name: str, task: Task) -> list[tuple[str, str]]:
    if recipe.score is None:
        if task.text_alone:
            return []
        message = (
            "missing: without the teacher's probabilities there is nothing to distil. "
            f"Add score: {{targets: {next(iter(task.targets), 'topk')}}}"
        )
        return [("score", message)]
    if targets_fit(recipe):
        return []
    kinds = " or ".join(map(repr, task.targets))
    message = f"{name} keeps every class: expected {kinds} (got {recipe.score.targets!r})"
    return [("score.targets", message)]
