"""Reading records from wherever they are: JSON, JSONL, Parquet, text files, saved `datasets` folders, the Hub."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..storage.errors import UsageError
from .identity import FileHashes
from .sections import Data

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".txt", ".md")
Record = tuple[str, dict[str, Any] | str]
"""Where it stands ("prompts.jsonl:3") and the record, or in place of it a sentence on why it is unreadable."""


def source_files(source: str) -> list[Path]:
    """The local files a source names, in a fixed order; empty if it is a Hub id.

    Raises:
        UsageError: it looks like a path and nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (*_SUFFIXES, ".arrow"))
    else:
        files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    if files:
        return files
    if source.startswith((".", "/", "~")) or path.suffix in _SUFFIXES or source.count("/") != 1 or path.is_dir():
        raise UsageError(
            f"data.source: nothing to read at {source} (looked in {Path.cwd()}). "
            f"Name a file, a glob or a folder of {', '.join(_SUFFIXES)}, or a Hub dataset id."
        )
    return []


def fingerprint(data: Data, hashes: FileHashes) -> list[str]:
    """What the source holds now: a hash per local file, or the Hub's commit."""
    files = source_files(data.source)
    if files:
        return [hashes.sha256(f) for f in files]
    from huggingface_hub import HfApi

    try:
        return [data.source, data.split, str(HfApi().dataset_info(data.source).sha)]
    except Exception as error:
        raise UsageError(
            f"data.source: {data.source} is no local file and the Hub does not answer for it ({type(error).__name__}). "
            "Check the name and the network."
        ) from error


def records(data: Data) -> Iterator[Record]:
    """Every record of the source, in order, unreadable ones included."""
    files = source_files(data.source)
    if not files or any(f.suffix == ".arrow" for f in files):
        yield from _from_datasets(data, saved=bool(files))
        return
    for file in files:
        yield from _READERS[file.suffix](file)


def _lines(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file.name}:{number}", _parse(line)


def _parse(line: str) -> dict[str, Any] | str:
    try:
        record = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    return record if isinstance(record, dict) else f"a JSON {type(record).__name__}, expected an object"


def _json(file: Path) -> Iterator[Record]:
    """One list of objects, or (as many call it .json too) one object per line."""
    if file.read_text(encoding="utf-8", errors="replace").lstrip()[:1] != "[":
        yield from _lines(file)
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
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
                    yield f"{file.name}:{number}", record
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"data.source: {file} is not readable Parquet ({error}). Write it again.") from error


def _csv(file: Path) -> Iterator[Record]:
    import csv

    with file.open(encoding="utf-8", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines), 1):
            yield f"{file.name}:{number}", dict(record)


def _document(file: Path) -> Iterator[Record]:
    yield file.name, {"text": file.read_text(encoding="utf-8", errors="replace")}


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
            loaded = loaded[data.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(data.source, split=data.split, streaming=True)
    except Exception as error:
        raise UsageError(f"data.source: `datasets` cannot open {data.source}, split {data.split!r}: {error}") from error
    for number, record in enumerate(loaded, 1):
        yield f"{data.source}:{number}", dict(record)
