"""SQL over a store: DuckDB views of what is committed, in memory, shut off from other files and from the network.

For looking and for choosing rows. DuckDB does not verify page checksums; `Store` and `verify` do.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from .errors import IntegrityError, UsageError
from .inputs import INPUTS_SCHEMA, read_inputs
from .schema import SCHEMAS, TABLES
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
    root = store.root.resolve()
    connection = duckdb.connect()
    for setting in (
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        f"temp_directory = {_quoted(root / 'cache')}",
        f"allowed_directories = [{_quoted(root)}]",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")
    with _explained():
        for table in TABLES:
            paths = [root / commit.shard.name for commit in store.commits(table)]
            _make_view(connection, table, SCHEMAS[table], _parquet(paths) if paths else None)
        _make_view(connection, "inputs", INPUTS_SCHEMA.append(pa.field("data_id", pa.string())), _inputs(store, root))
        connection.from_arrow(_commits(store)).create("commits")
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


def _parquet(paths: list[Path]) -> str:
    return f"SELECT * FROM read_parquet([{', '.join(map(_quoted, paths))}])"


def _inputs(store: Store, root: Path) -> str | None:
    selects = []
    for name in store.files.names("inputs"):
        data_id = name.removesuffix(".json")
        if (inputs := read_inputs(store.files, data_id)) is not None:
            file = _quoted(root / inputs.shard.name)
            selects.append(f"SELECT *, {_quoted(data_id)} AS data_id FROM read_parquet({file})")
    return " UNION ALL ".join(selects) or None


def _commits(store: Store) -> pa.Table:
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
        for table in TABLES
        for commit in store.commits(table)
    ]
    return pa.Table.from_pylist(rows, schema=_COMMITS_SCHEMA)


def _quoted(value: Path | str) -> str:
    return "'" + str(value).replace("'", "''") + "'"
