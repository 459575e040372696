"""Which snapshots an export takes.

It takes the one named, the only one chosen before, or all that the store holds.
"""

from collections.abc import Iterable

from ..errors import UsageError
from ..snapshots.snapshot import Snapshot, load_snapshot
from ..store.store import Store
from .all_rows import WHOLE_STORE, all_rows

SPLITS = ("train", "validation", "test")


def find_snapshots(store: Store, name: str | None) -> dict[str, Snapshot]:
    """The snapshot to export and those that belong to it, by split.

    Args:
        store: Where training runs and exports left their snapshots.
        name: Id of one, or its unique beginning; None: the only one that a student was trained on
            or a recipe exported, and where there is none all that the store holds.

    Raises:
        UsageError: no such snapshot, or several (lists them); or nobody can know which rows are
            meant.
    """
    ids = [file.removesuffix(".json") for file in store.files.names("snapshots")]
    known = [load_snapshot(store, found) for found in ids if found.startswith(name or "")]
    known = [snapshot for snapshot in known if snapshot.table != "features"]  # not published yet
    if name is None:
        known = [snapshot for snapshot in known if _was_chosen(snapshot)]
        if not known:
            return all_rows(store)
    if len(known) != 1:
        what = "several snapshots" if known else f"no snapshot {name}"
        advice = "Name one with --snapshot, or a recipe in place of the store"
        listed = _listed(known or [load_snapshot(store, found) for found in ids])
        raise UsageError(f"{store.root}: {what}. {advice}.{listed}")
    (chosen,) = known
    refuse_rows_of_sources(store, chosen)
    split = chosen.about.get("split", "train")
    found = {split: chosen}
    for other, snapshot_id in chosen.about.get("splits", {}).items():
        if other != split and snapshot_id in ids:
            found[other] = load_snapshot(store, snapshot_id)
    return {split: found[split] for split in SPLITS if split in found}


def refuse_rows_of_sources(store: Store, snapshot: Snapshot) -> None:
    """Refuse rows that are not in the store itself: they are somebody else's to publish.

    Raises:
        UsageError: names the source.
    """
    source = next((shard.source for shard in snapshot.shards if shard.source), None)
    if source is not None:
        raise UsageError(
            f"{store.root}: snapshot {snapshot.id} holds rows of the read-only source {source}, "
            "which are not in this store. What a published folder holds is published: name that "
            "one. What a store holds can be exported from it. Or run the recipe once without "
            "storage.sources: then this store has all of its rows."
        )


def _was_chosen(snapshot: Snapshot) -> bool:
    beside = "partners_of" in snapshot.about  # what other teachers said of the texts of another one
    whole = WHOLE_STORE in snapshot.about
    return snapshot.about.get("split", "train") == "train" and not (whole or beside)


def _listed(snapshots: Iterable[Snapshot]) -> str:
    return "".join(
        f"\n  {one.id}  {one.about.get('split', '-')}, {one.rows} rows of {one.table}"
        for one in snapshots
    )
