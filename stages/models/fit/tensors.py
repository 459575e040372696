"""What a model's weight files say of their tensors: types and shapes, by name.

It is read from their headers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ....storage.errors import UsageError, answered
from .files import read_json


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


def tensor_files(folder: Path) -> list[Path]:
    """The weight files of a model or adapter folder."""
    found = sorted(folder.glob("*.safetensors"))
    return (
        found
        or sorted(folder.glob("pytorch_model*.bin"))
        or sorted(folder.glob("adapter_model*.bin"))
    )


def refuse_elsewhere(folder: Path, *, where: str) -> None:
    """Refuse a model whose weights are read from files outside its folder.

    Its identity would not cover them.

    Args:
        folder: Of a model or an adapter.
        where: Field and folder, for messages.

    Raises:
        UsageError: its config or an index names one.
    """
    for file, name, endings in _named_weights(folder, where):
        if not (isinstance(name, str) and name == PurePath(name).name and name.endswith(endings)):
            raise UsageError(
                f"{where}: {file} names weights in {name!r}, expected a file in the folder itself "
                f"that ends in {' or '.join(endings)}. Save the model again."
            )


def _named_weights(folder: Path, where: str) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """What transformers reads weights from: (the file that names it, its name, how it must end)."""
    named = read_json(folder / "config.json", where, missing={}).get("transformers_weights")
    if named is not None:
        yield "config.json", named, (".safetensors", ".safetensors.index.json")
    for index in sorted(folder.glob("*.index.json")):
        ending = Path(index.name.removesuffix(".index.json")).suffix
        for name in _values(read_json(index, where).get("weight_map")):
            yield index.name, name, (ending,)


def _values(weight_map: Any) -> Iterable[Any]:
    return weight_map.values() if isinstance(weight_map, dict) else ()


def stored_tensors(folder: Path, *, where: str) -> dict[str, StoredTensor]:
    """By name; none of weights that are stored by pickle, which has no header to read.

    Args:
        folder: Of a model.
        where: Field and folder, for messages.

    Raises:
        UsageError: a file is damaged, or a pointer of Git LFS in place of one.
    """
    from safetensors import safe_open

    found: dict[str, StoredTensor] = {}
    for path in tensor_files(folder):
        if path.suffix != ".safetensors":
            return {}
        action = "Fetch it again (a pointer of Git LFS by `git lfs pull`), or save the model again."
        with (
            answered(f"{where}: {path.name} is not readable as safetensors", action),
            safe_open(path, framework="numpy") as tensors,
        ):
            for name in list(tensors.keys()):
                about = tensors.get_slice(name)
                found[name] = StoredTensor(about.get_dtype(), tuple(about.get_shape()))
    return found
