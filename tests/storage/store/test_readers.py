"""A store read by others, without Stillroom; and the SQL views."""

import json
import os
import re
import subprocess
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest

from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.store.sql import connect, query
from stillroom.storage.tables.schema import SCHEMAS, TABLES
from stillroom.storage.tables.soft_targets import SoftTargets


@pytest.fixture
def mixed(filled, samples):
    """One shard with a row of every kind."""
    with filled.writer("soft_targets", about=samples.ABOUT) as writer:
        for row in expected(samples):
            writer.add(row)
    return filled


def expected(samples) -> list[dict]:
    return [
        samples.target_row(100 + number, kind=kind) for number, kind in enumerate(samples.KINDS)
    ]


def same(found, row) -> None:
    for name, value in row.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(np.array(found[name], value.dtype), value)
        elif isinstance(value, float):
            assert found[name] == np.float32(value)
        else:
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


OLD_DUCKDB = """
import duckdb, json, sys
assert duckdb.__version__.startswith("1.5."), duckdb.__version__
cursor = duckdb.connect().execute("SELECT * FROM read_parquet(?)", [sys.argv[1]])
names = [column[0] for column in cursor.description]
print(json.dumps([dict(zip(names, row)) for row in cursor.fetchall()], default=bytes.hex))
"""


@pytest.mark.skipif(
    "DUCKDB_1_5_PYTHON" not in os.environ, reason="names a Python that has DuckDB 1.5"
)
def test_duckdb_1_5_reads_a_shard(mixed, samples):
    words = [os.environ["DUCKDB_1_5_PYTHON"], "-c", OLD_DUCKDB, path_of(mixed)]
    read = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    for found, row in zip(read, expected(samples), strict=True):
        same(
            {
                name: bytes.fromhex(x) if isinstance(row.get(name), bytes) else x
                for name, x in found.items()
            },
            row,
        )


def test_datasets_reads_a_shard(mixed, samples, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "parquet", data_files=path_of(mixed), split="train", cache_dir=str(tmp_path / "cache")
    )
    for found, row in zip(rows, expected(samples), strict=True):
        same(found, row)


def test_sql_cuts_a_row_into_targets_whatever_the_kind(mixed, samples):
    """The query of storage/store/README.md."""
    code = (Path(__file__).parents[3] / "storage" / "store" / "README.md").read_text()
    query = re.search(r'targets = duckdb.sql\(f"""(.*?)"""\)', code, flags=re.DOTALL)[1]
    found = duckdb.sql(query.replace("{shards}", repr([path_of(mixed)]))).fetchall()
    for row in expected(samples):
        ids = [ids for key, _, _, ids in found if bytes.fromhex(key) == row["key"]]
        assert len(ids) == row["span_tokens"]
        whole = SoftTargets.from_row(row).ids
        assert ids == (
            [None] * len(ids)
            if whole is None
            else [[i for i in position if i >= 0] for position in whole.tolist()]
        )


READ_BY_DUCKDB_1_5 = {
    "BOOLEAN": {"PLAIN", "RLE"},
    "FLOAT": {"PLAIN", "RLE", "RLE_DICTIONARY", "BYTE_STREAM_SPLIT"},
    "INT32": {"PLAIN", "RLE", "RLE_DICTIONARY", "DELTA_BINARY_PACKED"},
    "INT64": {"PLAIN", "RLE", "RLE_DICTIONARY", "DELTA_BINARY_PACKED"},
    "BYTE_ARRAY": {"PLAIN", "RLE", "RLE_DICTIONARY"},
    "FIXED_LEN_BYTE_ARRAY": {"PLAIN", "RLE", "RLE_DICTIONARY"},
}
"""Encodings by physical type; RLE is that of levels. BYTE_STREAM_SPLIT of integers came with 2.0,
float16 never did."""


def test_encodings_are_those_duckdb_1_5_reads(mixed):
    group = pq.ParquetFile(path_of(mixed)).metadata.row_group(0)
    columns = {
        group.column(i).path_in_schema.split(".")[0]: group.column(i)
        for i in range(group.num_columns)
    }
    for name, column in columns.items():
        assert set(column.encodings) <= READ_BY_DUCKDB_1_5[column.physical_type], name
    encoded = {name: set(columns[name].encodings) - {"PLAIN", "RLE"} for name in columns}
    assert encoded["token_ids"] == {"DELTA_BINARY_PACKED"}
    assert encoded["ids"] == encoded["counts"] == encoded["entries"] == {"RLE_DICTIONARY"}
    assert encoded["logprobs"] == encoded["weights"] == encoded["entropy"] == {"BYTE_STREAM_SPLIT"}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert all(column.has_column_index for name, column in columns.items() if name != "label")


def test_top_k_of_a_large_vocabulary_fits_the_budget(store, samples):
    """At most 3.75 K + 12 bytes a token, footers and all.

    A position's candidates are drawn anew by Zipf's law.

    Real teachers repeat themselves more (tests/bench).
    """
    k, tokens, rows, vocabulary = 32, 256, 96, 40_000
    rng = np.random.default_rng(0)
    names = rng.permutation(vocabulary).astype(np.int32)
    about = samples.ABOUT | {"vocab_size": vocabulary}
    with store.writer("soft_targets", about=about) as writer:
        for index in range(rows):
            ranks = 30 * (vocabulary / 30) ** rng.random((tokens, k)) - 30
            logits = np.sort(rng.gumbel(size=(tokens, k)) * 1.5, axis=1)[:, ::-1]
            logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True) * 1.15)).astype(
                np.float32
            )
            targets = SoftTargets(
                ids=names[ranks.astype(int)],
                logprobs=logprobs,
                tail_logprob=np.log1p(-np.exp(logprobs.astype(np.float64)).sum(axis=1)).astype(
                    np.float32
                ),
                token_logprob=logprobs[:, 0] - 1e-2,
                entropy=rng.gamma(4, 0.6, tokens),
            )
            row = samples.target_row(index) | targets.columns(10) | {"span_start": 1, "spans": None}
            writer.add(row | {"token_ids": names[rng.zipf(1.3, tokens + 1) % vocabulary]})
    commits = store.commits("soft_targets")
    assert sum(c.shard.bytes for c in commits) / sum(c.tokens for c in commits) <= 3.75 * k + 12


def test_views_show_what_is_committed(filled):
    def count(sql):
        return query(filled, sql).to_pylist()[0]

    assert count("SELECT count(*) AS n, sum(span_tokens)::INT AS t FROM soft_targets") == {
        "n": 40,
        "t": 240,
    }
    assert count("SELECT count(*) AS n FROM generations WHERE text LIKE 'text%'") == {"n": 5}
    assert count("SELECT messages[1].content AS c FROM prompts ORDER BY c") == {"c": "prompt 0"}
    assert count("SELECT count(*) AS n FROM rejects") == {"n": 0}
    assert count("SELECT count(*) AS n FROM inputs") == {"n": 0}
    assert count(
        "SELECT sum(rows)::INT AS n, count(*) AS c FROM commits WHERE table_name = 'soft_targets'"
    ) == {
        "n": 40,
        "c": 5,
    }
    joined = (
        "SELECT count(*) AS n FROM soft_targets s JOIN generations g ON s.generation_key = g.key"
    )
    assert count(joined) == {"n": 5}

    (first, *_) = filled.commits("soft_targets")
    filled.files.path("data/soft_targets/zz").mkdir()
    filled.files.path("data/soft_targets/zz/orphan.parquet").write_bytes(
        filled.files.read(first.shard.name)
    )
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
    keys = query(
        filled,
        (
            "SELECT key, key AS prompt_key, 'train' AS split, NULL::INT AS windows, true AS first "
            "FROM prompts"
        ),
    )
    filled.put_inputs("it's one", keys, {})
    filled.put_inputs("two", keys.slice(3), {})
    rows = query(
        filled,
        "SELECT data_id, count(*) AS n FROM inputs JOIN prompts USING (key) GROUP BY 1 ORDER BY 1",
    )
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
        (
            "SELECT * FROM read_parquet('https://example.org/x.parquet')",
            "disabled by configuration",
        ),
    ],
)
def test_bad_sql_says_why_and_other_files_are_out_of_reach(
    filled, sql, says, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=says):
        query(filled, sql)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_shard_is_an_integrity_error(filled):
    filled.files.path(filled.commits("generations")[0].shard.name).unlink()
    with pytest.raises(IntegrityError):
        query(filled, "SELECT * FROM generations")
