"""One shard against its record: size, hash, the checksum of every page, every row.

Damage is named to column and row group where a page shows it. Page headers, page index and footer
have no checksum of their own: the hash of the whole file finds what is wrong there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa

from ..errors import IntegrityError
from ..files.base import Files
from ..keys import KEY_BYTES
from ..store.commits import Commit, record_name
from ..store.writer import TOKENS_COLUMN
from ..tables.rows import Rows
from ..tables.schema import TableName
from ..tables.shard import ShardFile, ShardInfo
from .row_faults import faults, repeated_feature

Record = tuple[Commit, bytes]  # a commit, and the keys of its rows


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; `column` and `row_group` where they are known."""

    file: str
    column: str | None
    row_group: int | None
    message: str
    mend: tuple[str, ...] = ()
    """Records that `repair` withdraws (commits) or removes (others), so that this is made again;
    none: nothing can."""


def shard_problems(
    files: Files, shard: ShardInfo, schema: pa.Schema, *, record: Record | None = None, mend: str
) -> list[Problem]:
    """Everything that is wrong with a shard.

    Args:
        files: The store's files.
        shard: What the record says about it.
        schema: The columns it must have.
        record: The commit, where it has one: then its rows are checked too.
        mend: The record that must go so that the rows are made again.
    """
    try:
        size = files.size(shard.name)
        intact = size == shard.bytes and files.sha256(shard.name) == shard.sha256
    except FileNotFoundError:
        return [Problem(shard.name, None, None, "the file is missing", (mend,))]
    contents = list(_content_problems(files, shard, schema, record=record, mend=mend))
    if intact:
        return contents
    if size != shard.bytes:
        message = f"the file has {size} bytes, {shard.bytes} were committed"
    else:
        message = "the file's sha256 is not the one that was committed"
        if not contents:
            message += (
                "; every page holds, so the damage is outside them: in a page's header, page index "
                "or footer"
            )
    problems = [Problem(shard.name, None, None, message), *contents]
    return [replace(problem, mend=(mend,)) for problem in problems]


def _content_problems(
    files: Files, shard: ShardInfo, schema: pa.Schema, *, record: Record | None, mend: str
) -> Iterator[Problem]:
    """What a reader finds.

    `mend` stands where the record is wrong though the file is the one it names.
    """
    try:
        file = ShardFile(files, shard.name)
    except IntegrityError as error:
        yield Problem(shard.name, None, None, str(error))
        return
    if not file.schema.equals(schema):
        yield Problem(shard.name, None, None, "the columns are not those of the table", (mend,))
    elif file.rows_per_group != shard.row_groups:
        yield Problem(
            shard.name,
            None,
            None,
            f"row groups {file.rows_per_group}, committed {shard.row_groups}",
            (mend,),
        )
    elif record is None:
        yield from _page_problems(file)
    else:
        yield from _row_problems(file, record, mend=mend)


def _page_problems(file: ShardFile) -> Iterator[Problem]:
    for group in range(len(file.rows_per_group)):
        yield from _read(file, group)[1]


def _read(file: ShardFile, group: int) -> tuple[dict[str, pa.ChunkedArray], list[Problem]]:
    """The columns of a row group that can be read, and a problem for each that cannot."""
    try:
        table = file.read(group)  # in few requests, where columns one by one take one each
        return {name: table[name] for name in table.column_names}, []
    except IntegrityError:
        columns, problems = {}, []
    for name in file.schema.names:
        try:
            columns[name] = file.read(group, [name])[name]
        except IntegrityError as error:
            problems.append(Problem(file.name, name, group, f"damaged ({error.__cause__})"))
    return columns, problems


def _row_problems(file: ShardFile, record: Record, *, mend: str) -> Iterator[Problem]:
    commit, joined = record
    keys: list[bytes] = []
    tokens = 0
    counted = TOKENS_COLUMN.get(commit.table)
    for group in range(len(file.rows_per_group)):
        columns, problems = _read(file, group)
        yield from problems
        if problems:
            continue
        keys += columns["key"].to_pylist()
        if counted is not None:
            tokens += sum(columns[counted].to_pylist())
            yield from _value_problems(file, commit.table, pa.table(columns), group=group)
    if len(keys) < file.rows:  # some could not be read: nothing to compare
        return
    if commit.table == "features" and (repeated := repeated_feature(file)):
        yield Problem(file.name, "text_key", None, repeated)
    if keys != split_keys(joined):
        message = f"the keys are not those of {record_name(commit.table, commit.seq)}"
        yield Problem(file.name, "key", None, message, (mend,))
    if tokens != commit.tokens:
        yield Problem(
            file.name, None, None, f"{tokens} tokens, {commit.tokens} were committed", (mend,)
        )


def split_keys(joined: bytes) -> list[bytes]:
    """Keys given one after the other."""
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


def _value_problems(
    file: ShardFile, table: TableName, columns: pa.Table, *, group: int
) -> Iterator[Problem]:
    """One problem per column of a row group: the first row that has it, and how many more."""
    try:
        rows = Rows(columns)
    except IntegrityError as error:
        yield Problem(file.name, None, group, str(error))
        return
    found: dict[str | None, dict[int, str]] = {}
    for index, column, message in faults(table, rows, file.about):
        where = f"row {int(file.starts[group]) + index} ({rows.value('key', index).hex()})"
        found.setdefault(column, {}).setdefault(index, f"{where}: {message}")
    for column, messages in found.items():
        yield Problem(file.name, column, group, first_of(list(messages.values())))


def first_of(messages: list[str]) -> str:
    """The first of several messages, and how many more there are."""
    return messages[0] if len(messages) == 1 else f"{messages[0]} (and {len(messages) - 1} more)"
