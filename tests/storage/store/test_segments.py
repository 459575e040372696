"""Index segments that others planted: one that does not hold the rows of its commits is not used, whatever its name."""

import hashlib
import io

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.store import segments
from stillroom.storage.store.index import Index
from stillroom.storage.store.segments import Segments


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
