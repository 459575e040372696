"""A teacher's adapter, by its small files.

It has a kind, must fit the base, and may bring classes.

A classifier's head is trained with the adapter and saved in it (PEFT's `modules_to_save`), often
onto a base that never had one. What its classes are called is in neither file of PEFT's, so it is
read in a config.json beside them, where the base does not say it.

No torch: the plan asks too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....storage.errors import UsageError
from ...recipe.tasks import MODELS, TASKS
from .classes import class_names
from .files import read_json
from .light import class_names_of, light_transformers
from .tensors import StoredTensor, stored_tensors

FIELD = "teacher.adapter"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""Begins the names of an adapter's tensors."""
_OF_CLASSES = "SEQ_CLS"
_PEFT_TASKS = {"lm": "CAUSAL_LM", "classes": _OF_CLASSES}
"""Head of a task -> what PEFT calls the task."""
_ABOUT_CLASSES = ("id2label", "label2id", "problem_type", "pad_token_id")
_HEAD = MODELS["classes"].suffix
_OUTPUTS = ("classifier", "score", "out_proj")
"""How heads call the layer that has a row for each class."""


def adapter_classes(config: Mapping[str, Any], adapter: Path) -> dict[str, Any]:
    """Fields of a base's config that its adapter changes.

    Of a classifier these are its class, and what its classes are called.

    Args:
        config: config.json of the base.
        adapter: Folder of the adapter.

    Raises:
        UsageError: it brings a head over classes, and nothing says what they are called, or says it
            of another number of them.
    """
    about = read_json(adapter / ADAPTER_CONFIG, FIELD)
    if about.get("task_type") != _OF_CLASSES:
        return {}
    rows = _head_rows(adapter)
    fields = _named_beside(adapter)
    if not fields and not class_names(config):
        found = ", ".join(config.get("architectures") or ()) or "no architecture"
        raise UsageError(
            f"{FIELD}: nothing says what the classes of {adapter} are called ({rows or 'some'} of "
            f"them; the teacher's config.json names {found}, and there is no config.json beside "
            "the adapter). Save that of the model it was trained in: "
            f"model.config.save_pretrained({str(adapter)!r})."
        )
    if not fields:
        names, changed = class_names(config), {}
    else:
        changed = fields | {"architectures": [_class_of(config)]}
        names = class_names({**config, **changed})
    if rows is not None and rows != len(names):
        where = f"{adapter}/config.json" if fields else "the teacher's config.json"
        raise UsageError(
            f"{FIELD}: the head in {adapter} has {rows} classes, and {where} names {len(names)} "
            f"({', '.join(names)}). Save beside the adapter the config of the model that it was "
            f"trained in: model.config.save_pretrained({str(adapter)!r})."
        )
    return changed


def refuse_adapter(adapter: Path, base: Path, *, task: str, name: str) -> None:
    """Refuse an adapter that its small files show to be none of this base's for this task.

    Args:
        adapter: Folder of the adapter.
        base: Folder of the teacher.
        task: `run.task`.
        name: The teacher, as the recipe names it.

    Raises:
        UsageError: it is of another task or kind, was made for another model, or its head is
            missing.
    """
    about = read_json(adapter / ADAPTER_CONFIG, FIELD)
    head = TASKS[task].head
    wanted, found = _PEFT_TASKS.get(head), about.get("task_type")
    if wanted is not None and found not in (None, wanted):
        raise UsageError(
            f"{FIELD}: {adapter} is an adapter for {found} (task_type in {ADAPTER_CONFIG}), and "
            f"run.task {task} needs one for {wanted}. Name another, or set run.task to what it "
            "does."
        )
    if head != "classes":
        return
    if (kind := about.get("peft_type")) != "LORA":
        raise UsageError(
            f"{FIELD}: {adapter} is of the kind {kind} (peft_type in {ADAPTER_CONFIG}), expected "
            "LORA. Merge it into the teacher, and name the result as teacher.model."
        )
    tensors = _tensors(adapter)
    if tensors:
        _refuse_other_base(tensors, adapter, base, name=name)
    config = read_json(base / "config.json", "teacher.model")
    if tensors and not _head_of(tensors) and not class_names(config):
        raise UsageError(
            f"{FIELD}: {adapter} has no classification head, and {name} has none either (its "
            "config.json names no class that ends in "
            f"{_HEAD}). Train the adapter with task_type {_OF_CLASSES}, which saves the head with "
            "it (modules_to_save)."
        )


def _tensors(adapter: Path) -> dict[str, StoredTensor]:
    """An adapter's tensors, by the base's names for their modules.

    Of a pickled file there are none, since it has no header to read.
    """
    found = stored_tensors(adapter, where=f"{FIELD}: {adapter}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}


def _head_of(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What an adapter holds of whole modules, and so of the head."""
    return {name: tensor for name, tensor in tensors.items() if "lora_" not in name}


def _head_rows(adapter: Path) -> int | None:
    """How many classes the head in an adapter has; None where that does not show."""
    rows = {
        tensor.shape[0]
        for name, tensor in _head_of(_tensors(adapter)).items()
        # A whole part of the name: DistilBERT has a `pre_classifier` too.
        if name.split(".")[-2:] in [[layer, "weight"] for layer in _OUTPUTS]
        and len(tensor.shape) == 2
    }
    return rows.pop() if len(rows) == 1 else None


def _named_beside(adapter: Path) -> dict[str, Any]:
    """What a config.json beside an adapter says of classes.

    transformers leaves out the names of two without any.
    """
    path = adapter / "config.json"
    if not path.is_file():
        return {}
    said = read_json(path, FIELD)
    names = class_names(said | {"architectures": [_HEAD]})
    found = {name: said[name] for name in _ABOUT_CLASSES if said.get(name) is not None}
    return found | {
        "id2label": {str(index): label for index, label in enumerate(names)},
        "label2id": {label: index for index, label in enumerate(names)},
    }


def _class_of(config: Mapping[str, Any]) -> str:
    """The class of transformers that classifies with a base of this type."""
    with light_transformers():
        table = class_names_of(MODELS["classes"].table)
        found = table.get(str(config.get("model_type")), _HEAD)
    return found if isinstance(found, str) else found[0]


def _refuse_other_base(
    tensors: Mapping[str, StoredTensor], adapter: Path, base: Path, *, name: str
) -> None:
    """Refuse LoRA on layers that the base has not, or has in another size."""
    there = stored_tensors(base, where=f"teacher.model: {name}")
    # transformers joins and splits weights of experts when it loads them: names say little.
    if not there or any("expert" in found for found in there):
        return
    for module, shape in _changed(tensors).items():
        weight = _weight_of(module, there)
        if weight is None or sorted(weight) != sorted(shape):
            has = "is not there" if weight is None else f"is {_times(weight)} there"
            raise UsageError(
                f"{FIELD}: {adapter} was made for another model than {name}: it changes {module} "
                f"({_times(shape)}), which {has}. Name an adapter of this model, or the model of "
                "this adapter."
            )


def _changed(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, int]]:
    """Module -> rows and columns of its weight, as B A has them."""
    down, up = ".lora_A.weight", ".lora_B.weight"
    modules = [name.removesuffix(down) for name in tensors if name.endswith(down)]
    return {
        module: (tensors[module + up].shape[0], tensors[module + down].shape[-1])
        for module in modules
        if module + up in tensors
    }


def _weight_of(module: str, tensors: Mapping[str, StoredTensor]) -> tuple[int, ...] | None:
    """Shape of a module's weight in files.

    There a name may lack the module's first word, or have more words before it.
    """
    for name in filter(None, (module, module.partition(".")[2])):
        for found, tensor in tensors.items():
            if f".{found}".endswith(f".{name}.weight"):
                return tensor.shape
    return None


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
