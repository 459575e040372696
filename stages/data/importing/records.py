"""The records of a foreign table, from wherever they are, with where each stands."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ....storage.errors import UsageError
from ..sources.names import TABLES, ending
from ..sources.readers import Record, arrow_batches
from ..sources.source import Source

BATCH = 64
"""Rows of a Parquet file read at once: the lists of one row may be long."""


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if ending(file) == ".parquet":
            with pq.ParquetFile(file) as parquet:
                known = parquet.schema_arrow.names
                found = [name for name in columns if name in known]
                yield from _numbered(file, parquet.iter_batches(BATCH, columns=found))
        else:
            with pa.memory_map(str(file)) as memory:
                yield from _numbered(file, arrow_batches(memory))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{file}: not readable ({error}). Write it again.") from error


def _numbered(file: Path, batches: Iterable[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        # One row at a time: as Python objects numbers take ten times their room.
        for row in range(batch.num_rows):
            number += 1
            yield f"{file.name}:{number}", batch.slice(row, 1).to_pylist()[0]
