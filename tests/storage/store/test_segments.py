"""The index: a segment that does not hold the rows of its commits is not used.

Memory and disk are bounded.
"""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.storage.errors import StillroomError, UsageError
from stillroom.storage.store import limits, segments
from stillroom.storage.store.index import Index
from stillroom.storage.store.segments import Indexed, Segments, segment_schema
from stillroom.storage.store.store import Store


def test_a_segment_of_other_rows_is_not_used(filled, monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT", 5)
    commits = filled.commits("soft_targets")
    name = Segments(filled.files, "soft_targets").put(commits)
    assert Segments(filled.files, "soft_targets").find(commits) == name
    path = filled.files.path(name)
    rows = pq.read_table(path)
    path.unlink()
    beyond = pa.array(rows["place"].to_numpy() + (1 << 40))
    moved = rows.set_column(0, rows.schema.field("place"), beyond)
    for planted in (rows.slice(1), moved, rows.drop_columns("k")):
        buffer = io.BytesIO()
        pq.write_table(planted, buffer)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:32]
        path.with_name(f"{path.name.split('-')[0]}-{digest}.parquet").write_bytes(buffer.getvalue())
    path.with_name(path.name.split("-")[0]).write_bytes(b"no dash")
    assert Segments(filled.files, "soft_targets").find(commits) is None
    index = Index(filled)
    assert index.rows("SELECT count(*), max(place) >> 32 FROM soft_targets") == [(40, 4)]
    index.close()


def test_a_plan_holds_no_more_than_it_may_and_the_environment_says_how_much(filled, monkeypatch):
    def held(index):
        settings = (f"current_setting('{name}')" for name in limits.SETTINGS.values())
        return index.rows(f"SELECT {', '.join(settings)}")[0]

    index = Index(filled)
    assert held(index) == ("762.9 MiB", "186.2 GiB")
    index.use_all_memory()
    assert held(index) == ("7.4 GiB", "186.2 GiB")  # not a share of the machine's
    index.close()
    monkeypatch.setenv("STILLROOM_SQL_MEMORY", "30MB")
    monkeypatch.setenv("STILLROOM_SQL_DISK", "1MB")
    index = Index(filled)
    index.use_all_memory()
    says = "^plan: .*STILLROOM_SQL_MEMORY and STILLROOM_SQL_DISK say how much"
    with pytest.raises(StillroomError, match=says):
        index.rows("SELECT list(range) FROM range(4000000)")
    index.close()
    monkeypatch.setenv("STILLROOM_SQL_MEMORY", "a lot")
    with pytest.raises(UsageError, match="STILLROOM_SQL_MEMORY: 'a lot' is no size"):
        Index(filled)


def test_what_is_grouped_of_segments_and_newest_rows_goes_to_disk(filled, monkeypatch, tmp_path):
    """A hash table of all keys takes twice what may be held."""
    count, schema = 1_500_000, segment_schema("rejects")
    keys = pa.Array.from_buffers(
        pa.binary(16), count, [None, pa.py_buffer(np.random.default_rng(0).bytes(16 * count))]
    )
    given = {"place": pa.array(np.arange(count)), "prompt_key": keys, "tokens_key": keys}
    rows = {f.name: given.get(f.name, pa.repeat(pa.scalar(None, f.type), count)) for f in schema}
    for name in ("context_id", "reason"):
        rows[name] = pa.repeat("a", count)
    for name in ("sample_index", "limit_tokens"):
        rows[name] = pa.repeat(pa.scalar(1, schema.field(name).type), count)
    table = pa.table([rows[f.name] for f in schema], schema=schema)
    pq.write_table(table.slice(5), segment := tmp_path / "segment.parquet", row_group_size=100_000)
    found = Store.indexed

    def indexed(store, name, **how):
        if name != "rejects":
            return found(store, name, **how)
        return Indexed([], table.slice(0, 5), [segment])

    monkeypatch.setattr(Store, "indexed", indexed)
    monkeypatch.setenv("STILLROOM_SQL_MEMORY", "60MB")
    index = Index(filled)
    grouped = "SELECT prompt_key, sample_index, count(*) AS n FROM rejects GROUP BY ALL"
    assert index.rows(f"SELECT count(*), sum(n) FROM ({grouped})") == [(count, count)]
    index.close()
