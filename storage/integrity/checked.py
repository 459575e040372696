"""The check of rows that are about to be learnt from, once on each machine.

The bytes of each file are compared with their hash, and every row is asked.

Writers check the rows that they write, but a shard may come from somebody else's: a seal shows that
it was not damaged, not that its rows can be right. What held is remembered by the hash of the
bytes, outside of any store, for whoever writes a store could write that it holds.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from ..bounds import integer, string, understood
from ..errors import IntegrityError
from ..files.base import user_cache
from ..keys import content_id
from ..snapshots.snapshot import Snapshot
from ..store.store import Store
from ..tables.heads import head_of
from ..tables.rows import Rows
from ..tables.schema import SCHEMAS, TableName
from ..tables.shard import REPAIR, ShardFile, StoredFile
from ..tables.soft_targets import EXACT_BITS, LISTS
from .row_faults import FATAL, Fault, faults, repeated_feature

VERSION = 1
"""Of what rows are asked. Where it grows, all of them are asked again."""

_COLUMNS: dict[TableName, tuple[str, ...]] = {
    "soft_targets": (
        *("key", "teacher_id", "kind", "k", "p", "k_min", "draw", "proposal", "token_ids"),
        *("span_start", "span_tokens", "spans", *LISTS, "kept_mass", "label", "tail_bound"),
        "labels",
    ),
    "generations": ("key", "token_ids", "prompt_tokens", "completion_tokens", "spans"),
    "features": tuple(SCHEMAS["features"].names),
}
_WHOLE = "."
"""Ends a line of the memory that was not torn."""
HELP = (
    "The file is as it was sealed, so `stillroom repair` cannot mend it. `stillroom verify STORE` "
    "lists all such rows of a store. Score the prompts again into another store (storage.dir), "
    "or take the source that the file is in out of storage.sources."
)
"""What to do about rows that were sealed and cannot be right."""


@dataclass(frozen=True, slots=True)
class Held:
    """What is remembered of a file whose rows hold."""

    rows: int
    highest: int
    """The highest token id of its texts; -1: it has none."""


class Memory:
    """What this user's machine has checked: a file of lines in the user's cache folder, if any.

    Each line is a name and what is remembered under it. A line that is torn is not known.
    """

    def __init__(self, path: Path | None) -> None:
        """`path`: the file; None: nothing outlives this object."""
        self._path = path
        self._known: dict[str, str] = {}
        if path is not None:
            with suppress(OSError):
                lines = path.read_text("ascii", errors="replace").splitlines()
                parts = [line.split("\t") for line in lines]
                self._known = {part[0]: part[1] for part in parts if part[2:] == [_WHOLE]}

    @classmethod
    def of_user(cls) -> Self:
        """That of the user; of nobody where no home is known."""
        try:
            return cls(user_cache() / "checked" / f"rows-{VERSION}.txt")
        except RuntimeError:  # no home
            return cls(None)

    def known(self, name: str) -> str | None:
        """What is remembered under a name."""
        return self._known.get(name)

    def keep(self, name: str, value: str) -> None:
        """Remember; where nothing can be written, for as long as this process runs."""
        self._known[name] = value
        if self._path is None:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.write(f"\n{name}\t{value}\t{_WHOLE}")  # whatever the line before ends in


def files_of(store: Store, snapshot: Snapshot) -> list[StoredFile]:
    """The files that a snapshot's rows are read from, each once."""
    found: dict[tuple[str, str], StoredFile] = {}
    for shard in snapshot.shards:
        for file in store.stored(snapshot.table, shard.sha256):
            found.setdefault((file.name, file.sha256), file)
    return list(found.values())


def held(file: StoredFile, table: TableName, memory: Memory) -> Held | None:
    """What was found of a file that was checked here and was not changed since.

    None: the file has to be checked.
    """
    try:
        stamp = _stamp(file)
    except FileNotFoundError:
        return None
    if memory.known(stamp) != file.sha256:
        return None
    return _remembered(memory.known(_rows_name(file, table)))


def check_file(
    file: StoredFile, table: TableName, memory: Memory, *, lenient: bool = False
) -> tuple[Held, str | None]:
    """Hash a file and ask all of its rows, unless equal bytes were asked before.

    Args:
        file: Which.
        table: That it holds.
        memory: Of what was checked.
        lenient: Numbers that cannot be a teacher's are returned in words and not remembered, in
            place of an error. Rows that nobody can read are refused all the same.

    Raises:
        IntegrityError: the bytes are not those that were committed, or a row cannot be right; names
            file, row and column.
    """
    prove_bytes(file, memory)
    name = _rows_name(file, table)
    if known := _remembered(memory.known(name)):
        return known, None
    where, opened = f"{file.files.root}/{file.name}", file.open()
    check_about(table, opened.about, where=where)
    found, said = Held(opened.rows, -1), None
    for group, rows in _groups(opened, table):
        if "token_ids" in _COLUMNS[table]:
            highest = int(np.max(rows.flat("token_ids")[1], initial=-1))
            found = Held(found.rows, max(found.highest, highest))
        bad = faults(table, rows, opened.about)
        for index, column, message in _worst_first(bad) if lenient else bad:
            row = int(opened.starts[group]) + index
            named = f"{column}: {message}" if column else message
            said = (
                said
                or f"{where}: row {row} ({rows.value('key', index).hex()}): {named.rstrip('.')}."
            )
            if not lenient or column in FATAL:
                raise IntegrityError(f"{said} {HELP}")
    repeated = _repeated_key(opened)
    if table == "features":
        repeated = repeated or repeated_feature(opened)
    if repeated:
        raise IntegrityError(f"{where}: {repeated}. {HELP}")
    if said is None:
        memory.keep(name, f"{found.rows} {found.highest}")
    return found, said


def check_about(table: TableName, about: Mapping[str, Any], *, where: str) -> None:
    """Refuse a shard's description of itself that no bound could be taken from."""
    if table not in ("soft_targets", "features"):
        return
    with understood(where, f"description of {table}"):
        string(about["teacher_id"])
        if table == "features":
            return
        integer(about["vocab_size"], least=1, most=2**31 - 1)
        integer(about["mantissa_bits"], least=1, most=EXACT_BITS)
        if head_of(about).classes and not all(map(string, about["class_names"])):
            raise ValueError("a class has no name")


def _worst_first(found: Iterable[Fault]) -> list[Fault]:
    return sorted(found, key=lambda fault: fault[1] not in FATAL)


def _stamp(file: StoredFile) -> str:
    return f"bytes {content_id('stamp', stamp=file.files.stamp(file.name))}"


def _rows_name(file: StoredFile, table: TableName) -> str:
    return f"{table} {file.sha256}"


def _remembered(value: str | None) -> Held | None:
    with suppress(ValueError):
        rows, highest = map(int, (value or "").split())
        return Held(rows, highest)
    return None


def prove_bytes(file: StoredFile, memory: Memory) -> None:
    """Hash a file, unless it was hashed here before and is as it was then.

    Raises:
        IntegrityError: it is missing, or its bytes are not those that were committed.
    """
    try:
        stamp = _stamp(file)  # before the bytes: what is changed while they are read is not known
        if memory.known(stamp) == file.sha256:
            return
        found = file.files.sha256(file.name)
    except FileNotFoundError as error:
        raise IntegrityError(f"{file.name}: the file is missing. {REPAIR}") from error
    if found != file.sha256:
        opened = file.open()
        for group in range(len(opened.rows_per_group)):
            opened.read(group)  # says which column, where a page shows it
        raise IntegrityError(
            f"{file.files.root}/{file.name}: its sha256 is {found[:16]}, expected "
            f"{file.sha256[:16]}: these are not the bytes that were committed. {REPAIR}"
        )
    memory.keep(stamp, found)


def _groups(file: ShardFile, table: TableName) -> Iterator[tuple[int, Rows]]:
    """Each row group's columns that are asked about.

    A column that may be null and was not published is null here.
    """
    there = [
        name
        for name in _COLUMNS[table]
        if name in file.schema.names or not SCHEMAS[table].field(name).nullable
    ]
    for group in range(len(file.rows_per_group)):
        rows = file.read(group, there)
        for name in _COLUMNS[table]:
            if name not in there:
                kind = SCHEMAS[table].field(name).type
                rows = rows.append_column(name, pa.nulls(rows.num_rows, kind))
        yield group, _rows_of(file, group, rows)


def _rows_of(file: ShardFile, group: int, table: pa.Table) -> Rows:
    try:
        return Rows(table)
    except IntegrityError as error:
        raise IntegrityError(f"{file.name}: row group {group}: {error} {HELP}") from error


def _repeated_key(file: ShardFile) -> str | None:
    """Of all row groups: the first row that has the key of one before it."""
    if len(file.rows_per_group) < 2:
        return None  # asked with its row group
    keys = Rows(file.read_all(["key"])).keys()
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(keys)))
    if not len(again):
        return None
    row = int(again[0])
    return f"row {row} ({keys[row].tobytes().hex()}): row {int(first[which][row])} has the same key"
