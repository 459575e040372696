"""SQL over a store: DuckDB views of what is committed, in memory, shut off from other files and from the network.

For looking and for choosing rows. DuckDB does not verify page checksums; `Store` and `verify` do.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from fsspec import AbstractFileSystem

from .commits import Commit
from .errors import IntegrityError, UsageError
from .inputs import INPUTS_SCHEMA, Inputs, read_inputs
from .object_files import ObjectFiles, ObjectReader
from .schema import SCHEMAS, TABLES
from .shard import ShardInfo
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
    """A connection with views prompts, generations, soft_targets, rejects, commits and inputs as they are now."""
    commits = {table: store.commits(table) for table in TABLES}
    shards = {table: [commit.shard for commit in commits[table]] for table in TABLES}
    inputs = _inputs(store)
    connection = duckdb.connect()
    if isinstance(store.files, ObjectFiles):
        everything = [*(shard for table in TABLES for shard in shards[table]), *(i.shard for i in inputs.values())]
        connection.register_filesystem(_Shards(store.files, {shard.name: shard.bytes for shard in everything}))
        root = _Shards.ROOT
    else:
        root = str(Path(store.root).resolve())
    for setting in (
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        f"temp_directory = {_quoted(store.files.cache.path('cache').absolute())}",
        f"allowed_directories = [{_quoted(root)}]",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")
    with _explained():
        for table in TABLES:
            _make_view(connection, table, SCHEMAS[table], _parquet(root, shards[table]) if shards[table] else None)
        selects = [f"SELECT *, {_quoted(i)} AS data_id FROM ({_parquet(root, [inputs[i].shard])})" for i in inputs]
        schema = INPUTS_SCHEMA.append(pa.field("data_id", pa.string()))
        _make_view(connection, "inputs", schema, " UNION ALL ".join(selects) or None)
        connection.from_arrow(_commits(commit for table in TABLES for commit in commits[table])).create("commits")
    return connection


def query(store: Store, sql: str) -> pa.Table:
    """The result of one SELECT over the views."""
    with connect(store) as connection, _explained():
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UsageError("query: not one SELECT statement. A store is never changed by SQL; give one query.")
        return connection.sql(sql).to_arrow_table()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except duckdb.IOException as error:
        raise IntegrityError(f"query: a shard cannot be read ({error}). Run `stillroom verify`.") from error
    except duckdb.Error as error:
        raise UsageError(f"query: {error}") from error


def _make_view(connection: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, select: str | None) -> None:
    if select is None:
        connection.from_arrow(schema.empty_table()).create(name)
    else:
        connection.execute(f"CREATE VIEW {name} AS {select}")


def _parquet(root: str, shards: list[ShardInfo]) -> str:
    paths = (_quoted(f"{root}/{shard.name}") for shard in shards)
    return f"SELECT * FROM read_parquet([{', '.join(paths)}])"


def _inputs(store: Store) -> dict[str, Inputs]:
    names = [name.removesuffix(".json") for name in store.files.names("inputs")]
    return {name: inputs for name in names if (inputs := read_inputs(store.files, name)) is not None}


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


class _Shards(AbstractFileSystem):
    """What DuckDB sees of an object store: the files that records name, with the sizes that they give."""

    ROOT = "stillroom://store"
    protocol = "stillroom"
    cachable = False

    def __init__(self, files: ObjectFiles, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self._files, self._sizes = files, sizes

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        name = path.removeprefix(f"{self.ROOT}/")
        if name not in self._sizes:
            raise FileNotFoundError(path)
        return {"name": name, "size": self._sizes[name], "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        return [path]

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)  # they never change

    def open(self, path: str, mode: str = "rb", **options: Any) -> ObjectReader:
        info = self.info(path)
        return ObjectReader(self._files, info["name"], info["size"])
