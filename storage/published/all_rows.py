"""All that a store holds, as snapshots.

Of each text there is one row, in the split in which its prompt was recorded.

A recipe says more: which settings of the text, which targets, how many entries. Without one there
is an answer only where the store holds the rows of one teacher and one source of prompts.
"""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UsageError
from ..snapshots.snapshot import Snapshot, make_snapshot
from ..store.bindings import Binding, all_bindings
from ..store.index import Index
from ..store.inputs import read_inputs
from ..store.store import Store
from ..tables.kinds import STRUCTURES
from ..tables.schema import TableName

WHOLE_STORE = "whole_store"
"""In `about` of a snapshot that was made here: no student need have seen these rows."""
_WHOLE = f"kind IN ({', '.join(repr(name) for name, kind in STRUCTURES.items() if kind.whole)})"
# Draws of another kind are other targets.
_TARGETS = "concat_ws(' ', kind, draw, proposal)"
_ADVICE = "Name the recipe in place of the store: it says which are meant"

# Of the texts that were asked for alike, the one that goes furthest: not cut off, or cut off last.
_TEXTS = """
    CREATE TEMP TABLE texts AS
    SELECT key, prompt_key, tokens_key, place, coalesce(held_out, false) AS held_out FROM (
        SELECT *, row_number() OVER (
            PARTITION BY sampling_id, prompt_key, source_key, sample_index
            ORDER BY finish_reason = 'length', completion_tokens DESC, place
        ) AS rank
        FROM generations {scored}
    ) LEFT JOIN splits USING (prompt_key) WHERE rank = 1"""

# Equal tokens are scored once; what is held out anywhere is held out.
_STORED = f"""
    CREATE TEMP TABLE stored AS
    SELECT s.*, {_TARGETS} AS targets, {_WHOLE} AS whole, held_out
    FROM soft_targets s
    JOIN (SELECT tokens_key, bool_or(held_out) AS held_out FROM texts GROUP BY ALL) t
        USING (tokens_key)"""

# Held-out rows are judged on whole distributions; the others have the targets that all have.
_BEST = """
    SELECT held_out, place FROM (
        SELECT *, row_number() OVER (
            PARTITION BY tokens_key
            ORDER BY CASE WHEN held_out THEN whole ELSE targets = '{targets}' END DESC,
                k DESC, p DESC NULLS LAST, len(temperatures) DESC NULLS LAST, mantissa_bits DESC,
                place
        ) AS rank
        FROM stored
    ) WHERE rank = 1"""

# Targets that every text has which is trained on; a whole distribution serves for any entries.
_SHARED = """
    SELECT kinds.targets
    FROM (SELECT DISTINCT targets, whole FROM stored WHERE NOT held_out) kinds
    WHERE NOT EXISTS (
        SELECT 1 FROM stored WHERE NOT held_out GROUP BY tokens_key
        HAVING NOT bool_or(stored.targets = kinds.targets OR stored.whole)
    )
    ORDER BY kinds.targets"""


def all_rows(store: Store) -> dict[str, Snapshot]:
    """Snapshots of all that a store holds, by split; writes nothing, equal contents have equal ids.

    Raises:
        UsageError: it holds no rows, or those of several teachers, sources or kinds of targets.
    """
    binding = _binding(store)
    index = Index(store)
    try:
        table: TableName = "soft_targets" if store.commits("soft_targets") else "generations"
        _refuse_several(store, index, table)
        _view_splits(store, index, binding)
        scored = "SEMI JOIN soft_targets USING (tokens_key)" if table == "soft_targets" else ""
        index.execute(_TEXTS.format(scored=scored))
        rows = index.table(_best_targets(store, index) if scored else _UNSCORED)
        return _snapshots(store, index, table, rows, binding)
    finally:
        index.close()


# Text that is judged on is not trained on.
_UNSCORED = """
    SELECT held_out, place FROM texts
    WHERE held_out OR tokens_key NOT IN (SELECT tokens_key FROM texts WHERE held_out)"""


def _binding(store: Store) -> Binding | None:
    found = sorted(set(all_bindings(store.files).values()), key=repr)
    if len(found) > 1:
        raise UsageError(
            f"{store.root}: holds rows of {len(found)} pairs of a teacher and its data. {_ADVICE}."
        )
    return found[0] if found else None


def _refuse_several(store: Store, index: Index, table: TableName) -> None:
    who = "teacher" if table == "soft_targets" else "author"
    ids = [found for (found,) in index.rows(f"SELECT DISTINCT {who}_id FROM {table} ORDER BY ALL")]
    if not ids:
        raise UsageError(
            f"{store.root}: holds no row to export. Run a recipe first, up to `generate` or "
            "`score`."
        )
    if len(ids) > 1:
        listed = ", ".join(found[:8] for found in ids)
        raise UsageError(f"{store.root}: holds {table} of {len(ids)} {who}s ({listed}). {_ADVICE}.")


def _view_splits(store: Store, index: Index, binding: Binding | None) -> None:
    """The view `splits`: which prompts are held out, by the newest record that has them."""
    ids = [name.removesuffix(".json") for name in store.files.names("inputs")]
    parts = ["SELECT NULL::UUID AS prompt_key, false AS held_out, 0 AS age WHERE false"]
    for data_id in ids:
        recorded = read_inputs(store.files, data_id)
        assert recorded is not None
        age = 0 if binding is not None and data_id == binding.data_id else 1
        parts.append(
            f"SELECT prompt_key::UUID, split = 'test', {age} "
            f"FROM {index.inputs(store.files, recorded)}"
        )
    index.execute(f"""
        CREATE VIEW splits AS
        SELECT prompt_key, min(2 * age + (NOT held_out)::INT) % 2 = 0 AS held_out
        FROM ({" UNION ALL ".join(parts)}) GROUP BY prompt_key""")


def _best_targets(store: Store, index: Index) -> str:
    """SQL: the row of each text that goes out."""
    index.execute(_STORED)
    shared = [targets for (targets,) in index.rows(_SHARED)]
    ((trained,),) = index.rows("SELECT count(*) FROM stored WHERE NOT held_out")
    if trained and len(shared) != 1:
        kinds = index.rows("SELECT DISTINCT targets FROM stored WHERE NOT held_out ORDER BY ALL")
        listed = ", ".join(kind for (kind,) in kinds)
        raise UsageError(
            f"{store.root}: its texts have several kinds of targets ({listed}). {_ADVICE}."
        )
    return _BEST.format(targets=shared[0] if shared else "")


def _snapshots(
    store: Store, index: Index, table: TableName, rows: pa.Table, binding: Binding | None
) -> dict[str, Snapshot]:
    about: dict[str, Any] = {WHOLE_STORE: True}
    if binding is not None:
        about |= {"teacher_id": binding.teacher_id, "data_id": binding.data_id}
    found = {}
    for split, held_out in (("train", False), ("test", True)):
        chosen = rows.filter(pc.equal(rows["held_out"], held_out))
        if chosen.num_rows:
            places = index.places(table, chosen["place"].to_numpy())
            found[split] = make_snapshot(store, table, places, about | {"split": split})
    splits = {split: snapshot.id for split, snapshot in found.items()}
    return {
        split: replace(snapshot, about={**snapshot.about, "splits": splits})
        for split, snapshot in found.items()
    }
