"""What a model's weight files say of their tensors, read from their headers: types, shapes, names. No torch here.

So the plan can see that an adapter would go onto a weight that two layers share.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....storage.errors import UsageError
from ...recipe.sections import Recipe
from ...recipe.stages import needed
from ..identity import tensor_files

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_IN_A_LAYER = re.compile(r"\.\d+\.")
_OUTPUT = "lm_head"
"""The usual name of the output layer, whose weight is in no file where it is the input embedding."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """By name; none of weights that are stored by pickle, which has no header to read."""
    found: dict[str, StoredTensor] = {}
    for path in tensor_files(folder):
        if path.suffix != ".safetensors":
            return {}
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, about in header.items():
            begin, end = about["data_offsets"]
            found[name] = StoredTensor(about["dtype"], tuple(about["shape"]), end - begin)
    return found


def stored_dtype(folder: Path) -> str:
    """What most of a model's weights are stored in; float32 where that is no type of training."""
    stored: Counter[str] = Counter()
    for tensor in stored_tensors(folder).values():
        stored[tensor.dtype] += tensor.bytes
    if stored:
        return _DTYPES.get(max(stored, key=lambda name: stored[name]), "float32")
    config = _config(folder)
    said = str(config.get("dtype") or config.get("torch_dtype"))
    return said if said in _DTYPES.values() else "float32"


def refuse_tied_lora(recipe: Recipe, folder: Path) -> None:
    """Refuse an adapter on the embeddings of a student whose input and output share them.

    Only what the files show: a single matrix with a row for each id. The rest is seen when the
    student is loaded, before its first step.

    Raises:
        UsageError: target_modules names one of the two.
    """
    lora = needed(recipe.student, "student").lora
    if lora is None or isinstance(lora.target_modules, str):
        return
    config = _config(folder)
    vocab_size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    matrices = [
        name
        for name, tensor in stored_tensors(folder).items()
        if tensor.shape[:1] == (vocab_size,)
        and name.endswith(".weight")
        and not _IN_A_LAYER.search(name)
    ]
    if len(matrices) != 1 or not _tied(config):
        return
    module = matrices[0].removesuffix(".weight")
    for target in lora.target_modules:
        if target == _OUTPUT or f".{module}".endswith(f".{target}"):
            raise UsageError(
                f"student.lora.target_modules: {target} shares its weight with another layer (tied "
                f"weights: {matrices[0]} is the only one of {folder.name} with a row for each id); "
                "merged into it, the update would change both. Leave it out."
            )


def _tied(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the two; one that does not say so is taken at its files' word."""
    said = config.get(
        "tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings")
    )
    return said is not False


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config
