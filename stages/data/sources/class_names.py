"""Names that a source itself gives the classes of a column of ids.

`datasets` keeps them beside the rows.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .names import ending

_KEPT_UNDER = b"huggingface"
"""Key of a schema's metadata, in Parquet and Arrow files."""


def classes_in_files(files: Iterable[Path], column: str) -> Iterator[tuple[str, ...]]:
    """The names in each file that has some.

    A damaged file gives none: whoever reads it says what is wrong.
    """
    for file in files:
        if ending(file) in _SCHEMAS and (names := classes_of(_features(file), column)):
            yield names


def classes_of(features: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Class names of a column of one label, or of lists of them.

    (): its labels are no ids, or nobody named them.
    """
    kind = features.get(column)
    while kind and not isinstance(kind, Mapping | str):  # once a list of one kind
        kind = kind[0]
    if not isinstance(kind, Mapping):
        return ()
    if kind.get("_type") == "ClassLabel":
        return tuple(map(str, kind.get("names") or ()))
    return classes_of(kind, "feature")


def _features(file: Path) -> Mapping[str, Any]:
    import pyarrow as pa

    try:
        kept = (_SCHEMAS[ending(file)](file).metadata or {}).get(_KEPT_UNDER, b"{}")
        found = json.loads(kept)["info"]["features"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return {}
    return found if isinstance(found, Mapping) else {}


def _of_parquet(file: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_schema(file)


def _of_arrow(file: Path) -> Any:
    import pyarrow as pa

    with pa.memory_map(str(file)) as memory:
        try:
            return pa.ipc.open_stream(memory).schema
        except pa.ArrowInvalid:
            memory.seek(0)
            return pa.ipc.open_file(memory).schema


_SCHEMAS = {".parquet": _of_parquet, ".arrow": _of_arrow}
