"""Remove what no record and no snapshot names, once nobody can be about to name it.

A shard is new when its writer names it: `put_parquet` never relies on a file that was there before.
So a file that stands unnamed for longer than any writer takes from shard to record (24 hours, by
the store's own clock) never gets a name. Files are listed first and records read afterwards, so
what was named meanwhile is known.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import IntegrityError
from ..files.base import Files
from ..snapshots.snapshot import load_snapshot
from ..store.commits import numbers, read_commit, record_name
from ..store.inputs import read_inputs
from ..store.matrices import (
    FOLDER,
    NAMING,
    kept_matrix,
    matrix_file,
    named_matrices,
    names,
    record_file,
)
from ..store.segments import Segments, complete
from ..store.store import Store
from ..tables.schema import TABLES, TableName

HOURS = 24.0
"""How long a file must have been there."""
_CLOCK = "cache/clock"
_SWEPT = ("data/", f"{FOLDER}/", "claims/", "cache/index/", f"{_CLOCK}/")
"""Where files go that nothing names; elsewhere only temporary ones do."""


@dataclass(frozen=True, slots=True)
class Vacuumed:
    """What `vacuum` removed, or would remove."""

    files: dict[str, int]
    """Bytes by name."""
    waiting: int
    """Files that nothing names either, but are too young."""

    @property
    def bytes(self) -> int:
        """What they held."""
        return sum(self.files.values())


def vacuum(store: Store, *, older_than_hours: float = HOURS, dry_run: bool = False) -> Vacuumed:
    """Remove what nothing names.

    That is temporary files, shards, matrices, claims and index segments of the past.

    Args:
        store: The store.
        older_than_hours: Files younger than this stay. Zero only where nobody writes.
        dry_run: Only say what would go.

    Raises:
        IntegrityError: a record cannot be read, so what it names is unknown.
    """
    files = store.files
    latest = _now(files) - older_than_hours * 3600
    listed = list(files.walk())
    young = {name for name, _, changed in listed if changed > latest}
    named = _named(store, {name for name in young if name.startswith("retired/")})
    useless = {name: size for name, size, _ in listed if _is_useless(name, named)}
    # A folder of claims in which somebody is at work stays whole.
    at_work = {_folder(name) for name in young}
    claimed = {name for name in useless if name.startswith("claims/") and _folder(name) in at_work}
    old = {name: size for name, size in useless.items() if name not in young | claimed}
    if not dry_run:
        for name in old:
            files.remove(name)
    return Vacuumed(old, len(useless) - len(old))


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _now(files: Files) -> float:
    """The store's clock: when a file that is written now was last changed."""
    name = f"{_CLOCK}/{uuid.uuid4().hex}"
    files.put_if_absent(name, b"")
    try:
        return next(changed for found, _, changed in files.walk(_CLOCK) if found == name)
    finally:
        files.remove(name)


def _is_useless(name: str, named: set[str]) -> bool:
    temporary = name.rsplit("/", 1)[-1].startswith(".")
    return temporary or (name.startswith(_SWEPT) and name not in named)


def _named(store: Store, recent: set[str]) -> set[str]:
    """The files that are named: shards, matrices, and index segments in use.

    The shards are those of commits (live, or withdrawn a moment ago), of inputs and of snapshots.
    """
    named: set[str] = set()
    try:
        for table in TABLES:
            commits = store.commits(table)
            named.update(commit.shard.name for commit in commits)
            named.update(_withdrawn(store.files, table, recent))
            segments = map(Segments(store.files, table).find, complete(commits))
            named.update(name for name in segments if name is not None)
        for file in store.files.names("inputs"):
            inputs = read_inputs(store.files, file.removesuffix(".json"))
            if inputs is not None:
                named.add(inputs.shard.name)
        for file in store.files.names("snapshots"):
            snapshot = load_snapshot(store, file.removesuffix(".json"))
            named.update(shard.name for shard in snapshot.shards)
        named.update(_matrices(store))
    except (IntegrityError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            "vacuum: nothing was removed, for a record cannot be read, and what it names must "
            f"stay: {error} Run `stillroom repair` first."
        ) from error
    return named


def _matrices(store: Store) -> Iterator[str]:
    """Records of matrices, their files, and those that a row names."""
    for name in names(store.files):
        record = kept_matrix(store.files, name)
        if record is not None:
            yield from (record_file(name), record.file)
    for commit in store.commits("features"):
        rows = store.shard("features", commit.shard.sha256).read_all(NAMING)
        yield from (matrix_file(one.id) for one in named_matrices(rows))


def _withdrawn(files: Files, table: TableName, recent: set[str]) -> Iterator[str]:
    """Shards of commits withdrawn so lately that somebody may still be reading them."""
    for seq in numbers(files, table, folder="retired"):
        if record_name(table, seq, folder="retired") in recent:
            try:
                record = read_commit(files, table, seq)
            except IntegrityError:
                continue
            if record is not None:
                yield record[0].shard.name
