"""Reading the records of a file by its ending: JSON, JSONL, Parquet, CSV, text; packed and not."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from ....storage.bounds import each_once, parsed, refuse_deep
from ....storage.errors import UsageError
from .names import IMAGES, unpacked
from .splits import split_of_image

Record = tuple[str, dict[str, Any] | str]
"""Where it stands ("a/prompts.jsonl:3") and the record, or in place of it a sentence on why it is
unreadable."""
BATCH = 64
"""Rows of a Parquet file read at once: one may be a long document, or have thousands of columns."""
_AT_ONCE = 4 << 20
"""Bytes of a table that are Python objects at once, as Arrow counts them."""
_TOO_MANY = "more cells than the header has columns: a comma stands in a cell without quotes"
_TIMES, _ALWAYS = 100, 64 << 20
"""How much larger what is read at once of a packed file may be unpacked, and the bytes that it may
always have."""
_LINE_BY_LINE = (".jsonl", ".ndjson", ".csv")
_MARK = "\ufeff"  # the byte-order mark that some programs write at the beginning of UTF-8


def read_file(file: Path, name: str, *, field: str) -> Iterator[Record]:
    """Every record of a file.

    Args:
        file: Where it is.
        name: What records are named by: its path in the source.
        field: The field of the recipe that names the source.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        yield from _READERS[unpacked(file)](file, name)
    except (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError, zlib.error) as error:
        raise UsageError(
            f"{field}: {file} cannot be read ({error}). Mend it, or leave it out."
        ) from error


def _open(file: Path, *, newline: str | None = None) -> io.TextIOWrapper:
    """The text of a file, unpacked and without a byte-order mark.

    Bytes that are not UTF-8 are let through as surrogates, so that the record they stand in is
    rejected, not the file.
    """
    return io.TextIOWrapper(
        _bytes(file), encoding="utf-8-sig", errors="surrogateescape", newline=newline
    )


def _bytes(file: Path) -> Any:
    packed = file.suffix.lower()
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": _open_zstd,
    }
    if packed not in openers:
        return file.open("rb")
    by_line = unpacked(file) in _LINE_BY_LINE
    most = max(_ALWAYS, _TIMES * file.stat().st_size)
    return io.BufferedReader(_Unpacked(openers[packed](file), most, by_line=by_line))


def _open_zstd(file: Path) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))


class _Unpacked(io.RawIOBase):
    """What is in a packed file, up to a bound on a line, or on all where all is read at once.

    A small file may unpack to more than memory holds.
    """

    def __init__(self, unpacked: Any, most: int, *, by_line: bool) -> None:
        self._unpacked, self._most, self._by_line = unpacked, most, by_line
        self._held = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read: int = self._unpacked.readinto(buffer)
        line_end = bytes(buffer[:read]).rfind(b"\n") if self._by_line else -1
        self._held = self._held + read if line_end < 0 else read - line_end - 1
        if self._held > self._most:
            what = "a line of it" if self._by_line else "it"
            raise ValueError(
                f"unpacked {what} is more than {_TIMES} times as large as the file; unpack it "
                "yourself if it is meant"
            )
        return read

    def close(self) -> None:
        self._unpacked.close()
        super().close()


def _lines(file: Path, name: str) -> Iterator[Record]:
    with _open(file) as lines:
        yield from _of_lines(lines, name)


def _of_lines(lines: io.TextIOBase, name: str) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(_MARK)  # where files were written one after the other
        if line.strip():
            yield f"{name}:{number}", _parse(line)


def _parse(line: str) -> dict[str, Any] | str:
    try:
        record = parsed(line)
    except json.JSONDecodeError as error:  # it counts lines, of which this is one
        return f"not JSON: {error.msg}, at character {error.pos + 1}"
    except ValueError as error:
        return f"not JSON that is read: {error}"
    return _object(record)


def _object(record: Any) -> dict[str, Any] | str:
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}, expected an object"
    return record


def _too_deep(record: Any) -> str | None:
    try:
        refuse_deep(record)
    except ValueError as error:
        return f"not JSON that is read: {error}"
    return None


def _json(file: Path, name: str) -> Iterator[Record]:
    """One list of objects; or objects one after the other, on a line each or on many."""
    with _open(file) as opened:
        text = opened.read()
    try:
        if text.lstrip()[:1] == "[":
            numbered = list(enumerate(json.loads(text, object_pairs_hook=each_once), 1))
        else:
            numbered = list(_one_after_the_other(text))
    except (ValueError, RecursionError) as error:
        # Of objects on a line each, those that are whole are read.
        if text.lstrip().partition("\n")[0].rstrip().endswith("}"):
            yield from _of_lines(io.StringIO(text), name)
            return
        raise ValueError(f"it is not JSON: {error}") from error
    for number, record in numbered:
        yield f"{name}:{number}", _too_deep(record) or _object(record)


def _one_after_the_other(text: str) -> Iterator[tuple[int, Any]]:
    """Values with the lines that they begin on."""
    decoder, at, line = json.JSONDecoder(object_pairs_hook=each_once), 0, 1
    while at < len(text):
        if text[at].isspace() or text[at] == _MARK:
            line += text[at] == "\n"
            at += 1
            continue
        record, end = decoder.raw_decode(text, at)
        yield line, record
        line += text.count("\n", at, end)
        at = end


def _parquet(file: Path, name: str) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with readable("it is not readable Parquet"), pq.ParquetFile(file) as parquet:
        for number, record in enumerate(rows_of(parquet.iter_batches(BATCH)), 1):
            yield f"{name}:{number}", of_a_table(record)


def _arrow(file: Path, name: str) -> Iterator[Record]:
    import pyarrow as pa

    with readable("it is not readable Arrow"), pa.memory_map(str(file)) as memory:
        for number, record in enumerate(rows_of(arrow_batches(memory)), 1):
            yield f"{name}:{number}", of_a_table(record)


@contextmanager
def readable(what: str) -> Iterator[None]:
    """ValueError for whatever pyarrow raises of a table that is damaged."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException, SystemError) as error:
        raise ValueError(f"{what}: {error}") from error


def arrow_batches(memory: Any) -> Any:
    """The batches of an Arrow file in either of its two formats."""
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(memory)
    except pa.ArrowInvalid:
        memory.seek(0)
        reader = pa.ipc.open_file(memory)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))


def rows_of(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The rows of tables, few at a time as Python objects: numbers take ten times their room so."""
    for batch in batches:
        refuse_twice(batch.schema.names)
        batch.validate(full=True)  # lengths that damage made negative are read as they are
        few = max(1, batch.num_rows * _AT_ONCE // max(1, batch.nbytes))
        for start in range(0, batch.num_rows, few):
            yield from batch.slice(start, few).to_pylist()


def refuse_twice(columns: Sequence[str]) -> None:
    """ValueError where two columns have one name: a record would have the last one's cell."""
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"two columns are named {twice[0]!r}. Rename one")


def of_a_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without fields that its objects have only because other records' objects do."""
    return {column: _without_nulls(value) for column, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _without_nulls(held) for name, held in value.items() if held is not None}
    return value


def _csv(file: Path, name: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    with _open(file, newline="") as lines:
        records = csv.DictReader(lines)
        refuse_twice(records.fieldnames or ())
        for number, record in enumerate(records, 1):
            more: Any = record.pop(None, ())  # cells beyond the header's; empty ones say nothing
            yield f"{name}:{number}", _TOO_MANY if any(more) else dict(record)


def _document(file: Path, name: str) -> Iterator[Record]:
    with _open(file) as opened:
        yield name, {"text": opened.read()}


def _image(file: Path, name: str) -> Iterator[Record]:
    """An image, of the class that its folder is called by.

    In a folder of a split alone it has no class.
    """
    path = PurePath(name)
    label = path.parts[-2] if len(path.parts) > 1 + (split_of_image(path) is not None) else None
    yield name, {"image": file.read_bytes(), "label": label}


_READERS = {
    **dict.fromkeys(IMAGES, _image),
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _csv,
    ".txt": _document,
    ".md": _document,
}
