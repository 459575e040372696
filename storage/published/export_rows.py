"""The rows that an export takes out of a store, a row group at a time.

They are in the snapshot's order, and their targets are cut to K.

Soft targets are read with their checksums, as training reads them. Generations lie in the store in
another order than the targets made of them, so DuckDB joins and sorts them, on disk where memory
does not suffice; it knows no page checksums, so the files are hashed before.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import IntegrityError, UsageError
from ..integrity.checked import Memory, check_file
from ..keys import content_key
from ..snapshots.snapshot import Snapshot
from ..store.sql import batches, connected, explained, query
from ..store.stopping import stoppable
from ..store.store import Store
from ..tables.kinds import STRUCTURES
from ..tables.rows import Rows, rows_to_table
from ..tables.schema import KEY, MESSAGES, SCHEMAS, TableName, since
from ..tables.shard import REPAIR
from ..tables.soft_targets import SoftTargets

# A conversation has more turns than its answer. All after the first scored token is `text`.
_ANSWER = pa.field(
    "answer",
    pa.string(),
    metadata={"about": "the given answer alone, where `text` holds more than it"},
)
_OF_SOME = {
    **{
        SCHEMAS["prompts"].field(n): f"p.{n}"
        for n in ("message_fields", "tools", "completion_fields", "labels")
    },
    _ANSWER: "CASE WHEN t.spans IS NOT NULL THEN p.completion END",
}
OF_SOME = tuple(field.name for field in _OF_SOME)
"""What plain prompts have none of: joined to a generation where a published row has one."""
JOINED = pa.schema(
    [
        pa.field(
            "prompt",
            pa.string(),
            metadata={"about": "the prompt; null where it is messages or empty"},
        ),
        pa.field("text_pair", pa.string(), metadata={"about": "second text of a labelled pair"}),
        pa.field(
            "messages",
            MESSAGES,
            metadata={"about": "the conversation before the completion; null for text"},
        ),
        pa.field("reference", pa.string(), metadata={"about": "gold answer, for evaluation only"}),
        pa.field("label", pa.int32(), metadata={"about": "gold class index"}),
        *_OF_SOME,
    ]
)
"""What a published generation has of its prompt. `prompts.source` stays at home: it names files of
the publisher's."""
PUBLISHED: dict[str, pa.Schema] = {
    "generations": pa.schema([*SCHEMAS["generations"], *JOINED]),
    "soft_targets": SCHEMAS["soft_targets"],
    "features": SCHEMAS["features"],
}
"""Tables that are published, and all columns that they may have."""
_ALL = {table: PUBLISHED[table].names for table in ("generations", "soft_targets")}
"""Those whose columns are chosen; features leave whole."""
_BATCH_ROWS = 4096

# The wanted generations, in their order, each with what `JOINED` has of its prompt. A given text
# names its row of `prompts`. A generated one knows the prompt's hash, which rows that differ in the
# reference share: the first by key stands for them. A document is all completion: its windows would
# repeat it as their prompt.
_TEXTS = """
    WITH first_rows AS (
        SELECT prompt_key, min(key) AS key FROM prompts GROUP BY prompt_key
    ),
    texts AS (
        SELECT g.*, w.number, coalesce(g.source_key, f.key) AS row_of_prompts
        FROM wanted w
        JOIN generations g ON g.key = w.key
        LEFT JOIN first_rows f ON f.prompt_key = g.prompt_key
    )"""
_WITH_PROMPTS = f"""{_TEXTS}
    SELECT
        t.* EXCLUDE (number, row_of_prompts),
        CASE WHEN p.format = 'text' THEN NULL ELSE p.text END AS prompt,
        p.text_pair,
        p.messages,
        p.reference,
        p.label,
        {", ".join(f"{sql} AS {field.name}" for field, sql in _OF_SOME.items())}
    FROM texts t
    LEFT JOIN prompts p ON p.key = t.row_of_prompts
    ORDER BY t.number"""
_COUNTED = f"""{_TEXTS}
    SELECT {", ".join(f"count({sql})" for sql in _OF_SOME.values())}
    FROM texts t
    JOIN prompts p ON p.key = t.row_of_prompts"""

_SOURCES = """
    WITH asked AS (
        SELECT DISTINCT g.prompt_key FROM generations g JOIN wanted w ON g.key = w.key
    )
    SELECT i.data_id, i.split = 'test', count(DISTINCT i.prompt_key)
    FROM inputs i
    JOIN asked a ON a.prompt_key = i.prompt_key
    GROUP BY ALL
    ORDER BY ALL"""


def chosen_columns(
    wanted: Sequence[str], there: Mapping[str, Collection[str]] = _ALL
) -> dict[str, list[str]]:
    """Columns of each table that goes out, in the schema's order, `key` first.

    Args:
        wanted: Names, or `table.name`; none: those that are `there`.
        there: The columns that rows have.

    Raises:
        UsageError: no such column.
    """
    known = {f"{table}.{name}" for table, names in _ALL.items() for name in names}
    plain = {name.split(".")[1] for name in known}
    for name in wanted:
        if name not in known | plain:
            near = difflib.get_close_matches(name, sorted(known | plain), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(sorted(plain))}."
            raise UsageError(f"--columns: no column {name}. {hint}")
    found = {}
    for table, columns in _ALL.items():
        asked = wanted or [f"{table}.{name}" for name in there[table]]
        names = [n for n in columns if n in asked or f"{table}.{n}" in asked]
        if names:
            found[table] = names if "key" in names else ["key", *names]
    return found


def published_columns(table: str, version: int, of_some: Collection[str]) -> list[str]:
    """The columns of a table of this version; of `OF_SOME` the given ones."""
    return [
        field.name
        for field in PUBLISHED[table]
        if (
            field.name in of_some
            if table == "generations" and field.name in OF_SOME
            else since(field) <= version
        )
    ]


def snapshot_rows(
    store: Store, snapshot: Snapshot, columns: list[str], *, keep: np.ndarray | None = None
) -> Iterator[pa.Table]:
    """The chosen rows of a snapshot, a row group at a time, checksums verified.

    Args:
        store: Holds the shards.
        snapshot: Its shards in order, of each the chosen rows, ascending.
        columns: Which to read.
        keep: [rows] which of the chosen rows to take; None: all.
    """
    before = 0  # chosen rows of the shards before
    for part in snapshot.shards:
        file = store.shard(snapshot.table, part.sha256)
        edges = np.searchsorted(part.rows, file.starts)  # of the row groups, in chosen rows
        for low, high in pairwise(edges.tolist()):
            rows = part.rows[low:high]
            if keep is not None:
                kept = keep[before + low : before + high]
                rows = rows[kept]
            if len(rows):
                yield file.select(rows, columns)
        before += len(part.rows)


def allowed_generations(store: Store, where: str) -> pa.Array:
    """Keys of the generations that a condition lets through.

    Raises:
        UsageError: it is no SQL condition over the columns of `generations`.
    """
    _check_bytes(store, "generations")
    try:
        found = query(store, f"SELECT key FROM generations WHERE {where}")
    except UsageError as error:
        raise UsageError(f"--where: {error}") from error
    return found["key"].combine_chunks().cast(KEY)


def generations_of(store: Store, keys: pa.Array) -> Iterator[pa.Table]:
    """The generations with these keys, in this order, with what `JOINED` takes of their prompts.

    Raises:
        IntegrityError: some are not in the store.
    """
    if not len(keys):
        return
    found = 0
    with _asked(store, keys) as connection:
        for batch in batches(connection, _WITH_PROMPTS, rows=_BATCH_ROWS):
            found += batch.num_rows
            yield pa.Table.from_batches([batch]).cast(PUBLISHED["generations"])
    if found != len(keys):
        raise IntegrityError(
            f"{store.root}: of {len(keys)} generations that the snapshot's rows name, {found} are "
            "in the store. Are the others in one of its recipe's storage.sources? An export "
            "takes rows of one store. If not, they were withdrawn: run `stillroom verify`, then "
            "the recipe again, and export its new snapshot."
        )


def columns_of_some(store: Store, keys: pa.Array) -> set[str]:
    """Those of `OF_SOME` that the prompt of one of these generations has."""
    with _asked(store, keys) as connection:
        counts = stoppable(connection, lambda: connection.sql(_COUNTED).fetchall())[0]
    return {name for name, rows in zip(OF_SOME, counts, strict=True) if rows}


@contextmanager
def _asked(store: Store, keys: pa.Array) -> Iterator[Any]:
    """SQL over the store, with the wanted generations as `wanted`."""
    _check_bytes(store, "generations")
    _check_bytes(store, "prompts")
    with connected(store) as connection, explained("export"):
        wanted = pa.table({"number": pa.array(np.arange(len(keys))), "key": keys})
        connection.from_arrow(wanted).create("wanted")
        yield connection


def sources_of(store: Store, keys: pa.Array) -> list[tuple[str, bool, int]]:
    """Which recorded data the prompts of these generations are from.

    Returns:
        Data id, whether held out, how many prompts.
    """
    with connected(store) as connection, explained("export"):
        connection.from_arrow(pa.table({"key": keys})).create("wanted")
        return list(stoppable(connection, lambda: connection.sql(_SOURCES).fetchall()))


def shards_of(store: Store, table: TableName, keys: pa.Array) -> list[tuple[dict[str, Any], int]]:
    """What the shards that hold some of these keys say of themselves, and how many rows they give.

    Raises:
        IntegrityError: one of them is damaged or holds a row that cannot be right.
    """
    found, memory = [], Memory.of_user()
    for commit in store.commits(table):
        shard = store.shard(table, commit.shard.sha256)
        own = shard.read_all(["key"])["key"]
        rows = pc.sum(pc.is_in(own, value_set=keys)).as_py()
        if rows:
            for file in store.stored(table, commit.shard.sha256):
                check_file(file, table, memory)
            found.append((shard.about, rows))
    return found


def can_be_cut(rows: pa.Table, k: int) -> np.ndarray:
    """[R] whether rows of soft targets (columns kind, k) have K entries to keep.

    A whole distribution always has.

    Raises:
        UsageError: draws cannot be cut, they have no order.
    """
    kinds = rows["kind"].combine_chunks()
    structures = [STRUCTURES[kind] for kind in kinds.to_pylist()]
    if any(structure.drawn for structure in structures):
        raise UsageError(
            "--min-k: some of the snapshot's targets are sampled, and draws cannot be cut to "
            "fewer entries. Leave --min-k out, or score with topk."
        )
    whole = np.array([structure.whole for structure in structures], bool)
    enough: np.ndarray = whole | (rows["k"].to_numpy() >= k)
    return enough


def cut_rows(table: pa.Table, k: int) -> pa.Table:
    """Rows of soft targets with K entries at most; what is cut joins the tail."""
    rows = Rows(table)
    return rows_to_table("soft_targets", [cut_row(rows[index], k) for index in range(len(rows))])


def cut_row(row: Mapping[str, Any], k: int) -> dict[str, Any]:
    """One row cut: as it would have been stored with this K, but for a second rounding.

    It has a key of its own.
    """
    if row["k"] <= k:
        return dict(row)
    columns = cut(SoftTargets.from_row(row), k).columns(row["mantissa_bits"])
    kind = "topk" if STRUCTURES[row["kind"]].whole else row["kind"]
    least = None if row["k_min"] is None else min(row["k_min"], k)
    own = {"key": content_key("cut", key=row["key"], k=k), "kind": kind, "k": k, "k_min": least}
    return {**row, **columns, **own}


def cut(targets: SoftTargets, k: int) -> SoftTargets:
    """The K best entries of each position.

    The others join the tail, and at each temperature the tempered tail.

    `full` becomes entries and a tail; the temperatures that it has for being whole are lost.
    """
    ids, logprobs, tail = targets.ids, targets.logprobs, targets.tail_logprob
    if logprobs is None or tail is None:
        raise ValueError("draws cannot be cut: they have no order (`can_be_cut` refuses them)")
    if ids is None:
        ids = np.argsort(-logprobs, axis=1, kind="stable").astype(np.int32)
        logprobs = np.take_along_axis(logprobs, ids, axis=1)
    rest = logprobs[:, k:].astype(np.float64)
    entries = targets.entries
    if entries is not None:
        entries = np.minimum(entries, k).astype(np.int32)
    return replace(
        targets,
        ids=ids[:, :k],
        logprobs=logprobs[:, :k],
        tail_logprob=_with_rest(tail, rest),
        entries=entries,
        tempered_tails=_tempered_with_rest(targets, rest),
    )


def _with_rest(tail: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """[N] log(exp(tail) + sum_i exp(rest_i)), of a tail [N] and what joins it [N, R] float64."""
    joining = np.logaddexp.reduce(rest, axis=1)
    joined: np.ndarray = np.logaddexp(tail, joining).astype(np.float32)
    return joined


def _tempered_with_rest(targets: SoftTargets, rest: np.ndarray) -> np.ndarray | None:
    """[N, m] the same at each temperature T: p_i^(1/T) join, whose logs are rest_i / T."""
    temperatures, tails = targets.temperatures, targets.tempered_tails
    if temperatures is None or tails is None:
        return tails
    parts = [
        _with_rest(tails[:, number], rest / temperature)
        for number, temperature in enumerate(temperatures.astype(np.float64))
    ]
    return np.stack(parts, axis=1)


def _check_bytes(store: Store, table: TableName) -> None:
    # DuckDB would read a flipped bit without a word.
    for commit in store.commits(table):
        if store.files.sha256(commit.shard.name) != commit.shard.sha256:
            raise IntegrityError(
                f"{commit.shard.name}: the file is damaged (its sha256 is another one). {REPAIR}"
            )
