"""Who works over the vocabulary: Triton's kernels on an NVIDIA GPU that has them, plain torch elsewhere."""

from importlib import import_module

import torch

from ...storage.errors import UsageError
from ..recipe.fields import Kernel


def uses_triton(asked: Kernel | None, device: torch.device, *, setting: str) -> bool:
    """Whether Triton does it; None: where it can.

    Args:
        asked: What the recipe says.
        device: Where the model is.
        setting: Where the recipe says it.

    Raises:
        UsageError: Triton is asked for and cannot run here.
    """
    nvidia = device.type == "cuda" and torch.version.hip is None
    if asked == "torch" or (asked is None and not nvidia):
        return False
    found = f"the model is on a device of type {device.type!r}, expected an NVIDIA GPU"
    if nvidia:
        try:
            import_module("triton")
            return True
        except ImportError as error:
            found = f"Triton does not import ({error})"
    if asked is None:
        return False
    raise UsageError(f"{setting}: triton cannot run, {found}. Leave it out: then plain torch does the same.")
