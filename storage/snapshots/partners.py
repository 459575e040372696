"""Rows of several teachers that are one sample: where each teacher's row of each sample is.

The snapshot of a training has one row a sample, so order, cursor and lengths are as with one
teacher. What the other teachers said of the same tokens is in a second snapshot, whose rows stay as
long as it names them. The two are joined by `tokens_key`: token ids, spans and label alike.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import IntegrityError, UsageError
from ..store.store import Store
from .snapshot import Snapshot

NONE, ITSELF = -1, -2
"""In place of a place: the teacher was not asked for this sample; its row is the sample's own."""
_ROW_BITS = 32


def partner_places(
    store: Store, samples: Snapshot, partners: Snapshot | None, teachers: Sequence[str]
) -> np.ndarray:
    """[N, J] int64: where each teacher's row of each sample is.

    A number holds the shard of `partners` (its number there) above 32 bits and the row of the shard
    below. It is `NONE` without a row, and `ITSELF` where the sample is the teacher's row.

    Args:
        store: Of both.
        samples: N rows of soft targets.
        partners: Rows of the same texts by other teachers; None: no sample has any.
        teachers: J identities.

    Raises:
        UsageError: a row is of none of these teachers.
        IntegrityError: a teacher has two rows of a sample, or a row is of no sample.
    """
    mine = _rows(store, samples)
    theirs = mine.slice(0, 0) if partners is None else _rows(store, partners)
    places = np.full((mine.num_rows, len(teachers)), NONE, np.int64)
    for number, teacher in enumerate(teachers):
        own = pc.equal(mine["teacher_id"], teacher).to_numpy()
        rows = theirs.filter(pc.equal(theirs["teacher_id"], teacher))
        at = pc.index_in(mine["tokens_key"], value_set=rows["tokens_key"].combine_chunks())
        there = at.is_valid().to_numpy()
        places[there, number] = rows["place"].take(at.drop_null()).to_numpy()
        if (own & there).any() or len(pc.unique(rows["tokens_key"])) < rows.num_rows:
            raise IntegrityError(
                f"snapshot {samples.id}: teacher {teacher} has two rows of one text. Run "
                "`stillroom verify`."
            )
        places[own, number] = ITSELF
    if (places == NONE).all(axis=1).any():
        raise UsageError(
            f"snapshot {samples.id}: some of its rows are of none of the teachers "
            f"{', '.join(teachers)}. Run the recipe again."
        )
    if (places >= 0).sum() != theirs.num_rows:
        raise IntegrityError(
            f"snapshot {samples.id}: rows beside it are of texts that it does not have. Run the "
            "recipe again."
        )
    return places


def _rows(store: Store, snapshot: Snapshot) -> pa.Table:
    """Text, teacher and place of each row, in the snapshot's own order."""
    parts = []
    for number, shard in enumerate(snapshot.shards):
        rows = store.shard(snapshot.table, shard.sha256).select(
            shard.rows, ["tokens_key", "teacher_id"]
        )
        places = (number << _ROW_BITS) + shard.rows.astype(np.int64)
        parts.append(rows.replace_schema_metadata().append_column("place", pa.array(places)))
    return pa.concat_tables(parts)
