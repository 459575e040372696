"""What a model's weight files say of their tensors, read from their headers: types and shapes, by name."""

from dataclasses import dataclass
from pathlib import Path

from ....storage.errors import answered


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
