"""What targets and features take of a text and of a token.

It is measured from the rows and the files that a store has of them.
"""

from collections import Counter
from typing import Any

import pyarrow.compute as pc

from stillroom.stages.ledger.features import find_embeddings
from stillroom.storage.snapshots.snapshot import load_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.shard import ShardFile

SCALE_BYTES = 4
EMBEDDING_BITS = 16


def stored_bytes(store: Store, snapshot: str) -> dict[str, Any]:
    """Rows and tokens to train on, and the bytes of a row's targets.

    Beside them are the bytes of each feature's vectors.

    A feature's numbers and scales are as the rows have them. What the files take besides (keys,
    sizes, checksums, footers) is shared by their rows.
    """
    train = load_snapshot(store, snapshot)
    teacher, lengths = train.about["teacher_id"], train.about["lengths"]
    mine = {shard.sha256 for shard in train.shards}
    targets = [c.shard for c in store.commits("soft_targets") if c.shard.sha256 in mine]
    kept = find_embeddings(store, teacher, EMBEDDING_BITS)
    return {
        "embedding_bytes": kept.bytes if kept else None,
        **{name: lengths[name] for name in ("samples", "tokens", "scored_tokens")},
        "target_bytes_a_row": sum(s.bytes for s in targets) / sum(s.rows for s in targets),
        "features": _features(_shards(store, teacher)),
    }


def _shards(store: Store, teacher: str) -> list[tuple[ShardFile, int]]:
    """The shards of one teacher's features, each with the bytes of its file."""
    commits = store.commits("features")
    found = [(store.shard("features", c.shard.sha256), c.shard.bytes) for c in commits]
    return [(shard, size) for shard, size in found if shard.about["teacher_id"] == teacher]


def _features(shards: list[tuple[ShardFile, int]]) -> dict[str, dict[str, float]]:
    rows, vectors, numbers = Counter[str](), Counter[str](), Counter[str]()
    for shard, _ in shards:
        table = shard.read_all(["kind", "layer", "vectors", "values", "scale"])
        scales = pc.fill_null(pc.list_value_length(table["scale"]), 0)
        sizes = pc.add(pc.binary_length(table["values"]), pc.multiply(scales, SCALE_BYTES))
        columns = (*(table[name] for name in ("kind", "layer", "vectors")), sizes)
        for kind, layer, count, size in zip(*(c.to_pylist() for c in columns), strict=True):
            name = f"{kind} {layer}"
            rows[name] += 1
            vectors[name] += count
            numbers[name] += size
    besides = sum(size for _, size in shards) - numbers.total()
    return {
        name: {
            "rows": rows[name],
            "vectors": vectors[name],
            "bytes_a_vector": numbers[name] / vectors[name],
            "besides_a_row": besides / rows.total(),
        }
        for name in sorted(rows)
    }
