"""Rows of features that go with the samples of a snapshot: where each is, and reading them one by one.

The features of a training are a snapshot of their own, so that they stay as long as it names them.
`companion_places` joins the two by `text_key`: of each sample, in the snapshot's own order, and each
feature, in which shard and which row it is. That is worked out once a training and kept in a file of
8 bytes each, which is mapped, not read. While it is made about 60 bytes a sample are in memory.

Read are single rows, in any order. A row group has 1 MiB of them (or one row), and those read last
stay decoded up to `HELD_BYTES`: in the order of training neighbours share row groups as the windows
of samples do.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import IntegrityError, UsageError
from ..store.store import Store
from ..tables.features import Layout
from ..tables.rows import Rows
from ..tables.shard import ShardFile, text_keys
from .snapshot import Snapshot

HELD_BYTES = 256 << 20
"""Of row groups that stay decoded."""
HELD_FILES = 32
"""That stay open."""
Wanted = Sequence[tuple[str, int]]
"""Kind and layer of each feature."""

_NAMES = ("text_key", "kind", "layer", "vectors", "dtype", "values", "scale")
_COLUMNS = (*_NAMES, *(field.name for field in fields(Layout)))
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
    """
    texts = _texts(store, samples)
    found = _indexed(store, features)
    places = np.empty((len(texts), len(wanted)), np.int64)
    for number, (kind, layer) in enumerate(wanted):
        mine = found.filter(pc.and_(pc.equal(found["kind"], kind), pc.equal(found["layer"], layer)))
        at = pc.index_in(texts, value_set=mine["text_key"].combine_chunks())
        if at.null_count:
            raise UsageError(
                f"snapshot {samples.id}: {at.null_count} of its {len(texts)} samples have no "
                f"{kind} of layer {layer} in the store. Leave train.snapshot out, and `stillroom run` "
                "captures what is missing; or leave loss.features out."
            )
        places[:, number] = mine["place"].to_numpy()[at.to_numpy()]
    return places


def _texts(store: Store, samples: Snapshot) -> pa.Array:
    """[N] the text of each sample, in the snapshot's order."""
    parts = [
        text_keys(store.shard(samples.table, shard.sha256), shard.rows) for shard in samples.shards
    ]
    return pa.concat_arrays(parts)


def _indexed(store: Store, features: Snapshot) -> pa.Table:
    """Name and place of each row of features."""
    parts = []
    for number, shard in enumerate(features.shards):
        file = store.shard(features.table, shard.sha256)
        rows = file.select(shard.rows, ["text_key", "kind", "layer"])
        places = (number << _ROW_BITS) + shard.rows.astype(np.int64)
        parts.append(rows.replace_schema_metadata().append_column("place", pa.array(places)))
    return pa.concat_tables(parts)


class Companions:
    """The features of samples, by the samples' numbers. For one thread."""

    def __init__(self, store: Store, features: Snapshot, places: np.ndarray) -> None:
        """`places`: as `companion_places` made them; may be mapped."""
        self._store, self._features, self._places = store, features, places
        self._held: OrderedDict[tuple[int, int], tuple[Rows, int]] = OrderedDict()
        self._files: OrderedDict[int, ShardFile] = OrderedDict()

    def rows(self, sample: int) -> list[dict[str, Any]]:
        """The rows of `features` of a sample, one for each feature; page checksums are verified.

        Raises:
            IntegrityError: a file is damaged or not the one that was chosen.
        """
        return [self._row(int(place)) for place in self._places[sample]]

    def _row(self, place: int) -> dict[str, Any]:
        number, row = place >> _ROW_BITS, place & ((1 << _ROW_BITS) - 1)
        shard = self._features.shards[number]
        starts = np.cumsum([0, *shard.row_groups])
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return self._group(number, group)[int(row - starts[group])]

    def _group(self, number: int, group: int) -> Rows:
        key = number, group
        if key not in self._held:
            table = self._file(number).read(group, _COLUMNS, threads=False)
            self._held[key] = Rows(table), table.nbytes
            while len(self._held) > 1 and sum(n for _, n in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key][0]

    def _file(self, number: int) -> ShardFile:
        if number not in self._files:
            shard = self._features.shards[number]
            file = self._store.shard(self._features.table, shard.sha256)
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
