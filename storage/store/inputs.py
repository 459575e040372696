"""Inputs: which prompts a recipe's data are, and in which split.

Each `data_id` has one record and one Parquet file.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from ..bounds import mapping, understood
from ..errors import IntegrityError
from ..files.base import Files
from ..keys import seal, unseal
from ..tables.schema import KEY, RECORD_VERSION
from ..tables.shard import REPAIR, ShardFile, ShardInfo, put_parquet, shard_name

INPUTS_SCHEMA = pa.schema(
    [
        pa.field("key", KEY, nullable=False),
        pa.field("prompt_key", KEY, nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("windows", pa.int32()),
        pa.field("first", pa.bool_(), nullable=False),
    ]
)
SOURCE = pa.field("source", pa.string())
"""One more column, where the recipe asks which file a prompt is of: a row of `prompts` says who
read it first."""
_GROUP_ROWS = 1 << 18


@dataclass(frozen=True, slots=True)
class Inputs:
    """The record of one `data_id`."""

    shard: ShardInfo
    about: dict[str, Any]
    sourced: bool
    """Whether the column `source` is there."""

    @property
    def schema(self) -> pa.Schema:
        """Of its file."""
        return INPUTS_SCHEMA.append(SOURCE) if self.sourced else INPUTS_SCHEMA


def inputs_name(data_id: str) -> str:
    """Where the record lies, below the store."""
    return f"inputs/{data_id}.json"


def put_inputs(files: Files, data_id: str, table: pa.Table, *, about: Mapping[str, Any]) -> None:
    """Record a table of inputs; the first record of a `data_id` stays."""
    if files.exists(inputs_name(data_id)):
        return
    sourced = SOURCE.name in table.column_names
    schema = INPUTS_SCHEMA.append(SOURCE) if sourced else INPUTS_SCHEMA
    data = table.select(schema.names).cast(schema)
    groups = [
        min(_GROUP_ROWS, data.num_rows - start) for start in range(0, data.num_rows, _GROUP_ROWS)
    ]
    shard = put_parquet(files, data, groups, folder="data/inputs", about={"table": "inputs"})
    record = {
        "format_version": RECORD_VERSION,
        "data_id": data_id,
        "shard": asdict(shard),
        "about": dict(about),
        **({"sourced": True} if sourced else {}),
    }
    files.put_if_absent(inputs_name(data_id), seal(record))


def read_inputs(files: Files, data_id: str) -> Inputs | None:
    """The record of a `data_id`, checked; None if there is none."""
    name = inputs_name(data_id)
    try:
        record = unseal(files.read(name), name)
    except FileNotFoundError:
        return None
    if (record.get("format_version"), record.get("data_id")) != (RECORD_VERSION, data_id):
        raise IntegrityError(
            f"{name}: the record inside is of {record.get('data_id')}, format version "
            f"{record.get('format_version')}; expected {data_id}, version {RECORD_VERSION}. "
            "Restore the file, or use the Stillroom that wrote it."
        )
    with understood(name, "record of inputs"):
        shard = ShardInfo.from_json(mapping(record["shard"]))
        if shard.name != shard_name("inputs", shard.sha256):
            raise ValueError(f"{shard.name} is not the name of the file with its sha256")
        return Inputs(shard, mapping(record["about"]), record.get("sourced") is True)


def inputs_file(files: Files, inputs: Inputs) -> ShardFile:
    """Their file.

    Raises:
        IntegrityError: its columns are others.
    """
    file = ShardFile(files, inputs.shard.name)
    if not file.stored.equals(inputs.schema):
        raise IntegrityError(
            f"{file.name}: its columns are {_columns(file.stored)}, those of inputs are "
            f"{_columns(inputs.schema)}. {REPAIR}"
        )
    return file


def inputs_table(files: Files, inputs: Inputs) -> pa.Table:
    """The inputs: key, prompt_key, split (train or test), windows and first.

    `windows` says into how many a text was cut, `first` whether a row is the first of its prompt.

    `source` too, where it is there.
    """
    return inputs_file(files, inputs).read_all().replace_schema_metadata(None)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
