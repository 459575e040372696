"""A store read by others, without Stillroom; and the SQL views."""

import duckdb
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest

from stillroom.storage.catalog import connect, query
from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.schema import SCHEMAS, TABLES


@pytest.fixture
def mixed(filled, samples):
    """One shard with top-k rows and a full row."""
    with filled.writer("soft_targets", about=samples.ABOUT) as writer:
        writer.add(samples.target_row(100))
        writer.add(samples.target_row(101, full=True))
    return filled


def expected(samples) -> list[dict]:
    return [samples.target_row(100), samples.target_row(101, full=True)]


def same(found, row) -> None:
    for name, value in row.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(np.array(found[name], value.dtype), value)
        elif name != "kept_mass":
            assert found[name] == value


def path_of(store) -> str:
    return str(store.files.path(store.commits("soft_targets")[-1].shard.name))


def test_pyarrow_duckdb_and_polars_read_a_shard(mixed, samples):
    path = path_of(mixed)
    readers = [
        pq.read_table(path).to_pylist(),
        duckdb.connect().sql(f"SELECT * FROM '{path}'").to_arrow_table().to_pylist(),
        polars.read_parquet(path).to_dicts(),
    ]
    for rows in readers:
        for found, row in zip(rows, expected(samples), strict=True):
            same(found, row)


def test_datasets_reads_a_shard(mixed, samples, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("parquet", data_files=path_of(mixed), split="train", cache_dir=str(tmp_path / "cache"))
    for found, row in zip(rows, expected(samples), strict=True):
        same(found, row)


def test_encodings_are_those_every_reader_knows(mixed):
    group = pq.ParquetFile(path_of(mixed)).metadata.row_group(0)
    columns = {group.column(i).path_in_schema.split(".")[0]: group.column(i) for i in range(group.num_columns)}
    assert "DELTA_BINARY_PACKED" in columns["ids"].encodings
    assert "BYTE_STREAM_SPLIT" in columns["logprobs"].encodings
    assert columns["logprobs"].physical_type == "FLOAT"
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert all(column.has_column_index for name, column in columns.items() if name != "label")


def test_views_show_what_is_committed(filled):
    def count(sql):
        return query(filled, sql).to_pylist()[0]

    assert count("SELECT count(*) AS n, sum(span_tokens)::INT AS t FROM soft_targets") == {"n": 40, "t": 240}
    assert count("SELECT count(*) AS n FROM generations WHERE text LIKE 'text%'") == {"n": 5}
    assert count("SELECT messages[1].content AS c FROM prompts ORDER BY c") == {"c": "prompt 0"}
    assert count("SELECT count(*) AS n FROM rejects") == {"n": 0}
    assert count("SELECT count(*) AS n FROM inputs") == {"n": 0}
    assert count("SELECT sum(rows)::INT AS n, count(*) AS c FROM commits WHERE table_name = 'soft_targets'") == {
        "n": 40,
        "c": 5,
    }
    joined = "SELECT count(*) AS n FROM soft_targets s JOIN generations g ON s.generation_key = g.key"
    assert count(joined) == {"n": 5}

    (first, *_) = filled.commits("soft_targets")
    filled.files.path("data/soft_targets/zz").mkdir()
    filled.files.path("data/soft_targets/zz/orphan.parquet").write_bytes(filled.files.read(first.shard.name))
    filled.retire(first, reason="test")
    assert count("SELECT count(*) AS n FROM soft_targets") == {"n": 32}


def test_an_empty_store_has_the_same_views_with_the_same_types(store, filled, samples, tmp_path):
    empty = connect(type(store).open(tmp_path / "empty", create=True))
    full = connect(filled)
    for table in (*TABLES, "inputs", "commits"):
        described = [c.sql(f"DESCRIBE {table}").fetchall() for c in (empty, full)]
        assert [row[:2] for row in described[0]] == [row[:2] for row in described[1]]
        if table in SCHEMAS:
            assert [row[0] for row in described[0]] == SCHEMAS[table].names


def test_inputs_view(filled):
    keys = query(filled, "SELECT key, key AS prompt_key, 'train' AS split, NULL::INT AS windows FROM prompts")
    filled.put_inputs("it's one", keys, {})
    filled.put_inputs("two", keys.slice(3), {})
    rows = query(filled, "SELECT data_id, count(*) AS n FROM inputs JOIN prompts USING (key) GROUP BY 1 ORDER BY 1")
    assert rows.to_pylist() == [{"data_id": "it's one", "n": 5}, {"data_id": "two", "n": 2}]


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT colour FROM generations", "colour"),
        ("SELECT * FROM nowhere", "nowhere"),
        ("", "one SELECT"),
        ("SELECT 1; SELECT 2", "one SELECT"),
        ("COPY generations TO 'x.parquet'", "one SELECT"),
        ("CREATE TABLE t AS SELECT 1", "one SELECT"),
        ("ATTACH 'x.db'", "one SELECT"),
        ("SELECT * FROM read_text('/etc/hostname')", "disabled by configuration"),
        ("SELECT * FROM read_parquet('https://example.org/x.parquet')", "disabled by configuration"),
    ],
)
def test_bad_sql_says_why_and_other_files_are_out_of_reach(filled, sql, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=says):
        query(filled, sql)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_shard_is_an_integrity_error(filled):
    filled.files.path(filled.commits("generations")[0].shard.name).unlink()
    with pytest.raises(IntegrityError):
        query(filled, "SELECT * FROM generations")
