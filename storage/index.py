"""The index: what a plan asks of every committed row, as DuckDB views over segments and the newest commits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa

from .commits import Commit
from .errors import IntegrityError, StillroomError
from .files import Files, file_sha256
from .schema import KEY, TABLES, TableName
from .segments import Segments, complete, read_columns, segment_schema
from .shard import REPAIR, ShardInfo
from .store import Store

MEMORY = "800MB"
"""What DuckDB may hold while it counts; more goes to disk."""


class Index:
    """Views `prompts`, `generations`, `soft_targets`, `rejects`: `place` and the indexed columns of each live row.

    Keys are of type UUID in here; `key::BLOB` gives their bytes.
    """

    def __init__(self, store: Store, *, write: bool = False) -> None:
        """`write`: keep the segments that are missing (a plan writes nothing)."""
        self._spill = TemporaryDirectory(prefix="stillroom-")
        self._connection = duckdb.connect()
        self._connection.execute(f"SET memory_limit = '{MEMORY}'")
        self._connection.execute(f"SET temp_directory = '{self._spill.name}'")
        self._connection.execute("SET preserve_insertion_order = false")
        self.commits: dict[TableName, dict[int, Commit]] = {}
        """The live commits, by number."""
        for table in TABLES:
            commits = store.commits(table)
            self.commits[table] = {commit.seq: commit for commit in commits}
            self._view(store.files, table, commits, write=write)

    def close(self) -> None:
        """Give memory and disk back."""
        self._connection.close()
        self._spill.cleanup()

    def use_all_memory(self) -> None:
        """Let DuckDB hold what it likes, for results that are large themselves."""
        self.execute("RESET memory_limit")

    def register(self, name: str, table: pa.Table) -> None:
        """Make a table known under a name."""
        self._connection.register(name, table)

    def parquet(self, files: Files, shard: ShardInfo) -> str:
        """A FROM clause that reads a file of the store, its sha256 verified: DuckDB checks no page.

        Raises:
            IntegrityError: the file is missing or damaged.
        """
        try:
            whole = file_sha256(files.local(shard.name)) == shard.sha256
        except FileNotFoundError:
            whole = False
        if not whole:
            raise IntegrityError(f"{shard.name}: the file is missing or damaged (its sha256 is another one). {REPAIR}")
        return f"read_parquet('{_quoted(files.local(shard.name))}', file_row_number = true)"

    def execute(self, sql: str) -> None:
        """Run a statement."""
        with _explained():
            self._connection.execute(sql)

    def table(self, sql: str) -> pa.Table:
        """All rows of a query."""
        with _explained():
            return self._connection.sql(sql).to_arrow_table()

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of a small query."""
        with _explained():
            return self._connection.execute(sql).fetchall()

    def _view(self, files: Files, table: TableName, commits: Sequence[Commit], *, write: bool) -> None:
        known = Segments(files, table)
        segments: list[str] = []
        covered: set[int] = set()
        for part in complete(commits):
            name = known.find(part) or (known.put(part) if write else None)
            if name is not None:
                segments.append(name)
                covered.update(commit.seq for commit in part)
        newest = read_columns(files, table, [commit for commit in commits if commit.seq not in covered])
        self.register(f"newest_{table}", newest)
        columns = ", ".join(as_uuid(f.name) if f.type == KEY else f.name for f in segment_schema(table))
        select = f"SELECT {columns} FROM newest_{table}"
        if segments:
            paths = ", ".join(f"'{_quoted(files.local(name))}'" for name in segments)
            select += f" UNION ALL SELECT {columns} FROM read_parquet([{paths}])"
        self.execute(f"CREATE VIEW {table} AS {select}")


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise StillroomError(f"plan: {error}. Free memory and disk space, and run the same command again.") from error


def as_uuid(column: str) -> str:
    """A column of keys as 128-bit numbers: DuckDB joins them in a third of the memory that it takes for bytes."""
    return f"{column}::UUID AS {column}"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
