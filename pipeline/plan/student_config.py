"""The student as its config says it, before there is a weight of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ...stages.models.attention.by_config import AttentionFacts, attention_facts
from ...stages.models.fit.config import blocks_of, loaded_config
from ...stages.models.fit.files import read_json
from ...stages.models.fit.light import light_transformers
from ...stages.models.fit.parts import text_config
from ...stages.models.students.fresh import fresh_config
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import needed
from .resolve import Bound

T = TypeVar("T")


def of_fresh_student(recipe: Recipe, bound: Bound, read: Callable[[Any], T]) -> T | None:
    """What is read of the config of a student with fresh weights.

    It is None where the teacher, whose config the student gets, is not here.
    """
    if bound.teacher is None:
        return None
    student = needed(recipe.student, "student")
    with light_transformers():
        made = fresh_config(
            bound.teacher.folder,
            student.config or {},
            task=recipe.run.task,
            layers=student.from_teacher_layers,
        )
        return read(made)


def student_blocks(
    recipe: Recipe, bound: Bound, folder: Path | None
) -> tuple[int, AttentionFacts] | None:
    """The student's blocks and its attention.

    They are None where the student, or the teacher whose config it gets, is not here.

    Args:
        recipe: Has a student.
        bound: Its teacher.
        folder: Of an existing student; None: fresh weights, or not here yet.
    """
    if folder is not None:
        with light_transformers():
            raw = read_json(folder / "config.json", "student.model")
            return _blocks(loaded_config(raw, where=f"student.model: {folder}"))
    if needed(recipe.student, "student").model is not None:
        return None
    return of_fresh_student(recipe, bound, _blocks)


def _blocks(config: Any) -> tuple[int, AttentionFacts]:
    return blocks_of(text_config(config)), attention_facts(config)
