"""Batch norms of a student.

They cannot be had of a pass of one sample where that is one number a channel.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...storage.errors import UsageError
from ..recipe.sections import Train

_TOO_FEW = "more than 1 value per channel"
"""What torch says of one number to take a mean and a variance of."""


def fails_alone(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether training fails on a pass of this one sample.

    Weights and averages stay as they are.
    """
    if not any(isinstance(part, _BatchNorm) for part in model.modules()):
        return False
    device = next(model.parameters()).device
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.train()(**{name: tensor.to(device) for name, tensor in inputs.items()})
    except ValueError as error:
        if _TOO_FEW not in str(error):
            raise
        return True
    finally:
        model.train(training)
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return False


def refuse_alone(train: Train, *, longest: int, per_pass: int) -> None:
    """Refuse steps and passes of which one may hold a single sample.

    Three of the longest fit into a pass: then one of them can be given to a sample that is left
    over.

    Raises:
        UsageError: with the size that would do.
    """
    sizes = (("tokens_per_step", train.tokens_per_step, 2), ("tokens_per_pass", per_pass, 3))
    for name, size, least in sizes:
        if size < least * longest:
            raise UsageError(
                f"train.{name}: {size} may leave a pass of one sample (the longest has {longest}), "
                f"and the student's batch norms cannot be had of one. Set it to {least * longest} "
                "or more."
            )
