"""SQL over a store: DuckDB views of what is committed, in memory, shut off from other files and from the network.

For looking and for choosing rows. DuckDB does not verify page checksums; `Store` and `verify` do.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from fsspec import AbstractFileSystem

from ..errors import IntegrityError, UsageError
from ..files.objects import ObjectFiles, ObjectReader
from ..tables.schema import SCHEMAS, TABLES
from ..tables.shard import ShardInfo
from .commits import Commit
from .inputs import INPUTS_SCHEMA, Inputs, read_inputs
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
    """A connection with views prompts, generations, soft_targets, rejects, commits and inputs as they are now.

    Where a store has sources, the views hold their rows too; a row that several have is there as
    often.
    """
    connection = duckdb.connect()
    system, links = _Shards(), list[str]()
    roots, views = [], {table: list[str]() for table in TABLES}
    inputs: list[str] = []
    for number, (part, _) in enumerate(store.parts):
        if isinstance(part.files, ObjectFiles):
            roots.append(root := f"{_Shards.ROOT}/{number}")
        else:
            roots.append(root := str(Path(part.root).resolve()))
        shards = {table: part.shards(table) for table in TABLES}
        known = _inputs(part)
        everything = [
            *(s for table in TABLES for s in shards[table]),
            *(i.shard for i in known.values()),
        ]
        if isinstance(part.files, ObjectFiles):
            system.add(root, part.files, {shard.name: shard.bytes for shard in everything})
        else:
            links += _links(root, [shard.name for shard in everything])
        for table in TABLES:
            views[table] += [_parquet(root, shards[table])] if shards[table] else []
        inputs += [
            f"SELECT *, {_quoted(i)} AS data_id FROM ({_parquet(root, [known[i].shard])})"
            for i in known
        ]
    if system.sizes:
        connection.register_filesystem(system)
    for setting in (
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        f"temp_directory = {_quoted(store.files.cache.path('cache').absolute())}",
        f"allowed_directories = [{', '.join(map(_quoted, roots))}]",
        f"allowed_paths = [{', '.join(map(_quoted, links))}]",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")
    with _explained():
        for table in TABLES:
            _make_view(
                connection, table, SCHEMAS[table], " UNION ALL BY NAME ".join(views[table]) or None
            )
        schema = INPUTS_SCHEMA.append(pa.field("data_id", pa.string()))
        _make_view(connection, "inputs", schema, " UNION ALL ".join(inputs) or None)
        connection.from_arrow(
            _commits(commit for table in TABLES for commit in store.commits(table))
        ).create("commits")
    return connection


def query(store: Store, sql: str) -> pa.Table:
    """The result of one SELECT over the views."""
    with connect(store) as connection, _explained():
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UsageError(
                "query: not one SELECT statement. A store is never changed by SQL; give one query."
            )
        return connection.sql(sql).to_arrow_table()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except duckdb.IOException as error:
        raise IntegrityError(
            f"query: a shard cannot be read ({error}). Run `stillroom verify`."
        ) from error
    except duckdb.Error as error:
        raise UsageError(f"query: {error}") from error


def _make_view(
    connection: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, select: str | None
) -> None:
    if select is None:
        connection.from_arrow(schema.empty_table()).create(name)
    else:
        connection.execute(f"CREATE VIEW {name} AS {select}")


def _parquet(root: str, shards: list[ShardInfo]) -> str:
    paths = (_quoted(f"{root}/{shard.name}") for shard in shards)
    return f"SELECT * FROM read_parquet([{', '.join(paths)}])"


def _links(root: str, names: Sequence[str]) -> list[str]:
    """Where files are that are links, as all are in the Hub's cache."""
    if not names or not Path(root, names[0]).is_symlink():
        return []
    return [str(Path(root, name).resolve()) for name in names]


def _inputs(store: Store) -> dict[str, Inputs]:
    names = [name.removesuffix(".json") for name in store.files.names("inputs")]
    return {
        name: inputs for name in names if (inputs := read_inputs(store.files, name)) is not None
    }


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
    """What DuckDB sees of object stores: the files that records name, with the sizes that they give."""

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
