"""Layers of a teacher that a student begins with.

Here is the config that has these alone, and teachers without any to copy are refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....storage.errors import UsageError
from .misfits import refuse_quantised
from .tensors import tensor_files

FIELD = "student.from_teacher_layers"
COUNT = "num_hidden_layers"
"""What transformers calls the number of layers; `attribute_map` has an architecture's own name."""


def refuse_uncopied(folder: Path, name: str) -> None:
    """Refuse a teacher whose files hold no weights that a student can begin with.

    Args:
        folder: Of the teacher.
        name: As the recipe names it.

    Raises:
        UsageError: they are quantised, or stored by pickle.
    """
    refuse_quantised(folder, field=FIELD, name=name)
    pickled = [path.name for path in tensor_files(folder) if path.suffix != ".safetensors"]
    if pickled:
        raise UsageError(
            f"{FIELD}: {name} has its weights in {pickled[0]}, expected safetensors, from which "
            "single layers can be read. Save the teacher again by transformers."
        )


def refuse_other_architecture(whole: Any, teacher: Any, kind: Any) -> None:
    """Refuse a student that is no model of the teacher's own class.

    Args:
        whole: The teacher's config.
        teacher: The part of it that is about text.
        kind: `model_type` of the student.

    Raises:
        UsageError: another one, or the teacher is a model of several parts.
    """
    if kind != teacher.model_type:
        raise UsageError(
            f"{FIELD}: copies layers of a {teacher.model_type}, and student.config.model_type is "
            f"{kind}. Leave model_type out, or {FIELD}."
        )
    if teacher is not whole:
        raise UsageError(
            f"{FIELD}: the teacher ({whole.model_type}) has a model of text as one of its parts "
            f"({teacher.model_type}), whose layers are not copied alone. Save that part as a model "
            "of its own, and name it as the teacher."
        )


def of_layers(
    base: Mapping[str, Any], changes: Mapping[str, Any], layers: Sequence[int], *, count: str
) -> dict[str, Any]:
    """The teacher's config with these layers alone.

    That is their number, and their entries of each list that has one per layer.

    Args:
        base: The teacher's config.
        changes: `student.config`.
        layers: Of the teacher, ascending.
        count: The architecture's name for the number of layers.

    Raises:
        UsageError: a layer that the teacher has not, or a change that says something else of them.
    """
    total = base.get(count)
    if not isinstance(total, int):
        raise UsageError(
            f"{FIELD}: a {base['model_type']} config does not say how many layers there are "
            f"({count}). Name an existing student, or one with fresh weights."
        )
    if (last := max(layers)) >= total:
        raise UsageError(
            f"{FIELD}: the teacher has layers 0 to {total - 1} (got {last}). Name some of these."
        )
    if changes.get(count, len(layers)) != len(layers):
        raise UsageError(
            f"student.config.{count}: is {changes[count]}, and {FIELD} names {len(layers)} layers. "
            "Leave it out: it follows from them."
        )
    listed = {name for name, value in base.items() if _one_per_layer(name, value, total)}
    for name in sorted(listed & changes.keys()):
        raise UsageError(
            f"student.config.{name}: has an entry for each layer, which are those of the layers "
            "copied. Leave it out."
        )
    kept = {name: [base[name][layer] for layer in layers] for name in listed}
    return {**base, **kept, count: len(layers)}


def _one_per_layer(name: str, value: Any, total: int) -> bool:
    """By its length; lists of tokens (several that end a text) and of classes are none."""
    return (
        isinstance(value, list)
        and len(value) == total
        and "token" not in name
        and name != "architectures"
    )
