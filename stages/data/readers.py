"""Reading records from wherever they are: JSON, JSONL, Parquet, text files, saved `datasets` folders, the Hub."""

import csv
import glob
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...storage.errors import UsageError
from ..models.identity import FileHashes
from ..recipe.sections import Data

_IN_FOLDERS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".txt", ".arrow")
# A README.md beside the data is not data: .md counts where a file or a glob names it.
_SUFFIXES = (*_IN_FOLDERS, ".md")
Record = tuple[str, dict[str, Any] | str]
"""Where it stands ("prompts.jsonl:3") and the record, or in place of it a sentence on why it is
unreadable."""


def source_files(source: str) -> list[Path]:
    """The local files a source names, in a fixed order; empty if it is a Hub id.

    Raises:
        UsageError: it looks like a path and nothing is there, or a file cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in _IN_FOLDERS)
    else:
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    files = [p for p in found if not p.is_dir()]
    for file in files:
        _refuse_unreadable(file)
    if files:
        return files
    # A Hub id is owner/name: anything else was meant as a path.
    looks_local = source.startswith((".", "/", "~")) or path.suffix in _SUFFIXES
    if looks_local or source.count("/") != 1 or path.is_dir():
        raise UsageError(
            f"data.source: nothing to read at {source} (looked in {Path.cwd()}). Name a file, a "
            f"glob or a folder of {', '.join(_IN_FOLDERS)} (.md only by file or glob), or a Hub "
            "dataset id."
        )
    return []


def _refuse_unreadable(file: Path) -> None:
    if not file.is_file():
        problem = "is a broken link or no regular file. Remove it, or name the files to read"
    elif file.suffix not in _SUFFIXES:
        problem = f"has an ending that nothing here reads. Expected {', '.join(_SUFFIXES)}"
    elif not os.access(file, os.R_OK):
        problem = "cannot be read. Check its permissions"
    else:
        return
    raise UsageError(f"data.source: {file} {problem}.")


def fingerprint(data: Data, hashes: FileHashes) -> list[str]:
    """What the source holds now: kind and hash of every local file, or the Hub's commit."""
    files = source_files(data.source)
    if files:
        return [f"{f.suffix} {hashes.sha256(f)}" for f in files]
    from huggingface_hub import HfApi

    try:
        return [data.source, data.split, str(HfApi().dataset_info(data.source).sha)]
    except Exception as error:
        raise UsageError(
            f"data.source: {data.source} is no local file and the Hub does not answer for it "
            f"({type(error).__name__}). Check the name and the network."
        ) from error


def records(data: Data) -> Iterator[Record]:
    """Every record of the source, in order, unreadable ones included."""
    files = source_files(data.source)
    if not files or any(f.suffix == ".arrow" for f in files):
        yield from _from_datasets(data, saved=bool(files))
        return
    for file in files:
        try:
            yield from _READERS[file.suffix](file)
        except (OSError, csv.Error) as error:
            raise UsageError(
                f"data.source: {file} cannot be read ({error}). Mend it, or leave it out."
            ) from error


# Bytes that are not UTF-8 are let through as surrogates, so that the record they stand in is
# rejected, not the file.
def _lines(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file.name}:{number}", _parse(line)


def _parse(line: str) -> dict[str, Any] | str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}, expected an object"
    return record


def _json(file: Path) -> Iterator[Record]:
    """One list of objects, or (as many call it .json too) one object per line."""
    if file.read_text(encoding="utf-8", errors="replace").lstrip()[:1] != "[":
        yield from _lines(file)
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"data.source: {file} is not JSON ({error}). Mend it, or write one object per line."
        ) from error
    for number, record in enumerate(content, 1):
        yield f"{file.name}:{number}", record if isinstance(record, dict) else "not an object"


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            number = 0
            for batch in parquet.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file.name}:{number}", _of_a_table(record)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UsageError(
            f"data.source: {file} is not readable Parquet ({error}). Write it again."
        ) from error


def _of_a_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the fields that its objects have only because those of other records have them."""
    return {column: _without_nulls(value) for column, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _without_nulls(held) for name, held in value.items() if held is not None}
    return value


def _csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines), 1):
            yield f"{file.name}:{number}", dict(record)


def _document(file: Path) -> Iterator[Record]:
    yield file.name, {"text": file.read_text(encoding="utf-8", errors="surrogateescape")}


_READERS = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _document,
    ".md": _document,
}


def _from_datasets(data: Data, *, saved: bool) -> Iterator[Record]:
    import datasets

    try:
        if saved:
            loaded = datasets.load_from_disk(data.source)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[data.split]
        else:
            loaded = datasets.load_dataset(data.source, split=data.split, streaming=True)
        for number, record in enumerate(loaded, 1):
            yield f"{data.source}:{number}", _of_a_table(record)
    except Exception as error:
        raise UsageError(
            f"data.source: `datasets` cannot read {data.source}, split {data.split!r}: {error}"
        ) from error
