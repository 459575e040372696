"""Stillroom's public names.

`import stillroom` loads none of them: each is imported when it is first used.

import stillroom

store = stillroom.open_store("stores/first")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .stages.loader.packing import Packing
    from .stages.loader.samples import Samples
    from .stages.loader.torch_dataset import Collator, SnapshotDataset, batch_of
    from .stages.losses.fused_linear import linear_distillation as distillation_loss
    from .stages.losses.objective import Aim, Objective
    from .stages.models.head import hidden_states, split_head
    from .stages.recipe.load import load_recipe
    from .storage.joined import open_store
    from .storage.snapshots.reader import SnapshotReader
    from .storage.snapshots.snapshot import load_snapshot, make_snapshot
    from .storage.tables.soft_targets import SoftTargets

__all__ = [
    "Aim",
    "Collator",
    "Objective",
    "Packing",
    "Samples",
    "SnapshotDataset",
    "SnapshotReader",
    "SoftTargets",
    "batch_of",
    "distillation_loss",
    "hidden_states",
    "load_recipe",
    "load_snapshot",
    "make_snapshot",
    "open_store",
    "split_head",
]

_PLACES = {
    "Aim": ".stages.losses.objective:Aim",
    "Collator": ".stages.loader.torch_dataset:Collator",
    "Objective": ".stages.losses.objective:Objective",
    "Packing": ".stages.loader.packing:Packing",
    "Samples": ".stages.loader.samples:Samples",
    "SnapshotDataset": ".stages.loader.torch_dataset:SnapshotDataset",
    "SnapshotReader": ".storage.snapshots.reader:SnapshotReader",
    "SoftTargets": ".storage.tables.soft_targets:SoftTargets",
    "batch_of": ".stages.loader.torch_dataset:batch_of",
    "distillation_loss": ".stages.losses.fused_linear:linear_distillation",
    "hidden_states": ".stages.models.head:hidden_states",
    "load_recipe": ".stages.recipe.load:load_recipe",
    "load_snapshot": ".storage.snapshots.snapshot:load_snapshot",
    "make_snapshot": ".storage.snapshots.snapshot:make_snapshot",
    "open_store": ".storage.joined:open_store",
    "split_head": ".stages.models.head:split_head",
}
"""Public name -> the module that holds it, and its name there."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, and remember it."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name].split(":")
    found = getattr(import_module(module, __name__), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, imported already or not."""
    return sorted({*globals(), *__all__})
