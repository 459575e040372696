"""The records of a foreign table, from wherever they are, with where each stands."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ....storage.errors import UsageError
from ..sources.names import TABLES, ending
from ..sources.readers import BATCH, Record, arrow_batches, readable, rows_of
from ..sources.source import Source


def table_records(source: str, split: str, columns: Sequence[str]) -> Iterator[Record]:
    """Every record; of a Parquet file the named columns alone are read.

    Raises:
        UsageError: nothing readable is there.
    """
    named = Source(
        name=source, field="SOURCE", split=split, split_field="--split", asked=split != "train"
    )
    found = named.files()
    if found is None or any(ending(file) not in TABLES for file in found.files):
        yield from named.records()
        return
    for file in found.files:
        yield from _rows(file, columns)


def _rows(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Rows of a Parquet or Arrow file."""
    try:
        with readable("not a table that can be read"):
            for number, row in enumerate(rows_of(_batches(file, columns)), 1):
                yield f"{file.name}:{number}", row
    except ValueError as error:
        raise UsageError(f"{file}: {error}. Write it again.") from error


def _batches(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if ending(file) == ".parquet":
        with pq.ParquetFile(file) as parquet:
            known = parquet.schema_arrow.names
            yield from parquet.iter_batches(BATCH, columns=[n for n in columns if n in known])
        return
    with pa.memory_map(str(file)) as memory:
        yield from arrow_batches(memory)
