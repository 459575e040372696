"""Whether a student's layers are those of the teacher that it copies.

Both models are built without memory, and compared.

Some architectures make a layer another one by where it stands (dense up to a layer, experts at
every second one). Copied to another place its weights would be read as something else.

No torch until it is asked: the plan asks too.
"""

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....storage.errors import UsageError, answered
from ...recipe.sections import Recipe
from ...recipe.stages import needed
from ..fit.config import loaded_config
from ..fit.files import read_json
from ..fit.teacher_layers import COUNT, FIELD
from .fresh import fresh_config
from .kinds import kind_of

if TYPE_CHECKING:
    from torch import nn

_OWN_PLACE = ("layer_idx", "layer_id", "layer_number", "layer_num", "block_id", "block_index")
"""What architectures call the place of a layer, which is another one in the student."""


def refuse_other_layers(recipe: Recipe, teacher_dir: Path) -> None:
    """Refuse layers that would be others in the student.

    A process of its own compares them where torch is not loaded.

    Args:
        recipe: Its student names layers of the teacher.
        teacher_dir: Folder with the teacher's config.json; weights are not read.

    Raises:
        UsageError: with the layer and what would be another.
    """
    if "torch" in sys.modules:
        layers_alike(recipe, teacher_dir)
        return
    apart = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    try:
        apart.submit(layers_alike, recipe, teacher_dir).result()
    except BaseException:
        for child in active_children():  # a signal does not wait for it
            child.terminate()
        raise
    finally:
        apart.shutdown()


def layers_alike(recipe: Recipe, teacher_dir: Path) -> tuple[Any, str]:
    """The student's config, and the name of the list of layers in the models of both.

    Raises:
        UsageError: a layer would be another in the student, or they are no list of layers.
    """
    student = needed(recipe.student, "student")
    layers, kind = student.from_teacher_layers or (), kind_of(recipe, teacher_dir)
    changes, task = student.config or {}, recipe.run.task
    config = fresh_config(teacher_dir, changes, task=task, layers=layers)
    raw = read_json(teacher_dir / "config.json", "teacher.model")
    what = f"{FIELD}: teacher and student cannot be compared"
    with answered(what, "Name an existing student, or one with fresh weights."):
        theirs = kind.empty(loaded_config(raw, where=f"teacher.model: {teacher_dir}"))
        ours = kind.empty(config)
    name = _list_of_layers(theirs)
    for place, layer in enumerate(layers):
        there, here = (f"{name}.{layer}", f"{name}.{place}")
        found = (
            _facts(theirs.get_submodule(there).named_modules(remove_duplicate=False)),
            _facts(ours.get_submodule(here).named_modules(remove_duplicate=False)),
        )
        _refuse_difference(*found, f"layer {layer} as the student's layer {place}")
    rest = (_facts(_outside(theirs, name)), _facts(_outside(ours, name)))
    _refuse_difference(*rest, "the student")
    return config, name


def _list_of_layers(model: "nn.Module") -> str:
    """The one list of modules, in no other such list, that is as long as the model has layers."""
    from torch import nn

    config: Any = model.config
    total, kind = getattr(config, COUNT, None), config.model_type
    lists: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        found = f"{len(outer)} ({', '.join(outer)})" if outer else "none"
        raise UsageError(
            f"{FIELD}: {kind} has {total} layers, and {found} of its parts is a list of as many, "
            "expected one: its layers share weights or are kept in pieces. Name an existing "
            "student, or one with fresh weights."
        )
    layers = model.get_submodule(outer[0])
    if len([*layers.parameters()]) < len([*layers.named_parameters(remove_duplicate=False)]):
        raise UsageError(
            f"{FIELD}: layers of {kind} share weights, so none can be copied without the others. "
            "Name an existing student, or one with fresh weights."
        )
    return outer[0]


def _outside(model: "nn.Module", layers: str) -> Iterator[tuple[str, "nn.Module"]]:
    """What holds weights and is no layer: embeddings, norms, pooler, head."""
    for name, module in model.named_modules(remove_duplicate=False):
        inside = f"{name}.".startswith(f"{layers}.")
        if not inside and any(True for _ in module.parameters(recurse=False)):
            yield name, module


def _facts(modules: Iterable[tuple[str, "nn.Module"]]) -> dict[str, Any]:
    """Classes, shapes and plain attributes, by name.

    Where a layer stands, and what only training has, are left out.
    """
    found: dict[str, Any] = {}
    for name, module in modules:
        prefix = f"{name}." if name else ""
        found[f"{prefix}class"] = type(module).__name__
        for part in (
            module.named_parameters(recurse=False),
            module.named_buffers(recurse=False),
        ):
            found |= {f"{prefix}{own}": list(tensor.shape) for own, tensor in part}
        if "Dropout" in type(module).__name__:
            continue
        for own, value in vars(module).items():
            if not own.startswith("_") and "dropout" not in own and own not in _OWN_PLACE:
                found |= {f"{prefix}{own}": value} if _plain(value) else {}
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def _refuse_difference(theirs: dict[str, Any], ours: dict[str, Any], what: str) -> None:
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        there, here = theirs.get(name, "absent"), ours.get(name, "absent")
        if there != here:
            raise UsageError(
                f"{FIELD}: {what} would be another one: {name} is {here}, and {there} in the "
                "teacher. Choose other layers, or leave student.config as the teacher has it."
            )
