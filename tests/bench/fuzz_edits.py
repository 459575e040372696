"""Small damages as hypothesis strategies.

They are done to a value of JSON, to bytes, to the lines of a text, or to a Parquet table.

An edit is drawn without knowing what it will be made to: it says where by a number, taken modulo
the places that there are.
"""

import copy
import json
from typing import Any, NamedTuple

import pyarrow as pa
from hypothesis import strategies as st

_WHERE = st.integers(0, 2**20)
_DEEP: Any = 1
for _ in range(150):
    _DEEP = [_DEEP]

_NASTY = [
    *(None, True, False, 0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**40, 2**63, -(2**63), 10**40),
    *(0.0, 1.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "0", "3", "null", "nan", "train", "test", "\x00", "\x1b[31m", "a\nb", "\u202e", "é"),
    *("\ud800", "x" * 70_000, "../../x", "..", "/nowhere/x", "C:\\x", "hf://x/y", "${HOME}"),
    *("s3://nobody/x", "a" * 64, "0" * 32, "2026-13-45", "' OR 1=1 --", "*", "[", "{{ x }}", "%s"),
    *([], {}, [[]], [None], [0, -1], {"": None}, {"a": {"b": [1, "2"]}}, [1] * 3000, _DEEP),
]
_SCALARS = st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.none())
JUNK = st.one_of(
    st.sampled_from(_NASTY),
    _SCALARS,
    st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    st.dictionaries(st.text(max_size=5), _SCALARS, max_size=3),
)


class Edit(NamedTuple):
    """What is done at one place."""

    where: int
    what: str
    value: Any


def _edits(most: int, names: tuple[str, ...], values: Any) -> Any:
    one = st.builds(Edit, _WHERE, st.sampled_from(names), values)
    return st.lists(one, min_size=1, max_size=most)


JSON_EDITS = _edits(
    3, ("set", "set", "set", "delete", "rename", "add", "wrap", "swap", "double", "near"), JUNK
)

_MILD = [
    *(0, 1, 2, 3, 7, 10**6, 10**12, 2**53, 0.0, 0.5, 1.0, 1e-9, 1e300, True, False, None),
    *("test", "é", "topp", "sampled", "full", "forward_kl", "drop", "constant", "../x", "x y"),
    *([], [1.0], [2.0, 1.0], ["a"], {}, {"a": 1}),
]
MILD_EDITS = _edits(2, ("set", "set", "swap", "near", "delete"), st.sampled_from(_MILD))
"""What a recipe may well hold, in another place."""


def edited_json(tree: Any, edits: list[Edit]) -> Any:
    """A copy of a value of JSON with the edits made; the value itself is no place."""
    tree = {"root": copy.deepcopy(tree)}
    for edit in edits:
        places = list(_places(tree["root"])) or [(tree, "root")]
        inside, key = places[edit.where % len(places)]
        other, at = places[edit.where // 7 % len(places)]
        _edit_json(inside, key, edit, other[at])
    return tree["root"]


def _places(value: Any) -> Any:
    """Each (container, key) below a value."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, held in list(items):
        yield value, key
        yield from _places(held)


def _edit_json(inside: Any, key: Any, edit: Edit, other: Any) -> None:
    old, value = inside[key], copy.deepcopy(edit.value)
    match edit.what:
        case "delete":
            del inside[key]
        case "rename" if isinstance(inside, dict):
            inside[str(value)[:50]] = inside.pop(key)
        case "add" if isinstance(inside, dict):
            inside[f"{key}_more"] = value
        case "wrap":
            inside[key] = [old, value]
        case "swap":
            inside[key] = copy.deepcopy(other)
        case "double" if isinstance(old, list | str):
            inside[key] = old + old
        case "near" if isinstance(old, int):
            inside[key] = old + edit.where % 3 - 1
        case _:
            inside[key] = value


def as_json(value: Any) -> bytes:
    """JSON as a stranger may write it: NaN, and halves of surrogate pairs, as they are."""
    return json.dumps(value, indent=1).encode()


BYTE_EDITS = _edits(4, ("flip", "put", "cut", "drop", "double", "fill"), st.binary(max_size=12))


def edited_bytes(data: bytes, edits: list[Edit]) -> bytes:
    """Bytes with the edits made."""
    for edit in edits:
        at = edit.where % (len(data) + 1)
        # Where the footer of a Parquet file is, as often as everywhere else together.
        at = max(0, len(data) - edit.where % 600) if edit.where % 2 else at
        length = edit.where % 60 + 1
        match edit.what:
            case "flip" if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << edit.where % 8]) + data[at + 1 :]
            case "put":
                data = data[:at] + edit.value + data[at:]
            case "cut":
                data = data[:at]
            case "drop":
                data = data[:at] + data[at + length :]
            case "double":
                data = data[: at + length] + data[at:]
            case _:
                data = data[:at] + edit.value + data[at + len(edit.value) :]
    return data


_YAML = [
    *(
        "!!python/object:os.system x",
        "!!binary x",
        "!!timestamp 2026-99-99",
        "!!set {a}",
        "!!int x",
    ),
    *("&a [*a]", "*nobody", "<<: 3", "? [1, 2]", "{", "[", "- ", ": ", "|", "%YAML 9.9", "---"),
    *("2026-11-29", "0x", "1_000", "1e400", "-.inf", ".nan", "0o17", "12:30:45", "~", "yes", "\t"),
    *("'", '"\\ud800"', '"\\x00"', "\x00", "\x85", "\ufeff", "a: b: c", "# x", "@x", "9" * 5000),
]
LINE_EDITS = _edits(3, ("value", "value", "line", "double", "delete"), st.sampled_from(_YAML))


def edited_lines(text: str, edits: list[Edit]) -> str:
    """A text of `name: value` lines with the edits made."""
    lines = text.split("\n")
    for edit in edits:
        at = edit.where % len(lines)
        line = lines[at]
        indent = line[: len(line) - len(line.lstrip())]
        match edit.what:
            case "value":
                lines[at] = f"{line.partition(':')[0]}: {edit.value}"
            case "line":
                lines[at] = f"{indent}{edit.value}"
            case "double":
                lines.insert(at, line)
            case _:
                lines[at] = ""
    return "\n".join(lines)


TABLE_EDITS = _edits(
    2,
    (
        *("drop column", "rename column", "another type", "nulls", "null", "more", "value", "item"),
        *("no rows", "rows twice", "rows turned", "metadata", "swap columns", "empty lists"),
    ),
    JUNK,
)
_TYPES = [
    *(pa.string(), pa.int64(), pa.int8(), pa.float64(), pa.bool_(), pa.binary(), pa.null()),
    *(pa.list_(pa.int64()), pa.list_(pa.string()), pa.large_list(pa.float64()), pa.date32()),
    *(pa.decimal128(5, 2), pa.dictionary(pa.int32(), pa.string()), pa.timestamp("ns")),
]


def edited_table(table: pa.Table, edits: list[Edit]) -> pa.Table:
    """A table with the edits made; what Arrow cannot make of it is left as it was."""
    for edit in edits:
        try:
            table = _edit_table(table, edit)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, NotImplementedError):
            continue
    return table


def _edit_table(table: pa.Table, edit: Edit) -> pa.Table:
    at = edit.where % max(1, table.num_columns)
    name, column = table.schema.names[at], table.column(at)
    field = table.schema.field(at)
    match edit.what:
        case "drop column":
            return table.remove_column(at)
        case "rename column":
            return table.rename_columns({name: str(edit.value)[:50]})
        case "another type":
            kind = _TYPES[edit.where // 7 % len(_TYPES)]
            try:
                changed = column.cast(kind)
            except pa.ArrowException:
                changed = pa.nulls(table.num_rows, kind)
            return table.set_column(at, name, changed)
        case "nulls":
            nulls = pa.nulls(table.num_rows, column.type)
            return table.set_column(at, pa.field(name, column.type), nulls)
        case "more":
            return table.append_column(str(edit.value)[:50], column)
        case "no rows":
            return table.slice(0, 0)
        case "rows twice":
            return pa.concat_tables([table, table])
        case "rows turned":
            return table.take(list(range(table.num_rows))[::-1])
        case "metadata":
            return table.replace_schema_metadata(_edit_metadata(table.schema.metadata or {}, edit))
        case "swap columns":
            other = edit.where // 7 % table.num_columns
            return table.set_column(at, field, table.column(other))
        case _ if table.num_rows == 0:
            return table
        case _:
            values = column.to_pylist()
            row = edit.where // 11 % len(values)
            values[row] = _edited_cell(values[row], edit)
            changed = pa.array(values, column.type)
            return table.set_column(at, pa.field(name, column.type), changed)


def _edited_cell(cell: Any, edit: Edit) -> Any:
    if edit.what == "null":
        return None
    if not isinstance(cell, list):
        return edit.value
    if edit.what == "empty lists" or not cell:
        return []
    place = edit.where % len(cell)
    if edit.what == "item":
        return [*cell[:place], edit.value, *cell[place + 1 :]]
    return cell[:place] + cell[place + 1 :]


def _edit_metadata(metadata: dict[bytes, bytes], edit: Edit) -> dict[bytes, bytes]:
    names = sorted(metadata)
    if not names:
        return {b"x": b"y"}
    name = names[edit.where % len(names)]
    try:
        inner = edited_json(json.loads(metadata[name]), [Edit(edit.where // 7, "set", edit.value)])
        changed = as_json(inner)
    except ValueError:
        changed = as_json(edit.value)
    return metadata | {name: changed}
