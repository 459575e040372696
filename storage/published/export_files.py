"""Parquet files to publish: rows become row groups, row groups become files of a bounded size.

What they have beside a store's shards: content-defined chunking, by which a Hub stores and sends
the pages that two versions share only once. Sizes do not depend on how the rows come in, so equal
rows give equal bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files.base import explained
from ..tables.schema import encodings
from ..tables.shard import METADATA_KEY, ROW_GROUP_BYTES

FILE_BYTES = 256 << 20
"""A file ends with the row group in which it reaches this size."""
CHUNKING = {"min_chunk_size": 256 << 10, "max_chunk_size": 1 << 20, "norm_level": 0}
"""Bytes of a page, decoded; those that `datasets` writes with."""


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """A Parquet file that is being written."""

    sink: pa.NativeFile
    writer: pq.ParquetWriter


class TableFiles:
    """The files of one table's split, written into a folder under numbers.

    Their final names need the last number.
    """

    def __init__(
        self,
        folder: Path,
        *,
        schema: pa.Schema,
        about: Mapping[str, Any],
        counted: str,
        group_bytes: int | None = None,
    ) -> None:
        """`schema`: columns to write.

        `about`: goes into each file's metadata. `counted`: column of tokens to sum. `group_bytes`:
        decoded size of a row group; None: `ROW_GROUP_BYTES`.
        """
        self._group_bytes = group_bytes or ROW_GROUP_BYTES
        self._folder, self._counted = folder, counted
        metadata = {METADATA_KEY: json.dumps(about, sort_keys=True, ensure_ascii=False)}
        self._schema = schema.with_metadata(metadata)
        self._options = encodings(schema) | {"use_content_defined_chunking": CHUNKING}
        self._pending: list[pa.Table] = []
        self._held, self._tokens = 0, 0  # bytes and tokens of what is pending
        self._file: _OpenFile | None = None
        self.paths: list[Path] = []
        self.row_groups: list[list[int]] = []
        """Rows of each row group, per file."""
        self.tokens: list[int] = []
        """Per file."""
        self.bytes = 0
        """Of all rows, decoded."""

    def add(self, rows: pa.Table) -> None:
        """Add rows; a row group ends before the row that would make it too large."""
        tokens = rows[self._counted].to_pylist()
        rows = rows.select(self._schema.names).cast(self._schema)
        start = 0
        for index, size in enumerate(row_sizes(rows).tolist()):
            if self._held and self._held + size > self._group_bytes:
                self._pending.append(rows.slice(start, index - start))
                self._flush()
                start = index
            self._held += size
            self._tokens += tokens[index]
            self.bytes += size
        self._pending.append(rows.slice(start))

    def close(self) -> None:
        """Write what is left; a table without rows is one file without rows."""
        self._flush()
        if not self.paths:
            self._file = self._open()
        if self._file is not None:
            self._close_file(self._file)

    def _flush(self) -> None:
        group = pa.concat_tables([self._schema.empty_table(), *self._pending]).combine_chunks()
        tokens, self._tokens = self._tokens, 0
        self._pending, self._held = [], 0
        if not group.num_rows:
            return
        file = self._file = self._file or self._open()
        with explained("cannot write", self.paths[-1]):
            file.writer.write_table(group, row_group_size=group.num_rows)
            self.row_groups[-1].append(group.num_rows)
            self.tokens[-1] += tokens
            if file.sink.tell() >= FILE_BYTES:
                self._close_file(file)

    def _open(self) -> _OpenFile:
        path = self._folder / f"{len(self.paths):05d}"
        with explained("cannot write", path):
            sink = pa.OSFile(str(path), "wb")
            writer = pq.ParquetWriter(sink, self._schema, **self._options)
        self.paths.append(path)
        self.row_groups.append([])
        self.tokens.append(0)
        return _OpenFile(sink, writer)

    def _close_file(self, file: _OpenFile) -> None:
        with explained("cannot write", self.paths[-1]):
            file.writer.close()
            file.sink.close()
        self._file = None


def row_sizes(table: pa.Table) -> np.ndarray:
    """[R] bytes of each row in Arrow's memory: values and offsets, without validity bits."""
    sizes = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        sizes += np.concatenate(
            [np.zeros(0, np.int64), *(_sizes(chunk) for chunk in column.chunks)]
        )
    return sizes


def _sizes(array: pa.Array) -> np.ndarray:
    kind = array.type
    if pa.types.is_list(kind):
        lengths = _filled(pc.list_value_length(array))
        before = np.concatenate([[0], np.cumsum(_sizes(array.flatten()))])
        ends = np.cumsum(lengths)
        of_lists: np.ndarray = before[ends] - before[ends - lengths] + 4
        return of_lists
    if pa.types.is_struct(kind):
        fields = (_sizes(part) for part in array.flatten())
        return sum(fields, start=np.zeros(len(array), np.int64))
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return _filled(pc.binary_length(array)) + 4
    return np.full(len(array), kind.bit_width // 8, np.int64)


def _filled(lengths: pa.Array) -> np.ndarray:
    filled: np.ndarray = lengths.fill_null(0).to_numpy(zero_copy_only=False)
    return filled.astype(np.int64)
