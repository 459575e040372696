"""Rows of features that go with the samples of a snapshot.

This module finds where each is, and reads them one by one.

The features of a training are a snapshot of their own, so that they stay as long as it names them.
`companion_places` joins the two by `text_key`: of each sample, in the snapshot's own order, and
each feature, in which shard and which row it is. That is worked out once a training and kept in a
file of 8 bytes each, which is mapped, not read. While it is made about 60 bytes a sample are in
memory. A text is named by its own tokens then, whatever the sample's row says, and what was found
has to fit it.

Single rows are read, in any order. A row group has 1 MiB of them (or one row), and those read last
stay decoded up to `HELD_BYTES`: in the order of training neighbours share row groups as the windows
of samples do.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import IntegrityError, UsageError
from ..store.store import Store
from ..tables.features import Layout, of_text
from ..tables.row_builders import text_key
from ..tables.rows import Rows
from ..tables.schema import KEY
from ..tables.shard import ShardFile
from .snapshot import Snapshot

HELD_BYTES = 256 << 20
"""Of row groups that stay decoded."""
HELD_FILES = 32
"""That stay open."""
Wanted = Sequence[tuple[str, int]]
"""Kind and layer of each feature."""

HELP = (
    "The file is as it was sealed, so `stillroom repair` cannot mend it: capture the features "
    "again into another store (storage.dir)."
)
_NAME = ("text_key", "kind", "layer")
_COLUMNS = (
    *_NAME,
    "vectors",
    "dtype",
    "values",
    "scale",
    *(field.name for field in fields(Layout)),
)
_ROW_BITS = 32


def companion_places(
    store: Store, samples: Snapshot, features: Snapshot, wanted: Wanted
) -> np.ndarray:
    """[N, F] int64: shard of `features` (its number there) above 32 bits, row of the shard below.

    Args:
        store: Of both.
        samples: N rows of soft targets.
        features: Where the features are looked for.
        wanted: F of them.

    Raises:
        UsageError: a sample lacks one.
        IntegrityError: one is there twice, is not of all tokens of its text, or as wide as no
            other.
    """
    texts, tokens = _texts(store, samples)
    found = _indexed(store, features)
    places = np.empty((len(texts), len(wanted)), np.int64)
    for number, (kind, layer) in enumerate(wanted):
        mine = found.filter(pc.and_(pc.equal(found["kind"], kind), pc.equal(found["layer"], layer)))
        _refuse_repeated(store, features, mine)
        at = pc.index_in(texts, value_set=mine["text_key"].combine_chunks())
        if at.null_count:
            raise UsageError(
                f"snapshot {samples.id}: {at.null_count} of its {len(texts)} samples have no "
                f"{kind} of layer {layer} in the store. Leave train.snapshot out, and "
                "`stillroom run` captures what is missing; or leave loss.features out."
            )
        mine = mine.take(at)
        _refuse_unfit(store, features, mine, tokens)
        places[:, number] = mine["place"].to_numpy()
    return places


def _texts(store: Store, samples: Snapshot) -> tuple[pa.Array, np.ndarray]:
    """[N] the text of each sample, in the snapshot's order, and how many tokens it has."""
    texts: list[bytes] = []
    tokens: list[np.ndarray] = []
    for shard in samples.shards:
        rows = Rows(store.shard(samples.table, shard.sha256).select(shard.rows, ["token_ids"]))
        edges, ids = rows.flat("token_ids")
        texts += [text_key(ids[start:stop]) for start, stop in pairwise(edges.tolist())]
        tokens.append(np.diff(edges))
    return pa.array(texts, KEY), np.concatenate(tokens)


def _indexed(store: Store, features: Snapshot) -> pa.Table:
    """Name, place and size of each row of features."""
    parts = []
    for number, shard in enumerate(features.shards):
        file = store.shard(features.table, shard.sha256)
        rows = file.select(shard.rows, [*_NAME, "vectors", "width", "positions"])
        places = (number << _ROW_BITS) + shard.rows.astype(np.int64)
        some = rows["positions"].is_valid()
        rows = rows.drop_columns(["positions"]).append_column("some", some)
        parts.append(rows.replace_schema_metadata().append_column("place", pa.array(places)))
    return pa.concat_tables(parts)


def _refuse_repeated(store: Store, features: Snapshot, mine: pa.Table) -> None:
    """Two rows of one feature of one text: nobody knows which is meant."""
    counts = mine.group_by("text_key").aggregate([([], "count_all")])
    twice = counts.filter(pc.greater(counts["count_all"], 1))
    if twice.num_rows:
        rows = mine.filter(pc.equal(mine["text_key"], twice["text_key"][0]))
        first, second = (_row_named(store, features, one) for one in rows.slice(0, 2).to_pylist())
        raise IntegrityError(f"{second}: it is there already, as {first}. {HELP}")


def _refuse_unfit(store: Store, features: Snapshot, mine: pa.Table, tokens: np.ndarray) -> None:
    """Rows, one a sample, that are not of all its tokens, or of another width than the first."""
    vectors, width = mine["vectors"].to_numpy(), mine["width"].to_numpy()
    some = mine["some"].to_numpy()
    whole = of_text(mine["kind"][0].as_py())
    wrong = np.flatnonzero((vectors != (1 if whole else tokens)) | (width != width[0]) | some)
    if not len(wrong):
        return
    row = int(wrong[0])
    said = (
        f"{vectors[row]} vectors of {width[row]} numbers{' at some positions' if some[row] else ''}"
    )
    raise IntegrityError(
        f"{_row_named(store, features, mine.slice(row, 1).to_pylist()[0])}: {said}, expected one "
        f"for {'the text' if whole else f'each of its {tokens[row]} tokens'}, of {width[0]} "
        f"numbers. {HELP}"
    )


def _row_named(store: Store, features: Snapshot, found: Mapping[str, Any]) -> str:
    shard = features.shards[found["place"] >> _ROW_BITS]
    row = found["place"] & ((1 << _ROW_BITS) - 1)
    file = store.shard(features.table, shard.sha256)
    key = file.select(np.array([row]), ["key"])["key"][0].as_py().hex()
    return f"{shard.name}: row {row} ({key}), {found['kind']} of layer {found['layer']}"


class RowsBeside:
    """Single rows of a snapshot, read in any order. For one thread."""

    def __init__(self, store: Store, snapshot: Snapshot, columns: Sequence[str]) -> None:
        """`columns`: that are read."""
        self._store, self._snapshot, self._columns = store, snapshot, columns
        self._held: OrderedDict[tuple[int, int], tuple[Rows, int]] = OrderedDict()
        self._files: OrderedDict[int, ShardFile] = OrderedDict()

    def row(self, place: int) -> dict[str, Any]:
        """The row at a place, page checksums verified.

        A place is the shard (its number in the snapshot) above 32 bits, and the row of the shard
        below.

        Page checksums are verified.

        Raises:
            IntegrityError: a file is damaged or not the one that was chosen.
        """
        number, row = place >> _ROW_BITS, place & ((1 << _ROW_BITS) - 1)
        shard = self._snapshot.shards[number]
        starts = np.cumsum([0, *shard.row_groups])
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return self._group(number, group)[int(row - starts[group])]

    def _group(self, number: int, group: int) -> Rows:
        key = number, group
        if key not in self._held:
            table = self._file(number).read(group, self._columns, threads=False)
            self._held[key] = Rows(table), table.nbytes
            while len(self._held) > 1 and sum(n for _, n in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key][0]

    def _file(self, number: int) -> ShardFile:
        if number not in self._files:
            shard = self._snapshot.shards[number]
            file = self._store.shard(self._snapshot.table, shard.sha256)
            if file.rows_per_group != shard.row_groups:
                raise IntegrityError(
                    f"{shard.name}: row groups of {file.rows_per_group} rows, the snapshot says "
                    f"{shard.row_groups}. Run `stillroom verify`."
                )
            self._files[number] = file
            while len(self._files) > HELD_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(number)
        return self._files[number]


class Companions(RowsBeside):
    """The features of samples, by the samples' numbers. For one thread."""

    def __init__(self, store: Store, features: Snapshot, places: np.ndarray) -> None:
        """`places`: as `companion_places` made them; may be mapped."""
        super().__init__(store, features, _COLUMNS)
        self._places = places

    def rows(self, sample: int) -> list[dict[str, Any]]:
        """The rows of `features` of a sample, one for each feature; as `row`."""
        return [self.row(int(place)) for place in self._places[sample]]
