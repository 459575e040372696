"""Students that ranks load: what each holds meanwhile, and what it ends up with."""

import gc
import hashlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.stages.workers.ranks import Ranks

CHANCE = 0.5
"""Seconds that a rank waits with a student in its hands for the others to have one too."""


@dataclass(kw_only=True)
class Loaded:
    """Of one student, what one rank saw."""

    held: list[tuple[float, int]] = field(default_factory=list)
    """From when on it held so many bytes; by the clock of the machine."""
    whole: int = 0
    prints: dict[str, str] = field(default_factory=dict)
    """Of all weights and buffers, gathered."""
    said: list[str] = field(default_factory=list)


def loaded_by(
    ranks: Ranks, recipes: Sequence[Recipe], teacher: Path, folder: Path, machines: str
) -> list[Loaded]:
    """Load each as a training does. `machines`: one letter for each rank."""
    with patch.object(socket, "gethostname", lambda: machines[ranks.rank]):
        return [
            _loaded(ranks, recipe, teacher, folder / str(number))
            for number, recipe in enumerate(recipes)
        ]


def _loaded(ranks: Ranks, recipe: Recipe, teacher: Path, met: Path) -> Loaded:
    from tiny_store import SilentProgress

    from stillroom.stages.train.together import student as module

    seen, progress = Loaded(), SilentProgress()
    met.mkdir(parents=True, exist_ok=True)
    own_initial = module.initial_student
    gc.collect()
    gc.freeze()  # what was there before is looked at no more

    def initial(*args: Any) -> Any:
        began = time.monotonic()
        student = own_initial(*args)
        seen.whole = bytes_held()
        seen.held.append((began, seen.whole))  # at most so much, all along
        (met / str(ranks.rank)).touch()
        until = time.monotonic() + CHANCE
        while len(list(met.iterdir())) < ranks.count and time.monotonic() < until:
            time.sleep(0.005)
        return student

    own_in_turn: Callable[..., Any] | None = getattr(Ranks, "in_turn", None)

    def in_turn(self: Ranks, work: Callable[[], Any]) -> Any:
        def noted() -> Any:
            found = work()
            seen.held.append((time.monotonic(), bytes_held()))
            return found

        assert own_in_turn is not None
        return own_in_turn(self, noted)

    job = Job(recipe=recipe, progress=progress, stop=StopFlag(), ranks=ranks)
    with ExitStack() as patches:
        patches.enter_context(patch.object(module, "initial_student", initial))
        if own_in_turn is not None:
            patches.enter_context(patch.object(Ranks, "in_turn", in_turn))
        model, root = module.placed(job, teacher, device=torch.device("cpu"), dtype=torch.float32)
    seen.held.append((time.monotonic(), bytes_held()))
    seen.prints = prints(model)
    seen.said = progress.said
    del model, root
    return seen


def bytes_held() -> int:
    """Of all tensors since the last freeze, each piece of memory once."""
    pieces = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            local = thing.to_local() if isinstance(thing, DTensor) else thing
            if local.device.type == "cpu":
                piece = local.untyped_storage()
                pieces[piece.data_ptr()] = piece.nbytes()
    return sum(pieces.values())


def prints(model: Any) -> dict[str, str]:
    """A hash of each weight and buffer by name, whole; which names train, too."""
    found = {}
    tensors: Mapping[str, Any] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        data = whole.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        about = f"{whole.dtype} {list(whole.shape)} {tensor.requires_grad}"
        found[name] = f"{about} {hashlib.sha256(data).hexdigest()}"
    return found


def most_on(machine: str, machines: str, seen: Sequence[Loaded]) -> int:
    """The most that the ranks of a machine held together at any time."""
    ranks = [one for one, name in zip(seen, machines, strict=True) if name == machine]
    times = sorted({when for one in ranks for when, _ in one.held})
    return max(sum(_held(one, when) for one in ranks) for when in times)


def _held(one: Loaded, when: float) -> int:
    return next((size for since, size in reversed(one.held) if since <= when), 0)
