"""What a recipe's task makes of a student."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...recipe.sections import Recipe
from ...recipe.tasks import module_of

if TYPE_CHECKING:
    from ..loading import ModelKind


def kind_of(recipe: Recipe, teacher_dir: Path) -> "ModelKind":
    """That of a student of this teacher."""
    room = __package__.rpartition(".")[0]
    kind: ModelKind = module_of(recipe.run.task, room).student_kind(teacher_dir)
    return kind
