"""The device: where and in what to compute, in which mode, and whether Triton can.

The messages for a device that fails are here too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import nn

from ...storage.errors import EngineDied, StillroomError, UsageError
from ..recipe.fields import Kernel
from ..recipe.sections import Student


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
    raise UsageError(
        f"{setting}: triton cannot run, {found}. Leave it out: then plain torch does the same."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode within the block, and in the mode that it was in afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_device(device: object, failure: str) -> None:
    """See, after a failed pass, whether a GPU still takes work from this process.

    After a device-side assert or a lost card it may take no more.

    Raises:
        EngineDied: it takes none.
    """
    try:
        torch.zeros(1, device=device).cpu()  # type: ignore[call-overload]
    except RuntimeError:
        raise EngineDied(f"the device takes no more work: {failure}") from None


def device_and_dtype(student: Student) -> tuple[torch.device, torch.dtype]:
    """Where to compute and in what.

    It is a GPU where there is one. `auto` is bfloat16 on a GPU that does it well.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if student.dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return device, torch.bfloat16 if half else torch.float32
    return device, getattr(torch, student.dtype)


def out_of_memory(tokens: int, message: str, *, group: int | None = None) -> StillroomError:
    """The error of the smallest training pass that did not fit.

    It is of a sample of so many tokens, or a group. `message` is torch's.
    """
    what = f"{tokens} tokens, one sample alone"
    advice = "cut the data shorter"
    if group is not None:
        what = f"one group of {group} samples, the longest of {tokens} tokens"
        advice = "lower `group` in loss.features"
    return StillroomError(
        f"train: out of memory in a forward pass of {what} ({message}). "
        f"Set train.gradient_checkpointing to true, {advice}, or take a smaller student."
    )
