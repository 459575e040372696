"""What the files of an initial student say before it is loaded.

They say its dtype, and where no adapter can go.

No torch: the plan asks too.
"""

import re
from collections import Counter
from math import prod
from pathlib import Path

from ....storage.errors import UsageError
from ...recipe.sections import Recipe
from ...recipe.stages import needed
from ..fit.config import config_facts
from ..fit.files import read_json
from ..fit.tensors import StoredTensor, stored_tensors

_FIELD = "student.model"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_IN_A_LAYER = re.compile(r"\.\d+\.")
_OUTPUT = "lm_head"
"""The usual name of the output layer. Its weight is in no file where it is the input embedding."""


def stored_dtype(folder: Path) -> str:
    """What most of a model's weights are stored in; float32 where that is no type of training."""
    stored: Counter[str] = Counter()
    for tensor in stored_tensors(folder, where=_where(folder)).values():
        stored[tensor.dtype] += prod(tensor.shape)
    if stored:
        return _DTYPES.get(max(stored, key=lambda name: stored[name]), "float32")
    config = read_json(folder / "config.json", _FIELD)
    said = config_facts(config, where=_where(folder)).dtype
    return said if said is not None and said in _DTYPES.values() else "float32"


def refuse_lora(recipe: Recipe, folder: Path) -> None:
    """Refuse an adapter that the files of the student show to be impossible, before it is loaded.

    Raises:
        UsageError: target_modules names nothing that is there, or one of two layers that share a
            weight.
    """
    lora = needed(recipe.student, "student").lora
    if lora is None or isinstance(lora.target_modules, str):
        return
    tensors = stored_tensors(folder, where=_where(folder))
    _refuse_absent(lora.target_modules, tensors)
    _refuse_tied(lora.target_modules, tensors, folder)


def _refuse_absent(targets: list[str], tensors: dict[str, StoredTensor]) -> None:
    modules = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    # transformers joins and splits weights of experts when it loads them: names say little.
    if not modules or any("expert" in name for name in tensors) or _OUTPUT in targets:
        return
    if any(f".{module}".endswith(f".{target}") for module in modules for target in targets):
        return
    matrices = {m for m in modules if len(tensors[f"{m}.weight"].shape) == 2}
    inside = {m.rpartition(".")[2] for m in matrices if _IN_A_LAYER.search(m)}
    raise UsageError(
        f"student.lora.target_modules: the student has no module {' or '.join(targets)}. Name some "
        f"of {', '.join(sorted(inside))}, or write all-linear."
    )


def _refuse_tied(targets: list[str], tensors: dict[str, StoredTensor], folder: Path) -> None:
    """The embeddings of a student whose input and output share them.

    Only what the files show: a single matrix with a row for each id. The rest is seen when the
    student is loaded, before its first step.
    """
    config = read_json(folder / "config.json", _FIELD)
    facts = config_facts(config, where=_where(folder))
    matrices = [
        name
        for name, tensor in tensors.items()
        if tensor.shape[:1] == (facts.rows,)
        and name.endswith(".weight")
        and not _IN_A_LAYER.search(name)
    ]
    if len(matrices) != 1 or not facts.tied:
        return
    module = matrices[0].removesuffix(".weight")
    for target in targets:
        if target == _OUTPUT or f".{module}".endswith(f".{target}"):
            raise UsageError(
                f"student.lora.target_modules: {target} shares its weight with another layer (tied "
                f"weights: {matrices[0]} is the only one of {folder.name} with a row for each id); "
                "merged into it, the update would change both. Leave it out."
            )


def _where(folder: Path) -> str:
    return f"{_FIELD}: {folder}"
