"""SQL over a store: DuckDB views of what is committed, in memory.

The views see no other file and no network.

They are for looking and for choosing rows. DuckDB does not verify page checksums; `Store` and
`verify` do. A signal ends a statement (`stopping.py`), and `limits.py` bounds what it may hold.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from fsspec import AbstractFileSystem

from ..errors import IntegrityError, StillroomError, UsageError
from ..files.objects import ObjectFiles, ObjectReader
from ..tables.schema import SCHEMAS, TABLES
from ..tables.shard import ShardInfo
from .commits import Commit
from .index import limit
from .inputs import INPUTS_SCHEMA, SOURCE, Inputs, read_inputs
from .limits import GIVE_MORE, OF_QUERIES
from .stopping import stoppable
from .store import Store

_COMMITS_SCHEMA = pa.schema(
    [
        ("table_name", pa.string()),
        ("seq", pa.int64()),
        ("stage", pa.string()),
        ("writer", pa.string()),
        ("shard", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("versions", pa.string()),
        ("created", pa.string()),
    ]
)


def connect(store: Store) -> duckdb.DuckDBPyConnection:
    """A connection with a view of each table, of commits and of inputs, as they are now.

    Where a store has sources, the views hold their rows too; a row that several have is there as
    often.
    """
    connection = duckdb.connect()
    sight = _Sight()
    for number, (part, _) in enumerate(store.parts):
        sight.add(part, number)
    if sight.system.sizes:
        connection.register_filesystem(sight.system)
    _shut_off(connection, sight, spill=store.files.cache.path("cache").absolute())
    commits = _commits(commit for table in TABLES for commit in store.commits(table))
    with explained():
        for table in TABLES:
            _make_view(connection, table, SCHEMAS[table], sight.selects[table])
        inputs = INPUTS_SCHEMA.append(SOURCE).append(pa.field("data_id", pa.string()))
        _make_view(connection, "inputs", inputs, sight.inputs)
        connection.from_arrow(commits).create("commits")
    return connection


@contextmanager
def connected(store: Store) -> Iterator[duckdb.DuckDBPyConnection]:
    """`connect`, closed in the end."""
    connection = connect(store)
    try:
        yield connection
    finally:
        with suppress(duckdb.Error):  # a statement that cannot be interrupted is at work
            connection.close()


def _shut_off(connection: duckdb.DuckDBPyConnection, sight: "_Sight", *, spill: Path) -> None:
    """Let DuckDB read the files in sight and no others, nor the network; it cannot be undone."""
    limit(connection, defaults=OF_QUERIES)
    with suppress(OSError):  # where memory does not suffice DuckDB makes the last folder, no more
        spill.parent.mkdir(parents=True, exist_ok=True)
    for setting in (
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        f"temp_directory = {_quoted(spill)}",
        f"allowed_directories = [{', '.join(map(_quoted, sight.roots))}]",
        f"allowed_paths = [{', '.join(map(_quoted, sight.links))}]",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")


def query(store: Store, sql: str) -> pa.Table:
    """The result of one SELECT over the views."""
    with connected(store) as connection, explained():
        _check_select(connection, sql)
        return stoppable(connection, lambda: connection.sql(sql).to_arrow_table())


def first_rows(store: Store, sql: str, *, most: int) -> tuple[pa.Table, bool]:
    """The first rows of one SELECT over the views, and whether these are all.

    DuckDB makes no more rows than these.
    """
    with connected(store) as connection, explained():
        _check_select(connection, sql)
        rows = stoppable(connection, lambda: connection.sql(sql).limit(most + 1).to_arrow_table())
        return rows.slice(0, most), rows.num_rows <= most


def batches(
    connection: duckdb.DuckDBPyConnection, sql: str, *, rows: int
) -> Iterator[pa.RecordBatch]:
    """The result of a query, so many rows at a time."""
    reader = stoppable(connection, lambda: connection.sql(sql).to_arrow_reader(rows))
    while (batch := stoppable(connection, lambda: next(reader, None))) is not None:
        yield batch


def _check_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise UsageError(
            "query: not one SELECT statement. A store is never changed by SQL; give one query."
        )


@contextmanager
def explained(command: str = "query") -> Iterator[None]:
    """What DuckDB raises in this block, as an error of ours that begins with the command."""
    try:
        yield
    except duckdb.IOException as error:
        if ".parquet" not in str(error):  # what it puts on disk where memory does not suffice
            raise StillroomError(
                f"{command}: {error}. Free space, or mend the disk, and run the same command again."
            ) from error
        raise IntegrityError(
            f"{command}: a shard cannot be read ({error}). Run `stillroom verify`."
        ) from error
    except duckdb.OutOfMemoryException as error:
        raise UsageError(
            f"{command}: {str(error).splitlines()[0]}. That is all that it may hold; ask for less, "
            f"or {GIVE_MORE}."
        ) from error
    except duckdb.Error as error:
        raise UsageError(f"{command}: {error}") from error


def _make_view(
    connection: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, selects: Sequence[str]
) -> None:
    """A view of what some queries select, with all columns: later ones are null in older rows."""
    connection.from_arrow(schema.empty_table()).create(f"no_{name}")
    parts = [f"SELECT * FROM no_{name}", *selects]
    sql = f"CREATE VIEW {name} AS {' UNION ALL BY NAME '.join(parts)}"
    stoppable(connection, lambda: connection.execute(sql))


def _parquet(root: str, shards: list[ShardInfo]) -> str:
    paths = (_quoted(f"{root}/{shard.name}") for shard in shards)
    # Shards of an earlier version lack columns.
    return f"SELECT * FROM read_parquet([{', '.join(paths)}], union_by_name = true)"


def _links(root: str, names: Sequence[str]) -> list[str]:
    """Where files are that are links, as all are in the Hub's cache."""
    if not names or not Path(root, names[0]).is_symlink():
        return []
    return [str(Path(root, name).resolve()) for name in names]


def _inputs(store: Store) -> dict[str, Inputs]:
    ids = [name.removesuffix(".json") for name in store.files.names("inputs")]
    found = {data_id: read_inputs(store.files, data_id) for data_id in ids}
    return {data_id: inputs for data_id, inputs in found.items() if inputs is not None}


def _commits(commits: Iterable[Commit]) -> pa.Table:
    rows = [
        {
            "table_name": commit.table,
            "seq": commit.seq,
            "stage": commit.stage,
            "writer": commit.writer,
            "shard": commit.shard.name,
            "sha256": commit.shard.sha256,
            "bytes": commit.shard.bytes,
            "rows": commit.shard.rows,
            "tokens": commit.tokens,
            "seconds": commit.seconds,
            "versions": json.dumps(dict(commit.versions), sort_keys=True),
            "created": commit.created,
        }
        for commit in commits
    ]
    return pa.Table.from_pylist(rows, schema=_COMMITS_SCHEMA)


def _quoted(value: Path | str) -> str:
    return "'" + str(value).replace("'", "''") + "'"


class _Shards(AbstractFileSystem):  # type: ignore[misc]  # fsspec carries no types
    """What DuckDB sees of object stores: the files that records name, with the sizes they give."""

    ROOT = "stillroom://store"
    protocol = "stillroom"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, tuple[ObjectFiles, str]] = {}
        self.sizes: dict[str, int] = {}
        """Bytes of each file, by its path."""

    def add(self, root: str, files: ObjectFiles, sizes: Mapping[str, int]) -> None:
        """Files of one store, below `root`."""
        self._files |= {f"{root}/{name}": (files, name) for name in sizes}
        self.sizes |= {f"{root}/{name}": size for name, size in sizes.items()}

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if path not in self.sizes:
            raise FileNotFoundError(path)
        return {"name": path, "size": self.sizes[path], "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        return [path]

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)  # they never change

    def open(self, path: str, mode: str = "rb", **options: Any) -> ObjectReader:
        size = self.info(path)["size"]
        files, name = self._files[path]
        return ObjectReader(files, name, size)


class _Sight:
    """What of some stores DuckDB may see: their places, and a SELECT for each table of each."""

    def __init__(self) -> None:
        self.system = _Shards()
        self.roots: list[str] = []
        self.links: list[str] = []
        """Files outside the roots, which links there lead to."""
        self.selects: dict[str, list[str]] = {table: [] for table in TABLES}
        self.inputs: list[str] = []

    def add(self, store: Store, number: int) -> None:
        """Take one more store."""
        shards = {table: store.shards(table) for table in TABLES}
        inputs = _inputs(store)
        files = [shard for table in TABLES for shard in shards[table]]
        files += [record.shard for record in inputs.values()]
        root = self._place(store, number, files)
        for table in TABLES:
            if shards[table]:
                self.selects[table].append(_parquet(root, shards[table]))
        for data_id, record in inputs.items():
            rows = _parquet(root, [record.shard])
            self.inputs.append(f"SELECT *, {_quoted(data_id)} AS data_id FROM ({rows})")

    def _place(self, store: Store, number: int, shards: list[ShardInfo]) -> str:
        """Make a store's files known; the folder, or the URL, that DuckDB finds them below."""
        if isinstance(store.files, ObjectFiles):
            root = f"{_Shards.ROOT}/{number}"
            self.system.add(root, store.files, {shard.name: shard.bytes for shard in shards})
        else:
            root = str(Path(store.root).resolve())
            self.links += _links(root, [shard.name for shard in shards])
        self.roots.append(root)
        return root
