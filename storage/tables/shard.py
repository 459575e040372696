"""One shard: a Parquet file of rows of one table, immutable, described by its own metadata.

Writing checks every row, reads the finished file back and compares. Reading verifies the checksum
of every page it touches: without that, a flipped bit in a Parquet file is read as a wrong number,
silently.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..bounds import MOST_ROWS, hexdigest, inside, integer, parsed, row_groups
from ..errors import IntegrityError
from ..files.base import Content, Files
from .row_builders import text_key
from .rows import Rows, row_bytes, rows_to_table
from .schema import KEY, SCHEMAS, VERSIONS, TableName, columns_of, encodings, version_for

ROW_GROUP_BYTES = 24 << 20
"""Decoded size at which a row group ends; a larger row has a group of its own."""
FEATURE_GROUP_BYTES = 1 << 20
"""The same of `features`, whose rows are large and are read one by one, in any order."""
METADATA_KEY = b"stillroom"
_DAMAGED = (OSError, pa.ArrowException, ValueError)
REPAIR = (
    "`stillroom verify` lists what is damaged, `stillroom repair` withdraws it, and the next run "
    "makes it again."
)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What a commit record says about a shard."""

    name: str
    sha256: str
    bytes: int
    rows: int
    row_groups: tuple[int, ...]
    """Rows of each row group."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ShardInfo":
        """Read what `dataclasses.asdict` gave to JSON; ValueError where it is out of bounds."""
        size = integer(record["bytes"])
        # Each row has a key of 16 bytes that no codec makes shorter.
        rows = integer(record["rows"], most=min(size, MOST_ROWS))
        shard = cls(
            name=inside(record["name"]),
            sha256=hexdigest(record["sha256"]),
            bytes=size,
            rows=rows,
            row_groups=row_groups(record["row_groups"], rows=rows),
        )
        if unknown := sorted(record.keys() - asdict(shard).keys()):
            raise ValueError(f"of a shard nobody knows {unknown[0]!a}")
        return shard


def shard_folder(table: str) -> str:
    """Folder of a table's shards, below the store."""
    return f"data/{table}"


def shard_name(table: str, sha256: str) -> str:
    """Where a shard lies, below the store."""
    return f"{shard_folder(table)}/{sha256[:2]}/{sha256[:32]}.parquet"


def write_shard(
    files: Files, table: TableName, rows: Sequence[Mapping[str, Any]], *, about: Mapping[str, Any]
) -> ShardInfo:
    """Write checked rows as one shard and read it back. Others see it only once it is committed."""
    data = rows_to_table(table, rows)
    most = FEATURE_GROUP_BYTES if table == "features" else ROW_GROUP_BYTES
    groups = _row_groups([row_bytes(row) for row in rows], most=most)
    version = version_for(table, data)
    stored = data.select(columns_of(table, version).names)
    named = {"table": table, "format_version": version, **about}
    info = put_parquet(files, stored, groups, folder=shard_folder(table), about=named)
    if not _reads_back(ShardFile(files, info.name), data, info.row_groups):
        raise IntegrityError(
            f"{info.name}: reading it back gave other rows than were written. Check disk and "
            "memory."
        )
    return info


def _reads_back(shard: "ShardFile", data: pa.Table, row_groups: tuple[int, ...]) -> bool:
    if shard.rows_per_group != row_groups:
        return False
    start = 0
    for group, count in enumerate(row_groups):
        if not shard.read(group).equals(data.slice(start, count)):
            return False
        start += count
    return True


def put_parquet(
    files: Files, data: pa.Table, groups: Sequence[int], *, folder: str, about: Mapping[str, Any]
) -> ShardInfo:
    """Put a table as a new Parquet file named by its content, with `about` in its metadata.

    Where a file of these bytes is there already, the new one gets another name, by a number of its
    own in the metadata. An old file that no record names may be about to be vacuumed: nobody may
    come to rely on it.
    """
    content = _put(files, data, groups, folder=folder, about=about)
    while not content.fresh:
        content = _put(
            files, data, groups, folder=folder, about={**about, "again": uuid.uuid4().hex}
        )
    return ShardInfo(content.name, content.sha256, content.bytes, data.num_rows, tuple(groups))


def _put(
    files: Files, data: pa.Table, groups: Sequence[int], *, folder: str, about: Mapping[str, Any]
) -> Content:
    metadata = {"format_version": VERSIONS[about["table"]], **about}
    text = json.dumps(metadata, sort_keys=True, ensure_ascii=False)
    data = data.replace_schema_metadata({METADATA_KEY: text})
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    if about["table"] in SCHEMAS:
        options = encodings(data.schema)

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, data.schema, **options) as writer:
            start = 0
            for count in groups:
                writer.write_table(data.slice(start, count), row_group_size=count)
                start += count

    return files.put_content(folder, write, suffix=".parquet")


def _row_groups(sizes: Sequence[int], *, most: int) -> list[int]:
    """How many rows of these sizes go into each row group: what `most` bytes hold, or one."""
    groups: list[int] = []
    filled = 0
    for size in sizes:
        if not groups or filled + size > most:
            groups.append(0)
            filled = 0
        groups[-1] += 1
        filled += size
    return groups


class ShardFile:
    """A shard opened for reading; every page read is checked."""

    def __init__(self, files: Files, name: str) -> None:
        self.name = name
        """Below the store."""
        try:
            source = files.source(name)
            # Reading ahead joins the columns of a row group into few requests; a local file is read
            # as fast without.
            remote = not isinstance(source, str)
            self._file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=remote)
        except FileNotFoundError as error:
            raise IntegrityError(f"{name}: the file is missing. {REPAIR}") from error
        except _DAMAGED as error:
            raise IntegrityError(
                f"{name}: not a readable Parquet file ({error}). {REPAIR}"
            ) from error
        metadata = self._file.metadata
        self.rows_per_group = tuple(
            metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)
        )
        self._check_rows(source)
        self.starts = np.concatenate([[0], np.cumsum(self.rows_per_group, dtype=np.int64)])
        self.stored: pa.Schema = self._file.schema_arrow
        """The schema of the file."""
        self.about = self._read_about()
        self.schema = self._read_as()
        """Of what is read: that of today, whatever version the shard is of."""

    def _check_rows(self, source: Any) -> None:
        """No checksum covers the footer, and arrays are made as long as it says."""
        size = os.path.getsize(source) if isinstance(source, str) else source.seek(0, os.SEEK_END)
        # Each row has a key of 16 bytes that no codec makes shorter.
        if min(self.rows_per_group, default=0) < 0 or sum(self.rows_per_group) > size:
            raise IntegrityError(
                f"{self.name}: row groups of {self.rows_per_group} rows in a file of {size} bytes. "
                f"{REPAIR}"
            )

    def _read_about(self) -> dict[str, Any]:
        try:
            about: dict[str, Any] = parsed(self.stored.metadata[METADATA_KEY])
            version, table = about["format_version"], about["table"]
        except (TypeError, KeyError, ValueError) as error:
            raise IntegrityError(
                f"{self.name}: not a shard (no `stillroom` metadata). {REPAIR}"
            ) from error
        if not self.name.startswith(f"{shard_folder(table)}/"):
            raise IntegrityError(
                f"{self.name}: holds {table}, which do not belong in this folder. {REPAIR}"
            )
        if version not in range(1, VERSIONS.get(table, 0) + 1):
            raise IntegrityError(
                f"{self.name}: format version {version}, this Stillroom reads {table} up to "
                f"version {VERSIONS.get(table)}. Use the version of Stillroom that wrote the store."
            )
        if table in SCHEMAS and not self.stored.equals(columns_of(table, version)):
            raise IntegrityError(
                f"{self.name}: the columns are not those of {table} in this version of Stillroom. "
                "Go on with the version that wrote the store, or run the recipe into a new "
                "folder (storage.dir)."
            )
        return about

    def _read_as(self) -> pa.Schema:
        table = self.about["table"]
        if table not in SCHEMAS:
            return self.stored
        return SCHEMAS[table].with_metadata(self.stored.metadata)

    @property
    def rows(self) -> int:
        """Rows in the shard."""
        return int(self.starts[-1])

    @property
    def numbers(self) -> np.ndarray:
        """Indices of the rows that can be read, ascending: of a shard, all."""
        return np.arange(self.rows)

    def read(
        self, group: int, columns: Sequence[str] | None = None, *, threads: bool = True
    ) -> pa.Table:
        """One row group, page checksums verified; `threads`: columns are decoded side by side."""
        names = list(self.schema.names if columns is None else columns)
        if unknown := sorted(set(names) - set(self.schema.names)):
            raise IntegrityError(
                f"{self.name}: no column {', '.join(unknown)}. It has "
                f"{', '.join(self.schema.names)}."
            )
        try:
            return self._read_group(group, names, threads=threads)
        except _DAMAGED as error:
            column, cause = self._damaged_column(group, names, error)
            raise IntegrityError(
                f"{self.name}: {column}row group {group} is damaged ({cause}). {REPAIR}"
            ) from error

    def rows_of(self, group: int, columns: Sequence[str] | None = None) -> Rows:
        """The rows of one row group, page checksums verified."""
        table = self.read(group, columns)
        try:
            return Rows(table)
        except IntegrityError as error:
            raise IntegrityError(f"{self.name}: row group {group}: {error} {REPAIR}") from error

    def read_all(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Every row, page checksums verified."""
        parts = [self.read(group, columns) for group in range(len(self.rows_per_group))]
        names = self.schema.names if columns is None else columns
        return pa.concat_tables([self.schema.empty_table().select(list(names)), *parts])

    def select(
        self, rows: np.ndarray, columns: Sequence[str] | None = None, *, threads: bool = True
    ) -> pa.Table:
        """Rows by ascending index, page checksums verified.

        Row groups that hold none of them are not read.
        """
        edges = np.searchsorted(rows, self.starts)  # row group g holds edges[g] to edges[g + 1]
        names = self.schema.names if columns is None else columns
        parts = [self.schema.empty_table().select(list(names))]
        for group in np.flatnonzero(np.diff(edges)).tolist():
            table = self.read(group, columns, threads=threads)
            wanted = rows[edges[group] : edges[group + 1]] - self.starts[group]
            if len(wanted) < table.num_rows:
                # Not of the numpy array: pyarrow would import pandas for that, and a run that
                # resumes would wait.
                buffers = [None, pa.py_buffer(wanted.astype(np.int64))]
                table = table.take(pa.Array.from_buffers(pa.int64(), len(wanted), buffers))
            parts.append(table)
        return parts[1] if len(parts) == 2 else pa.concat_tables(parts)

    def _damaged_column(
        self, group: int, names: Sequence[str], error: Exception
    ) -> tuple[str, Exception]:
        for name in names:
            try:
                self._read_group(group, [name])
            except _DAMAGED as cause:
                return f"column {name}, ", cause
        return "", error

    def _read_group(self, group: int, names: list[str], *, threads: bool = True) -> pa.Table:
        there = [name for name in names if name in self.stored.names]
        table = self._file.read_row_group(group, columns=there, use_threads=threads)
        expected = self.rows_per_group[group]
        # A page header, which no checksum covers, may say another number.
        if table.num_rows != expected:
            raise ValueError(f"{table.num_rows} rows can be read of {expected}")
        if len(there) == len(names):
            return table
        # A column of a later version is null in every row of this one.
        columns = [
            table[name] if name in there else pa.nulls(expected, self.schema.field(name).type)
            for name in names
        ]
        return pa.Table.from_arrays(
            columns, schema=pa.schema([self.schema.field(n) for n in names])
        )

    def column_bytes(self) -> dict[str, int]:
        """Compressed bytes of each column, from the footer alone."""
        sizes = dict.fromkeys(self.schema.names, 0)
        metadata = self._file.metadata
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                sizes[chunk.path_in_schema.split(".")[0]] += chunk.total_compressed_size
        return sizes

    def group_of(self, row: int) -> int:
        """The row group that holds a row."""
        if not 0 <= row < self.rows:
            raise IntegrityError(
                f"{self.name}: row {row} was asked for, the shard has {self.rows}. {REPAIR}"
            )
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def take(
        self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rows by index, in the order given; ascending indices read each row group once."""
        held, loaded = -1, Rows(self.schema.empty_table())
        for row in rows:
            group = self.group_of(row)
            if group != held:
                held, loaded = group, self.rows_of(group, columns)
            yield loaded[int(row - self.starts[group])]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that holds rows of a shard: the shard itself, or a published one."""

    files: Files
    name: str
    sha256: str
    """That its bytes must have."""
    kind: type[ShardFile] = ShardFile

    def open(self) -> ShardFile:
        """Its rows."""
        return self.kind(self.files, self.name)


def text_keys(shard: ShardFile, rows: np.ndarray) -> pa.Array:
    """[R] binary: text keys of some rows of a shard of `generations` or `soft_targets`.

    Rows of version 1 do not store it, so it is computed.
    """
    found = shard.select(rows, ["text_key"])["text_key"].combine_chunks()
    if not found.null_count:
        return found
    texts = Rows(shard.select(rows, ["token_ids"]))
    return pa.array([text_key(texts[row]["token_ids"]) for row in range(len(texts))], KEY)
