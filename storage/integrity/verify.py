"""Prove a store: every record, every byte of every shard, every row, against what was committed.

Nothing here trusts a check made while writing. What is wrong is a `Problem`; what is merely left
over is a note. One record and one row group are in memory at a time, and 8 bytes a key.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import IntegrityError
from ..files.base import Files
from ..store.bindings import ENGINES
from ..store.commits import listed, missing, near, read_commit, read_retired, record_name
from ..store.store import Store
from ..tables.schema import SCHEMAS, TABLES, TableName
from .records import Seen, kept_problems
from .shards import Problem, Record, first_of, shard_problems, split_keys

_FOLDERS = (
    "commits",
    "retired",
    "inputs",
    "snapshots",
    "teachers",
    "bindings",
    ENGINES,
    "matrices",
    "data",
)
"""Where nothing lies that no record names, apart from what a writer left that was stopped."""


@dataclass(slots=True)
class TableReport:
    """What a table holds, by its live commits."""

    shards: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of `verify`."""

    tables: dict[TableName, TableReport] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Nothing here loses a row: files without a record, withdrawn records that cannot be read, and
    what cannot be checked."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(store: Store) -> Report:
    """Check the whole store, reading all of it once."""
    report, seen = Report(), Seen()
    for table in TABLES:
        report.tables[table] = _verify_table(store.files, table, report, seen)
    report.problems.extend(kept_problems(store, seen))
    report.notes.extend(seen.notes)
    report.notes.extend(_left_over(store.files, seen.named))
    return report


def _record(files: Files, table: TableName, seq: int) -> Record | Problem:
    name = record_name(table, seq)
    try:
        record = read_commit(files, table, seq)
    except IntegrityError as error:
        return Problem(name, None, None, str(error), (name,))
    return record or Problem(
        name, None, None, "the record is missing, but later ones exist", (name,)
    )


def _commit_problems(files: Files, record: Record) -> list[Problem]:
    commit = record[0]
    name = record_name(commit.table, commit.seq)
    return shard_problems(files, commit.shard, SCHEMAS[commit.table], record=record, mend=name)


def _verify_table(files: Files, table: TableName, report: Report, seen: Seen) -> TableReport:
    """Every number from 0 on must have its record, or be withdrawn."""
    shown = {folder: listed(files, table, folder) for folder in ("retired", "commits")}
    report.problems.extend(_far_problems(table, shown))
    there = near(set().union(*shown.values()))
    last = there[-1] if there else -1
    withdrawn = set(shown["retired"]).intersection(there)
    report.problems.extend(_withdrawal_problems(files, table, withdrawn, seen))
    found = TableReport()
    live: list[int] = []
    halves: list[np.ndarray] = []  # the first 8 bytes of each key, by live commit
    for seq in range(last + 1):
        seen.named.add(record_name(table, seq))
        if seq in withdrawn:
            report.notes.extend(_withdrawn_notes(files, table, seq, seen))
            continue
        record = _record(files, table, seq)
        if isinstance(record, Problem):
            report.problems.append(record)
            continue
        commit, joined = record
        problems = _commit_problems(files, record)
        report.problems.extend(problems)
        seen.named.add(commit.shard.name)
        if any(problem.mend for problem in problems):
            seen.damaged.add(commit.shard.name)
        else:
            seen.sound[commit.shard.name] = commit.shard
        live.append(seq)
        halves.append(np.frombuffer(joined, np.uint64)[::2].copy())
        found.shards += 1
        found.rows += commit.shard.rows
        found.tokens += commit.tokens
        found.bytes += commit.shard.bytes
    report.problems.extend(_repeated_keys(files, table, live, halves))
    return found


def _far_problems(table: TableName, shown: Mapping[str, list[int]]) -> Iterator[Problem]:
    """A record whose number no others lead to; until it is gone, nobody reads the table."""
    try:
        missing(table, shown)
    except IntegrityError as error:
        yield Problem(f"commits/{table}", None, None, str(error))


def _withdrawal_problems(
    files: Files, table: TableName, withdrawn: set[int], seen: Seen
) -> Iterator[Problem]:
    for seq in sorted(withdrawn):
        name = record_name(table, seq, folder="retired")
        seen.named.add(name)
        try:
            read_retired(files, table, seq)
        except IntegrityError as error:
            yield Problem(name, None, None, str(error), (name,))


def _withdrawn_notes(files: Files, table: TableName, seq: int, seen: Seen) -> Iterator[str]:
    """A withdrawn commit holds no rows, whatever its record says."""
    try:
        record = read_commit(files, table, seq)
    except IntegrityError:
        yield (
            f"{record_name(table, seq)}: the record cannot be read; it is withdrawn, so it holds "
            "no rows of the store"
        )
    else:
        if record is not None:
            seen.named.add(record[0].shard.name)


def _repeated_keys(
    files: Files, table: TableName, live: list[int], halves: list[np.ndarray]
) -> Iterator[Problem]:
    """No key may be in two live commits.

    First by half keys in order, then exactly, where halves are equal.
    """
    ordered = np.sort(np.concatenate([np.empty(0, np.uint64), *halves]))
    equals_next = ordered[1:] == ordered[:-1]
    doubtful = np.unique(ordered[1:][equals_next])
    first: dict[bytes, int] = {}  # the commit that has a key first
    for seq, half in zip(live, halves, strict=True):
        if not np.isin(half, doubtful).any():
            continue
        record = _record(files, table, seq)
        if isinstance(record, Problem):  # it was whole a moment ago
            yield record
            continue
        messages = []
        for key in split_keys(record[1]):
            if first.setdefault(key, seq) != seq:
                messages.append(f"key {key.hex()} is in commit {first[key]} already")
        if messages:
            name = record_name(table, seq)
            yield Problem(name, "key", None, first_of(messages), (name,))


def _left_over(files: Files, named: set[str]) -> Iterator[str]:
    for folder in _FOLDERS:
        for name, size, _ in files.walk(folder):
            if name not in named:
                yield (
                    f"{name}: no record names this file ({size} bytes); it holds no rows of the "
                    "store"
                )
