"""Rows in which the teacher looks further than a student that is to match its attention can see."""

from collections.abc import Iterator
from pathlib import Path

from ...stages.ledger.books import Books
from ...stages.recipe.features import layers_for
from ...stages.recipe.sections import Recipe
from .attention import config_attention
from .resolve import Bound
from .student_config import student_blocks


def unseen_by_student(recipe: Recipe, bound: Bound, books: Books, student: Path | None) -> str:
    """What to say of rows longer than a window of the student that is narrower than the teacher's.

    It is empty where there are no such rows.

    Args:
        recipe: The recipe.
        bound: Its teacher; where it is not here, training says the same before its first step.
        books: After `choose_generations`.
        student: Folder of an existing student; None: fresh weights, or not here yet.
    """
    for path, teacher, block, window in _narrower(recipe, bound, student):
        ((rows, longest),) = books.index.rows(f"""
            SELECT count(*), max(tokens) FROM chosen WHERE NOT held_out
            AND tokens > {window} AND tokens <= {bound.binding.context_tokens}""")
        if rows:
            return (
                f"{path}: block {block} of the student sees tokens less than {window} away, layer "
                f"{teacher} of the teacher further, and {rows:,} of the rows to train on have "
                f"more, the longest {longest}: KL is infinite where the teacher looks at what the "
                "student cannot see. Choose layers of which the student's sees as much, or match: "
                "relations."
            )
    return ""


def _narrower(
    recipe: Recipe, bound: Bound, folder: Path | None
) -> Iterator[tuple[str, int, int, int]]:
    """The pairs of layers whose student sees less than the teacher.

    Of each it gives its entry, the teacher's layer, the student's block and its window.
    """
    entries = [(n, a) for n, a in enumerate(recipe.loss.features) if a.match == "attention"]
    if recipe.score is None or recipe.train is None or not entries or bound.teacher is None:
        return
    found = student_blocks(recipe, bound, folder)
    if found is None or recipe.train.snapshot is not None:
        return
    blocks, mine = found
    theirs = config_attention(bound.teacher.folder, "teacher.model")
    for number, asked in entries:
        stored = layers_for(asked, recipe.score.features)
        for teacher, block in asked.pairs(stored, blocks):
            window, sees = mine.window(block), theirs.window(teacher)
            if window is not None and (sees is None or sees > window):
                yield f"loss.features.{number}", teacher, block, window
