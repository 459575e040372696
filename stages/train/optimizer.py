"""The optimizer and the learning rate.

AdamW decays matrices only, and the learning rate follows a schedule over tokens instead of steps.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..recipe.sections import Train
from .shards import BY_NUMBER, Stored

WSD_DECAY = 0.2  # share of all tokens in which `wsd` falls from the peak to the last rate


def make_optimizer(model: nn.Module, train: Train) -> torch.optim.AdamW:
    """Make AdamW over the parameters that train.

    Norms and biases (fewer than two dimensions) do not decay.

    One operation takes sharded weights or whole ones, so each kind has groups of its own.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds = [[p for p in trained if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    groups = [
        {
            "params": [p for p in kind if (p.ndim >= 2) is matrix],
            "weight_decay": train.weight_decay if matrix else 0.0,
        }
        for kind in kinds
        for matrix in (True, False)
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=train.learning_rate, betas=train.betas, fused=True
    )


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """What it has gathered of each parameter: `<name of the parameter>/exp_avg` and so on.

    Its settings are the recipe's, so they are not part of it.
    """
    return {
        f"{name}/{part}": values
        for name, parameter in named.items()
        for part, values in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], stored: Stored
) -> None:
    """Give it what a checkpoint has of it, under `optimizer/`; all ranks call it.

    A single process of before wrote numbers in place of names: first those of matrices, then the
    others.
    """
    earlier = {name: n for n, name in enumerate(sorted(named, key=lambda n: named[n].ndim < 2))}
    names = {parameter: name for name, parameter in named.items()}
    state: dict[int, dict[str, Tensor]] = {}
    wanted: dict[str, Tensor] = {}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(ordered):
        own = names[parameter]
        for start in (f"optimizer/{own}/", f"{BY_NUMBER}{earlier[own]}/"):
            for name in stored.names(start):
                same = stored.size(name) == parameter.shape
                # What is as large as the parameter is sharded as it is.
                values = torch.zeros_like(parameter) if same else torch.zeros(stored.size(name))
                state.setdefault(number, {})[name.removeprefix(start)] = wanted[name] = values
    stored.read(wanted)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def learning_rate(done: float, train: Train) -> float:
    """The learning rate of the step that ends at the share `done` of all tokens (0 < done <= 1).

    Linear warm-up from 0 over `warmup_fraction`, then by `schedule` from the peak to
    `final_fraction` of it; constant stays at the peak, wsd stays there until the last fifth.
    """
    return train.learning_rate * _scale(min(done, 1.0), train)


def _scale(done: float, train: Train) -> float:
    if done < train.warmup_fraction:
        return done / train.warmup_fraction
    match train.schedule:
        case "constant":
            return 1.0
        case "wsd":
            start = max(train.warmup_fraction, 1 - WSD_DECAY)
            left = 1 - max(0.0, done - start) / (1 - start)
        case "linear":
            left = (1 - done) / (1 - train.warmup_fraction)
        case "cosine":
            left = (
                1 + math.cos(math.pi * (done - train.warmup_fraction) / (1 - train.warmup_fraction))
            ) / 2
    return train.final_fraction + (1 - train.final_fraction) * left
