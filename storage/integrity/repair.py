"""Withdraw what is damaged, so that the next run makes exactly that again.

Nothing intact is touched.

A commit is withdrawn by a record that is put if absent: safe while writers run, and any number of
times.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..errors import IntegrityError
from ..files.base import Files
from ..store.commits import Commit, read_commit, record_name, retire, withdrawal
from ..store.store import Store
from ..tables.schema import TABLES, TableName
from ..tables.shard import ShardFile
from .shards import Problem
from .verify import verify

_COMMIT = re.compile(r"^(commits|retired)/(\w+)/(\d{8})\.json$")


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A commit that `repair` withdrew."""

    record: str
    rows: int | None
    """None: its record cannot be read."""
    reason: str


@dataclass(frozen=True, slots=True)
class Repaired:
    """What `repair` did."""

    withdrawn: list[Withdrawn]
    removed: list[str]
    """Records and files of inputs, teachers, bindings, engines and snapshots; the next run makes
    them again."""
    rewritten: list[str]
    """Withdrawals that could not be read."""
    retried: dict[str, int]
    """Rejects that are tried again, by reason."""
    left: list[Problem]
    """What cannot be repaired."""

    @property
    def ok(self) -> bool:
        """Whether the store is whole now."""
        return not self.left


def repair(store: Store, *, retry: Collection[str] = ()) -> Repaired:
    """Withdraw every damaged commit and remove every other damaged record.

    Args:
        store: The store.
        retry: Reasons of rejects of generate and score: commits of rejects with one of them are
            withdrawn too, with all rejects that they hold, so that these are tried again.
    """
    problems = verify(store).problems
    reasons: dict[str, str] = {}
    for problem in problems:
        for name in problem.mend:
            reasons.setdefault(name, problem.message)
    done = Repaired([], [], [], {}, [problem for problem in problems if not problem.mend])
    for name, reason in reasons.items():
        _mend(store.files, name, reason, done)
    if retry:
        done.retried.update(_retry(store, set(retry), done.withdrawn))
    return done


def _mend(files: Files, name: str, reason: str, done: Repaired) -> None:
    match = _COMMIT.match(name)
    if match is None:
        files.remove(name)
        done.removed.append(name)
        return
    table = next(table for table in TABLES if table == match[2])
    seq = int(match[3])
    if match[1] == "retired":
        # Its name says what was withdrawn; rows of it may have been made again since.
        files.replace(name, withdrawal(table, seq, reason="written again by repair"))
        done.rewritten.append(name)
    elif retire(files, table, seq, reason=reason):
        done.withdrawn.append(Withdrawn(name, _rows(files, table, seq), reason))


def _rows(files: Files, table: TableName, seq: int) -> int | None:
    try:
        record = read_commit(files, table, seq)
    except IntegrityError:
        return None
    return None if record is None else record[0].shard.rows


def _retry(store: Store, reasons: set[str], withdrawn: list[Withdrawn]) -> Counter[str]:
    """Withdraw the commits that hold rejects with these reasons.

    Returns:
        The rejects withdrawn, by reason.
    """
    counted: Counter[str] = Counter()
    for commit, found in _rejects(store):
        wanted = sorted(reasons & found.keys())
        # What the data stage rejected is read again only where the recipe's data change.
        if commit.stage == "data" or not wanted:
            continue
        if store.retire(commit, reason=f"to be tried again: {', '.join(wanted)}"):
            record = record_name("rejects", commit.seq)
            withdrawn.append(Withdrawn(record, commit.shard.rows, "to be tried again"))
            counted.update(found)
    return counted


def _rejects(store: Store) -> Iterator[tuple[Commit, Counter[str]]]:
    for commit in store.commits("rejects"):
        reasons = ShardFile(store.files, commit.shard.name).read_all(["reason"])["reason"]
        yield commit, Counter(reasons.to_pylist())
