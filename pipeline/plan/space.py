"""What rows take on disk that are still to be made, and whether there is room for them."""

import shutil
from pathlib import Path

from ...stages.ledger.features import feature_bytes
from ...stages.recipe.features import captured
from ...stages.recipe.sections import Recipe
from ...stages.targets.spec import reference, target_bytes, wanted
from ...storage.credentials import as_written
from ...storage.files.opening import open_files
from ..printing.numbers import size
from .features import teacher_widths
from .lines import Plan, StagePlan
from .resolve import Bound


def add_unwritten(
    line: StagePlan, recipe: Recipe, bound: Bound, *, pending: int, held_out: int
) -> None:
    """Add to a teacher's line of `score` the targets of texts that are still to be written.

    Each text is taken to be as long as it may be, so this is the most that they can be.

    Args:
        line: The line.
        recipe: The recipe, with the teacher of the line.
        bound: What its names stand for.
        pending: How many texts are to be written.
        held_out: How many of them are judged on: those are stored whole.
    """
    if recipe.generate is None or recipe.score is None:
        return
    score, vocab_size = recipe.score, bound.binding.vocab_size
    widths = teacher_widths(recipe, bound)
    features = sum(feature_bytes(one, widths) for one in captured(score.features) if widths)
    trained = target_bytes(wanted(score, vocab_size)) + features
    judged = target_bytes(reference(score, vocab_size))
    most = recipe.generate.max_tokens
    line.tokens_to_do += pending * most
    line.bytes_to_do += int(most * ((pending - held_out) * trained + held_out * judged))


def space_notes(recipe: Recipe, plan: Plan) -> list[str]:
    """What to say where the store's disk may be full before all rows are made."""
    root = open_files(recipe.storage.dir).root
    needed = sum(line.bytes_to_do for line in plan.stages if line.state != "done")
    if not isinstance(root, Path):  # of an object store nobody knows what is left
        return []
    folder = next(path for path in (root, *root.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return []
    return [
        f"disk: the rows to come take up to about {size(needed)}, and {size(free)} are free where "
        f"the store is ({as_written(recipe.storage.dir)}). A run ends where the disk is full, and "
        "goes on once there is room. Name a larger place as storage.dir, or store less: score.k, "
        "score.features, generate.max_tokens"
    ]
