"""Whether several teachers can teach together, as far as the recipe alone says it."""

from collections import Counter

from ....storage.tables.kinds import STRUCTURES
from ..fields import extremes
from ..kinds import HF, KINDS, VLLM, Score
from ..sections import Loss, OneTeacher, Recipe
from ..tasks import TASKS

MIXED = ("full", "sampled")
"""Targets of which a mixture can be made: of the best entries of two teachers each lacks some."""


def check_teachers(recipe: Recipe) -> list[tuple[str, str]]:
    """What is wrong with `teachers`, and with what only several have: (dotted path, message)."""
    if recipe.teachers and recipe.teacher != recipe.teachers[0].alone:
        message = "there is a section `teacher` too, which says another one. Keep one of the two"
        return [("teachers", message)]
    if not recipe.several:
        return _of_several(recipe.loss)
    errors = _names(recipe.teachers) + _task(recipe) + _not_yet(recipe) + _stores(recipe)
    if recipe.score is None:
        message = "several teach by their distributions. Add a section `score`, or name one teacher"
        errors.append(("teachers", message))
    elif recipe.train is not None:
        errors += _weights(recipe.teachers, recipe.loss)
        errors += _by_entropy(recipe.loss, recipe.score)
        errors += _mixture(recipe.loss, recipe.score.targets)
    return errors


def _of_several(loss: Loss) -> list[tuple[str, str]]:
    """Settings that one teacher has no use for."""
    names = ("teachers", "teacher_weights")
    message = "belongs to several teachers, and this recipe has one. Remove it, or name `teachers`"
    return [(f"loss.{name}", message) for name in names if name in loss.changed]


def _names(teachers: list[OneTeacher]) -> list[tuple[str, str]]:
    counts = Counter(one.name for one in teachers)
    return [
        ("teachers", f"{count} of them are named {name!r}. Give each a name of its own")
        for name, count in counts.items()
        if count > 1
    ]


def _task(recipe: Recipe) -> list[tuple[str, str]]:
    """Fields of `teacher` that the task refuses; of the first it says so itself."""
    refused = TASKS[recipe.run.task].refused
    fields = {path.partition(".")[2]: why for path, why in refused.items() if "teacher." in path}
    return [
        (f"teachers.{number}.{field}", why)
        for number, one in enumerate(recipe.teachers)
        for field, why in fields.items()
        if number and getattr(one, field)
    ]


def _not_yet(recipe: Recipe) -> list[tuple[str, str]]:
    """What one teacher can and several cannot."""
    errors = []
    if recipe.loss.features:
        message = (
            "features are matched of one teacher, and this recipe has several. Leave them out; or "
            "match them in a recipe with one of the teachers, and begin with its student here "
            "(student: {model: 'run:RUN_DIR'})"
        )
        errors.append(("loss.features", message))
    if recipe.train is not None and recipe.train.snapshot is not None:
        message = (
            "a snapshot holds the rows of one teacher, and this recipe has several. Leave it out: "
            "what is stored is not scored again"
        )
        errors.append(("train.snapshot", message))
    return errors


def _stores(recipe: Recipe) -> list[tuple[str, str]]:
    """Stores in a teacher's place stand for one teacher and its data."""
    stores = {recipe.storage.dir, *recipe.storage.sources}
    message = (
        "names a store, which stands for one teacher and its data. Name the models and the data as "
        "the recipe did that filled it: their rows are found, also where the models are gone"
    )
    return [
        (f"teachers.{number}.model", message)
        for number, one in enumerate(recipe.teachers)
        if one.model in stores
    ]


def _weights(teachers: list[OneTeacher], loss: Loss) -> list[tuple[str, str]]:
    """Weights that leave nothing to learn, or nothing to divide by."""
    errors = []
    if not any(extremes(one.weight)[1] for one in teachers):
        errors.append(("teachers", "all weights are 0: nothing to learn from. Set one above 0"))
    if loss.teachers == "sum" and loss.teacher_weights == "fixed":
        return errors
    what = "mixture" if loss.teachers == "mixture" else f"teacher_weights {loss.teacher_weights!r}"
    return errors + [
        (
            f"teachers.{number}.weight",
            f"is 0 {'at some time' if extremes(one.weight)[1] else 'throughout'}, and {what} "
            "divides by the weights of the teachers that a text has. Set it above 0, or remove the "
            "teacher",
        )
        for number, one in enumerate(teachers)
        if extremes(one.weight)[0] == 0
    ]


def _by_entropy(loss: Loss, score: Score) -> list[tuple[str, str]]:
    if loss.teacher_weights != "entropy":
        return []
    if score.engine == VLLM and score.structure.has_tail:
        message = (
            f"weighs by the entropy, of which the best entries of engine {VLLM!r} tell a lower "
            f"bound alone. Use score.engine {HF!r}, score.targets 'full', or 'likelihood'"
        )
        return [("loss.teacher_weights", message)]
    if not score.structure.drawn or extremes(loss.temperature) == (1.0, 1.0):
        return []
    message = (
        "weighs by the entropy at temperature 1, and draws at another one are stored with the "
        "entropy of what is softened. Use loss.temperature 1.0, score.targets 'full', or "
        "'likelihood'"
    )
    return [("loss.teacher_weights", message)]


def _mixture(loss: Loss, targets: str) -> list[tuple[str, str]]:
    if loss.teachers == "sum":
        return []
    if STRUCTURES[targets].drawn and extremes(loss.temperature) != (1.0, 1.0):
        message = (
            "draws are of softened distributions, and their mixture is not the softened mixture. "
            "Use loss.temperature 1.0, or score.targets 'full'"
        )
        return [("loss.teachers", message)]
    if targets in MIXED:
        return []
    kinds = " or ".join(f"score.targets {kind!r}" for kind in KINDS if kind in MIXED)
    message = (
        f"a mixture is not exact of {targets!r} targets: each teacher keeps other entries, and of "
        f"those in the other's tail nobody knows the probability. Use 'sum', or {kinds}"
    )
    return [("loss.teachers", message)]
