"""Prove a store: every record, every byte of every shard, every row, against what was committed.

Nothing here trusts a check made while writing. What is wrong is a `Problem`; what is merely left over is a note.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .commits import Commit, numbers, read_commit, read_retired, record_name
from .errors import IntegrityError, StillroomError
from .files import Files
from .inputs import INPUTS_SCHEMA, inputs_name, read_inputs
from .invariants import check_shape, doubts
from .keys import KEY_BYTES
from .rows import Rows
from .schema import SCHEMAS, TABLES, TableName
from .shard import ShardFile, ShardInfo
from .snapshot import load_snapshot
from .store import MARKER, Store
from .writer import TOKENS_COLUMN

Record = tuple[Commit, bytes]  # a commit, and the keys of its rows


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; `column` and `row_group` where they are known."""

    file: str
    column: str | None
    row_group: int | None
    message: str


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

    tables: dict[TableName, TableReport]
    problems: list[Problem]
    notes: list[str]
    """Files that no record names: harmless, they hold no rows of the store."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(store: Store) -> Report:
    """Check the whole store, reading all of it once."""
    report = Report({}, [], [])
    named = {MARKER}
    for table in TABLES:
        commits = _records(store, table, report, named=named)
        report.tables[table] = TableReport(
            shards=len(commits),
            rows=sum(commit.shard.rows for commit, _ in commits),
            tokens=sum(commit.tokens for commit, _ in commits),
            bytes=sum(commit.shard.bytes for commit, _ in commits),
        )
        report.problems.extend(_repeated_keys(commits))
        for record in commits:
            report.problems.extend(_shard_problems(store.files, record[0].shard, SCHEMAS[table], record=record))
    report.problems.extend(_inputs_problems(store.files, named))
    report.problems.extend(_snapshot_problems(store, named))
    report.notes.extend(_left_over(store.files, named))
    return report


def _records(store: Store, table: TableName, report: Report, *, named: set[str]) -> list[Record]:
    """The live commits; every number from 0 on must have its record."""
    retired = set()
    for seq in numbers(store.files, table, folder="retired"):
        name = record_name(table, seq, folder="retired")
        named.add(name)
        try:
            read_retired(store.files, table, seq)
            retired.add(seq)
        except IntegrityError as error:
            report.problems.append(Problem(name, None, None, str(error)))
    commits = []
    for seq in range(max([*numbers(store.files, table), *retired], default=-1) + 1):
        name = record_name(table, seq)
        named.add(name)
        try:
            record = read_commit(store.files, table, seq)
        except IntegrityError as error:
            report.problems.append(Problem(name, None, None, str(error)))
            continue
        if record is None:
            report.problems.append(Problem(name, None, None, "the record is missing, but later ones exist"))
            continue
        named.add(record[0].shard.name)
        if seq not in retired:
            commits.append(record)
    return commits


def _repeated_keys(commits: list[Record]) -> Iterator[Problem]:
    seen: dict[bytes, int] = {}
    for commit, joined in commits:
        messages = []
        for key in _split(joined):
            if key in seen:
                messages.append(f"key {key.hex()} is in commit {seen[key]} already")
            seen[key] = commit.seq
        if messages:
            yield Problem(record_name(commit.table, commit.seq), "key", None, _first(messages))


def _shard_problems(
    files: Files, shard: ShardInfo, schema: pa.Schema, *, record: Record | None = None
) -> Iterator[Problem]:
    try:
        size = files.size(shard.name)
        if size != shard.bytes:
            yield Problem(shard.name, None, None, f"the file has {size} bytes, {shard.bytes} were committed")
        elif files.sha256(shard.name) != shard.sha256:
            yield Problem(shard.name, None, None, "the file's sha256 is not the one that was committed")
        file = ShardFile(files, shard.name)
    except FileNotFoundError:
        yield Problem(shard.name, None, None, "the file is missing")
    except (IntegrityError, OSError) as error:
        yield Problem(shard.name, None, None, str(error))
    else:
        if not file.schema.equals(schema):
            yield Problem(shard.name, None, None, "the columns are not those of the table")
        elif file.rows_per_group != shard.row_groups:
            yield Problem(shard.name, None, None, f"row groups {file.rows_per_group}, committed {shard.row_groups}")
        else:
            yield from _row_problems(file, record)


def _split(joined: bytes) -> list[bytes]:
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


def _row_problems(file: ShardFile, record: Record | None) -> Iterator[Problem]:
    commit, joined = record or (None, b"")
    keys: list[bytes] = []
    tokens = 0
    counted = None if commit is None else TOKENS_COLUMN.get(commit.table)
    for group in range(len(file.rows_per_group)):
        columns = {}
        for name in file.schema.names:
            try:
                columns[name] = file.read(group, [name])[name]
            except IntegrityError as error:
                yield Problem(file.name, name, group, str(error))
        if commit is None or len(columns) < len(file.schema.names):
            continue
        rows = Rows(pa.table(columns))
        keys += columns["key"].to_pylist()
        if commit.table in TOKENS_COLUMN:
            yield from _value_problems(file, commit.table, rows, group=group)
        tokens += sum(columns[counted].to_pylist()) if counted else 0
    if commit is not None and len(keys) == file.rows:
        if keys != _split(joined):
            yield Problem(file.name, "key", None, f"the keys are not those of {record_name(commit.table, commit.seq)}")
        if tokens != commit.tokens:
            yield Problem(file.name, None, None, f"{tokens} tokens, {commit.tokens} were committed")


def _value_problems(file: ShardFile, table: TableName, rows: Rows, *, group: int) -> Iterator[Problem]:
    """One problem per column of a row group: the first row that has it, and how many more."""
    found: dict[str | None, dict[int, str]] = {}
    for index in range(len(rows)):
        row = rows[index]
        for column, message in _row_doubts(table, row, file.about):
            where = f"row {int(file.starts[group]) + index} ({row['key'].hex()})"
            found.setdefault(column, {}).setdefault(index, f"{where}: {message}")
    for column, messages in found.items():
        yield Problem(file.name, column, group, _first(list(messages.values())))


def _row_doubts(table: TableName, row: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[tuple[str | None, str]]:
    try:
        check_shape(table, row, about)
        if table == "soft_targets":
            yield from doubts(row, about)
    except (IntegrityError, KeyError) as error:
        yield None, str(error)


def _first(messages: list[str]) -> str:
    return messages[0] if len(messages) == 1 else f"{messages[0]} (and {len(messages) - 1} more)"


def _inputs_problems(files: Files, named: set[str]) -> Iterator[Problem]:
    for file in files.names("inputs"):
        data_id = file.removesuffix(".json")
        named.add(inputs_name(data_id))
        try:
            inputs = read_inputs(files, data_id)
        except IntegrityError as error:
            yield Problem(inputs_name(data_id), None, None, str(error))
            continue
        if inputs is not None:
            named.add(inputs.shard.name)
            yield from _shard_problems(files, inputs.shard, INPUTS_SCHEMA)


def _snapshot_problems(store: Store, named: set[str]) -> Iterator[Problem]:
    for file in store.files.names("snapshots"):
        name = f"snapshots/{file}"
        named.add(name)
        try:
            snapshot = load_snapshot(store, file.removesuffix(".json"))
        except StillroomError as error:
            yield Problem(name, None, None, str(error))
            continue
        for shard in snapshot.shards:
            if not store.files.exists(shard.name):
                yield Problem(name, None, None, f"its shard {shard.name} is missing")


def _left_over(files: Files, named: set[str]) -> Iterator[str]:
    for folder in ("commits", "retired", "inputs", "snapshots", "data"):
        for name, size, _ in files.walk(folder):
            if name not in named:
                yield f"{name}: no record names this file ({size} bytes); it holds no rows of the store"
