"""Rows between dicts and Arrow tables.

They are checked against the schema on the way in, and are numpy arrays on the way out.

Numeric list columns are numpy arrays, everything else is plain Python.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import IntegrityError
from ..keys import KEY_BYTES
from .schema import SCHEMAS, TableName


def is_numeric_list(kind: pa.DataType) -> bool:
    """Whether a column's rows are arrays of numbers."""
    numeric: bool = pa.types.is_list(kind) and pa.types.is_primitive(kind.value_type)
    return numeric


def check_row(table: TableName, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with every column of its table, absent ones None.

    Raises:
        IntegrityError: it does not fit the table.
    """
    columns = _columns(table)
    if unknown := sorted(row.keys() - columns.keys()):
        raise IntegrityError(
            f"{table} row: no such column: {', '.join(unknown)}. Columns: {', '.join(columns)}."
        )
    checked = {name: _checked(table, name, row.get(name)) for name in columns}
    if len(checked["key"]) != KEY_BYTES:
        raise IntegrityError(
            f"{table} row: the key has {len(checked['key'])} bytes, not {KEY_BYTES}."
        )
    return checked


@cache
def _columns(table: TableName) -> dict[str, tuple[bool, Any]]:
    """Whether a column may be null, and the dtype of its lists or None.

    Arrow is asked once, not for every row.
    """
    return {
        field.name: (
            field.nullable,
            field.type.value_type.to_pandas_dtype() if is_numeric_list(field.type) else None,
        )
        for field in SCHEMAS[table]
    }


def _checked(table: TableName, name: str, value: Any) -> Any:
    nullable, dtype = _columns(table)[name]
    if value is None:
        if nullable:
            return None
        raise IntegrityError(f"{table} row: column {name} ({_about(table, name)}) is missing.")
    if dtype is None:
        return value
    array = np.asarray(value)
    if array.ndim != 1:
        raise IntegrityError(
            f"{table} row: {name} has shape {array.shape}, lists are flat: {_about(table, name)}."
        )
    if array.size and not np.can_cast(array.dtype, dtype, "same_kind"):
        expected = f"{SCHEMAS[table].field(name).type}: {_about(table, name)}"
        raise IntegrityError(f"{table} row: {name} holds {array.dtype}, expected {expected}.")
    return array.astype(dtype, copy=False)


def _about(table: TableName, name: str) -> str:
    about: bytes = SCHEMAS[table].field(name).metadata[b"about"]
    return about.decode()


def row_bytes(row: Mapping[str, Any]) -> int:
    """Decoded size of a row, about."""
    return sum(_value_bytes(value) for value in row.values())


def _value_bytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | dict):  # messages, and what they have beside a text
        return sum(map(_value_bytes, value.values() if isinstance(value, dict) else value))
    return 8


def rows_to_table(table: TableName, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Checked rows as one Arrow table with the table's schema."""
    schema = SCHEMAS[table]
    columns = [_column(table, field, [row[field.name] for row in rows]) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(table: TableName, field: pa.Field, values: list[Any]) -> pa.Array:
    if is_numeric_list(field.type):
        return _list_column(field.type, values)
    try:
        return pa.array(values, type=field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise IntegrityError(
            f"{table} rows: column {field.name} takes {field.type} ({error})."
        ) from error


def _list_column(kind: pa.ListType, values: list[np.ndarray | None]) -> pa.Array:
    dtype = kind.value_type.to_pandas_dtype()
    arrays = [np.empty(0, dtype) if value is None else value for value in values]
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    flat = pa.array(np.concatenate(arrays) if arrays else np.empty(0, dtype), type=kind.value_type)
    absent = pa.array([value is None for value in values], type=pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind, mask=absent)


class Rows:
    """The rows of an Arrow table, made when asked for.

    Each array is the row's own, so it keeps no table alive.
    """

    def __init__(self, table: pa.Table) -> None:
        self._length: int = table.num_rows
        self._columns = {name: table[name].combine_chunks() for name in table.column_names}
        self._lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, column in self._columns.items():
            if is_numeric_list(column.type):
                offsets = _numbers(column.offsets)
                _refuse_nulls(name, column.values, offsets)
                self._lists[name] = (offsets, _numbers(column.values))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: self.value(name, row) for name in self._columns}

    def flat(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A numeric list column, not copied: offsets [R + 1], and the values of all rows.

        A null row has no values.
        """
        return self._lists[name]

    def present(self, name: str) -> np.ndarray:
        """[R] whether a column's value is there."""
        column = self._columns[name]
        bits = column.buffers()[0]
        if bits is None:
            return np.ones(self._length, bool)
        bits = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        return bits[column.offset : column.offset + self._length].astype(bool)

    def numbers(self, name: str) -> np.ndarray:
        """[R] the values of a column of numbers, not copied."""
        return _numbers(self._columns[name])

    def codes(self, name: str) -> np.ndarray:
        """[R] a number for each row's value; equal values have equal numbers, null has one too."""
        found = self._columns[name].dictionary_encode(null_encoding="encode")
        return _numbers(found.indices)

    def keys(self, name: str = "key") -> np.ndarray:
        """[R] a column of keys as numpy's bytes of fixed size, not copied."""
        column = self._columns[name]
        kind = np.dtype((np.void, column.type.byte_width))
        values = np.frombuffer(column.buffers()[1] or b"", kind)
        return values[column.offset : column.offset + self._length]

    def filled(self, name: str, value: float) -> np.ndarray:
        """[R] the values of a column of numbers, `value` where one is null."""
        return _numbers(self._columns[name].fill_null(value))

    def values(self, name: str) -> list[Any]:
        """[R] the values of a column as plain Python, None where one is null."""
        found: list[Any] = self._columns[name].to_pylist()
        return found

    def value(self, name: str, row: int) -> Any:
        """A column's value in one row."""
        column = self._columns[name]
        if name not in self._lists:
            return column[row].as_py()
        if not column[row].is_valid:
            return None
        offsets, values = self._lists[name]
        return values[offsets[row] : offsets[row + 1]].copy()


def _refuse_nulls(name: str, values: pa.Array, offsets: np.ndarray) -> None:
    """A list may be null, its numbers may not.

    No writer of ours makes such a file, but Parquet allows it.
    """
    if values.null_count:
        first = values.is_null().index(True).as_py()
        row = int(np.searchsorted(offsets, first, side="right")) - 1
        raise IntegrityError(f"row {row}: {name} holds nothing in place of a number.")


def _numbers(array: pa.Array) -> np.ndarray:
    # Not `to_numpy`: that imports pandas, which takes longer than the first batch of a run that
    # resumes.
    assert array.null_count == 0
    dtype = array.type.to_pandas_dtype()
    values = np.empty(0, dtype) if len(array) == 0 else np.frombuffer(array.buffers()[1], dtype)
    return values[array.offset : array.offset + len(array)]
