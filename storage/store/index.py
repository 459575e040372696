"""The index: what a plan asks of every committed row.

It is DuckDB views over segments and the newest commits.

It is for Stillroom's own questions; `sql.py` is for those of people.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import IntegrityError, StillroomError, UsageError
from ..files.base import Files, explained, file_sha256
from ..tables.schema import KEY, TABLES, TableName
from ..tables.shard import REPAIR
from .commits import Commit
from .inputs import Inputs, inputs_file
from .limits import GIVE_MORE, OF_COUNTS, OF_RESULTS, SETTINGS
from .segments import INDEXED, Indexed, place_of, segment_schema
from .stopping import stoppable
from .store import Store

_BATCH_ROWS = 1 << 16


class Index:
    """A view of each table: `place` and the indexed columns of each live row.

    Keys are of type UUID in here; `key::BLOB` gives their bytes.
    """

    def __init__(self, store: Store, *, write: bool = False) -> None:
        """`write`: keep the segments that are missing (a plan writes nothing)."""
        self._spill = TemporaryDirectory(prefix="stillroom-")
        self._connection = duckdb.connect()
        limit(self._connection, defaults=OF_COUNTS)
        self._connection.execute(f"SET temp_directory = '{self._spill.name}'")
        self._connection.execute("SET preserve_insertion_order = false")
        self.commits: dict[TableName, dict[int, Commit]] = {}
        """The live commits, by number."""
        views: list[str] = []
        for table in TABLES:
            self.commits[table] = {}
            parts: list[str] = []
            for number, (part, first) in enumerate(store.parts):
                scratch = Path(self._spill.name, str(number))
                found = part.indexed(table, scratch=scratch, write=write and number == 0)
                self.commits[table] |= {first + commit.seq: commit for commit in found.commits}
                parts.append(f"{table}_{number}")
                views.append(self._part(parts[-1], table, found, first=first))
            views.append(_whole(table, parts))
        self.execute(";".join(views))  # each statement has a thread of its own

    def close(self) -> None:
        """Give memory and disk back."""
        with suppress(duckdb.Error):  # a statement that cannot be interrupted is at work
            self._connection.close()
        self._spill.cleanup()

    def use_all_memory(self) -> None:
        """Let DuckDB hold all that a plan may, for results that are large themselves."""
        limit(self._connection, defaults=OF_RESULTS)

    def register(self, name: str, table: pa.Table) -> None:
        """Make a table known under a name."""
        self._connection.register(name, table)

    def inputs(self, files: Files, inputs: Inputs) -> str:
        """A FROM clause that reads a record of inputs, its sha256 and columns verified.

        DuckDB checks no page itself.

        Raises:
            IntegrityError: the file is missing or damaged, or holds something else.
        """
        shard, path = inputs.shard, None
        with suppress(FileNotFoundError):
            path = files.local(shard.name)
        if path is None or file_sha256(path) != shard.sha256:
            raise IntegrityError(
                f"{shard.name}: the file is missing or damaged (its sha256 is another one). "
                f"{REPAIR}"
            )
        inputs_file(files, inputs)
        return f"read_parquet('{_quoted(path)}', file_row_number = true)"

    def execute(self, sql: str) -> None:
        """Run a statement."""
        with _explained():
            stoppable(self._connection, lambda: self._connection.execute(sql))

    def table(self, sql: str) -> pa.Table:
        """All rows of a query."""
        with _explained():
            return stoppable(self._connection, lambda: self._connection.sql(sql).to_arrow_table())

    def on_disk(self, sql: str) -> pa.Table:
        """All rows of a large query, in its order, in a file that no name leads to any more.

        What is asked for is read from it; it ends with the table, or with the process.
        """
        with _explained(), NamedTemporaryFile(prefix="stillroom-") as file:
            path = Path(file.name)
            with explained("cannot write", path):
                stoppable(self._connection, lambda: self._write(sql, path))
                return pa.ipc.open_file(pa.memory_map(file.name)).read_all()

    def _write(self, sql: str, path: Path) -> None:
        found = self._connection.sql(sql).to_arrow_reader(_BATCH_ROWS)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, found.schema) as writer:
            for batch in found:
                writer.write_batch(batch)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of a small query."""
        with _explained():
            return stoppable(self._connection, lambda: self._connection.execute(sql).fetchall())

    def places(self, table: TableName, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Shard sha256 -> its rows among these values of `place`."""
        numbers = np.sort(numbers)
        seqs = numbers >> 32
        starts = np.flatnonzero(np.diff(seqs, prepend=-1))
        rows = np.split(numbers & 0xFFFFFFFF, starts[1:])
        return {
            self.commit(table, int(seqs[s])).shard.sha256: part
            for s, part in zip(starts, rows, strict=False)
        }

    def commit(self, table: TableName, seq: int) -> Commit:
        """The commit that a place of the index names.

        Raises:
            IntegrityError: it is not there.
        """
        commit = self.commits[table].get(seq)
        if commit is None:
            raise IntegrityError(
                f"cache/index/{table}: names commit {seq}, which is not there. Delete the folder: "
                "the next plan makes it again."
            )
        return commit

    def _part(self, name: str, table: TableName, found: Indexed, *, first: int) -> str:
        """SQL: a view of the rows of one of the stores; its commits are counted from `first` on."""
        # A file beside the segments, not a table beside them: what DuckDB groups of a UNION ALL it
        # holds in memory, and of files it spills to disk.
        newest = Path(self._spill.name, f"{name}.parquet")
        with explained("cannot write", newest):
            pq.write_table(found.newest, newest)
        paths = ", ".join(f"'{_quoted(path)}'" for path in (newest, *found.segments))
        columns = ", ".join(
            as_uuid(f.name) if f.type == KEY else f.name for f in segment_schema(table)
        )
        select = f"SELECT {columns} FROM read_parquet([{paths}])"
        # The commits of a source are counted from `first` on.
        moved = f"* REPLACE (place + {place_of(first, 0)} AS place)" if first else "*"
        return f"CREATE VIEW {name} AS SELECT {moved} FROM ({select})"


def _whole(table: TableName, parts: Sequence[str]) -> str:
    """SQL: a view of all rows; of a row that several stores have, the first one's."""
    selects = []
    for number, part in enumerate(parts):
        select = f"SELECT * FROM {part}"
        keys = [f"SELECT key FROM {earlier}" for earlier in parts[:number]]
        if keys and "key" in INDEXED[table]:
            select += f" WHERE key NOT IN ({' UNION ALL '.join(keys)})"
        selects.append(select)
    return f"CREATE VIEW {table} AS {' UNION ALL '.join(selects)}"


def limit(connection: duckdb.DuckDBPyConnection, *, defaults: Mapping[str, str]) -> None:
    """Bound what a connection holds, as the environment says.

    Raises:
        UsageError: a variable holds no size.
    """
    for variable, setting in SETTINGS.items():
        size = os.environ.get(variable, defaults[setting])
        try:
            connection.execute(f"SET {setting} = ?", [size])
        except duckdb.Error as error:
            raise UsageError(
                f"{variable}: {size!a} is no size. Write one as {defaults[setting]}, or leave it "
                "out."
            ) from error


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except duckdb.IOException as error:
        raise StillroomError(
            f"plan: {error}. Free disk space, and run the same command again."
        ) from error
    except duckdb.InvalidInputException as error:  # pages that hold what their footer does not say
        raise IntegrityError(f"plan: {str(error).splitlines()[0]}. {REPAIR}") from error
    except duckdb.OutOfMemoryException as error:
        raise StillroomError(
            f"plan: {str(error).splitlines()[0]}. That is all that it may hold; {GIVE_MORE}."
        ) from error


def as_uuid(column: str) -> str:
    """A column of keys as 128-bit numbers, which DuckDB joins in a third of the memory of bytes."""
    return f"{column}::UUID AS {column}"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
