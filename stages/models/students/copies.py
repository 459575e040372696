"""A student that begins with layers of its teacher (DistilBERT, TinyBERT).

Of the teacher's files only what is kept is read.

Sanh et al. 2019, arXiv 1910.01108, section 3: initialize the student from the teacher by taking one
layer out of two.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....storage.errors import UsageError, answered
from ...recipe.sections import Recipe
from ...recipe.stages import needed
from ..fit.teacher_layers import FIELD, refuse_uncopied
from ..identity import find_model
from .same_layers import layers_alike

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..loading import ModelKind


def copied_from(recipe: Recipe) -> Path | None:
    """The folder of the teacher's weights, for a student that begins with some, or None."""
    if needed(recipe.student, "student").from_teacher_layers is None:
        return None
    teacher = recipe.teacher
    return find_model(teacher.model, teacher.revision, field="teacher.model", download=True)


def copied_student(
    recipe: Recipe, teacher_dir: Path, folder: Path, kind: "ModelKind"
) -> "PreTrainedModel":
    """The teacher's layers that the recipe names, its embeddings, norms and head, in float32.

    Args:
        recipe: Its student names layers of the teacher.
        teacher_dir: Folder with the teacher's config.json.
        folder: Of its weights.
        kind: What the task makes of a student.

    Raises:
        UsageError: they cannot be copied.
    """
    refuse_uncopied(folder, recipe.teacher.model)
    config, layers = layers_alike(recipe, teacher_dir)
    chosen = needed(recipe.student, "student").from_teacher_layers or ()
    what = f"{FIELD}: layers {', '.join(map(str, chosen))} of {recipe.teacher.model} do not load"
    with answered(what, "Save the teacher again by transformers."):
        return kind.copied(config, kept_tensors(folder, layers, chosen))


def kept_tensors(folder: Path, layers: str, chosen: Sequence[int]) -> "dict[str, Tensor]":
    """The weights that are kept, under the student's names for them.

    Args:
        folder: Of the teacher.
        layers: Name of the list of layers in its model, as `model.layers`; in the files it may
            begin otherwise.
        chosen: Of these layers, ascending.

    Raises:
        UsageError: the files name layers in another way.
    """
    from safetensors import safe_open

    place = {layer: here for here, layer in enumerate(chosen)}
    numbered = re.compile(rf"((?:.*?\.)?{layers.rpartition('.')[2]}\.)(\d+)(\..+)")
    kept, found = {}, set()
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as tensors:
            for name in list(tensors.keys()):
                match = numbered.fullmatch(name)
                if match is None or not _same_list(match[1], f"{layers}."):
                    kept[name] = tensors.get_tensor(name)
                elif (layer := int(match[2])) in place:
                    kept[f"{match[1]}{place[layer]}{match[3]}"] = tensors.get_tensor(name)
                    found.add(layer)
    if lacking := sorted(place.keys() - found):
        raise UsageError(
            f"{FIELD}: the teacher's files have no layer {lacking[0]} by the name of {layers}. "
            "Save the teacher again by transformers."
        )
    return kept


def _same_list(prefix: str, layers: str) -> bool:
    """Files may lack the first words of the model's name (GPT-2), or have more of them."""
    return f".{layers}".endswith(f".{prefix}") or f".{prefix}".endswith(f".{layers}")


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads.

    Beside them a folder may hold the same weights by other names.
    """
    whole = folder / "model.safetensors"
    index = folder / f"{whole.name}.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    return [
        folder / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})
    ]
