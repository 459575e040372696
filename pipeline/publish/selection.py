"""Which rows an export takes: a snapshot's, those a recipe selects, or all of a store.

What was not a snapshot before becomes one, kept in the store as those of a training are.
"""

from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import stage_named
from ...storage.errors import UsageError
from ...storage.published.selection import find_snapshots, refuse_rows_of_sources
from ...storage.snapshots.snapshot import Snapshot, save_snapshot
from ...storage.store.store import Store
from ..plan.plan import make_plan


def selected(store: Store, name: str | None, recipe: Recipe | None) -> dict[str, Snapshot]:
    """Snapshots by split.

    Args:
        store: The recipe's own, or the one that was named.
        name: Id of a snapshot, or its beginning.
        recipe: What it selects, unless it or `name` pins a snapshot.

    Raises:
        UsageError: no such rows, or not all of them are there yet.
    """
    pinned = recipe.train.snapshot if recipe is not None and recipe.train is not None else None
    if recipe is None or name or pinned:
        found = find_snapshots(store, name or pinned)
    else:
        found = _of_recipe(store, recipe)
    for snapshot in found.values():
        if not store.files.exists(f"snapshots/{snapshot.id}.json"):
            save_snapshot(store, snapshot)
    return found


def _of_recipe(store: Store, recipe: Recipe) -> dict[str, Snapshot]:
    """What the recipe's student would be trained, validated and judged on."""
    if len(recipe.several) > 1:
        names = ", ".join(one.name for one in recipe.several)
        raise UsageError(
            "teachers: a published folder has the rows of one teacher, and this recipe has "
            f"{names}. Export each by a copy of the recipe that has its entry alone in `teachers`: "
            "its rows are found in the same store (where the first teacher writes, name it in "
            "generate.model)."
        )
    plan = make_plan(recipe)
    if not plan.snapshots:
        fill = [line for line in plan.stages if stage_named(line.name).table is not None]
        left = [f"{line.name} {line.state}: {line.why}" for line in fill if line.state != "done"]
        state = ", ".join(left) or "all were rejected or left out"
        raise UsageError(
            f"{store.root}: the recipe's rows are not all there ({state}). Run the recipe first: "
            "`--until score` is enough."
        )
    for snapshot in plan.snapshots.values():
        refuse_rows_of_sources(store, snapshot)
    return {str(split): snapshot for split, snapshot in plan.snapshots.items()}
