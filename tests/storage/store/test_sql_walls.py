"""SQL of strangers: nothing outside the store is read or written.

Nothing is fetched, and nothing is set.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import samples

from stillroom.storage.errors import UsageError
from stillroom.storage.published.export_rows import allowed_generations
from stillroom.storage.store.sql import first_rows, query
from stillroom.storage.store.store import Store

SECRET = "marker-of-a-secret"

STATEMENTS = (
    "COPY generations TO '{outside}/new.parquet'",
    "COPY (SELECT 1) TO '{outside}/new.csv' (FORMAT csv)",
    "COPY generations FROM '{outside}/secret.csv'",
    "EXPORT DATABASE '{outside}/new'",
    "IMPORT DATABASE '{outside}'",
    "ATTACH '{outside}/new.db'",
    "ATTACH '{outside}/new.db' AS stolen (READ_ONLY)",
    "ATTACH 'https://example.org/x.db'",
    "DETACH memory",
    "USE memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{outside}/x.duckdb_extension'",
    "SET enable_external_access = true",
    "RESET enable_external_access",
    "SET lock_configuration = false",
    "PRAGMA enable_external_access = true",
    "PRAGMA database_list",
    "CREATE TABLE t AS SELECT 1",
    "CREATE VIEW v AS SELECT * FROM '{outside}/secret.csv'",
    "CREATE SECRET s (TYPE s3)",
    "CREATE PERSISTENT SECRET s (TYPE s3)",
    "CREATE MACRO m() AS 1",
    "DROP VIEW generations",
    "INSERT INTO commits SELECT * FROM commits",
    "DELETE FROM commits",
    "UPDATE commits SET rows = 0",
    "CHECKPOINT",
    "VACUUM",
    "CALL pragma_version()",
    "BEGIN",
    "SELECT 1; COPY (SELECT 1) TO '{outside}/new.csv'",
    "SELECT 1; SET enable_external_access = true",
)
"""No SELECT, or more than one statement."""

READS = (
    "SELECT * FROM '{outside}/secret.csv'",
    "SELECT * FROM '{outside}/*.csv'",
    "SELECT * FROM '{inside}/../outside/secret.csv'",
    "SELECT * FROM '{inside}/link.csv'",
    "SELECT * FROM read_csv('{outside}/secret.csv')",
    "SELECT * FROM read_csv_auto('{outside}/secret.csv')",
    "SELECT * FROM sniff_csv('{outside}/secret.csv')",
    "SELECT * FROM read_text('{outside}/secret.csv')",
    "SELECT * FROM read_blob('{outside}/secret.csv')",
    "SELECT * FROM read_json('{outside}/secret.csv')",
    "SELECT * FROM read_ndjson_objects('{outside}/secret.csv')",
    "SELECT * FROM read_parquet('{outside}/secret.csv')",
    "SELECT * FROM parquet_metadata('{outside}/secret.csv')",
    "SELECT * FROM parquet_schema('{outside}/secret.csv')",
    "SELECT * FROM glob('{outside}/*')",
    "SELECT * FROM glob('/etc/pass*')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_text('file://{outside}/secret.csv')",
    "SELECT * FROM read_text('~/.ssh/id_rsa')",
    "SELECT * FROM 'https://example.org/x.parquet'",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "SELECT * FROM read_csv('hf://datasets/a/b/x.csv')",
    "SELECT getenv('HOME')",
    "SELECT * FROM query('SELECT * FROM read_text(''{outside}/secret.csv'')')",
    "SELECT * FROM query_table('{outside}/secret.csv')",
    "SELECT * FROM postgres_scan('host=localhost', 'a', 'b')",
    "SELECT * FROM sqlite_scan('{outside}/secret.csv', 't')",
    "SELECT * FROM which_secret('{outside}/secret.csv', 's3')",
    "SELECT (SELECT content FROM read_text('{outside}/secret.csv')) FROM generations",
    "WITH s AS (SELECT * FROM '{outside}/secret.csv') SELECT * FROM s",
    "FROM '{outside}/secret.csv'",
    "DESCRIBE SELECT * FROM '{outside}/secret.csv'",
    "SUMMARIZE '{outside}/secret.csv'",
    "SELECT * FROM (DESCRIBE '{outside}/secret.csv')",
    "SELECT * FROM tables_of_python",
)
"""Other files, the network, the environment, and what stands in a variable of ours."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("walls")
    store, outside = Store.open(folder / "store", create=True), folder / "outside"
    with store.writer("generations", about=samples.GENERATIONS_ABOUT) as writer:
        writer.add(samples.generation_row(0))
    outside.mkdir()
    (outside / "secret.csv").write_text(f"a,b\n{SECRET},1\n")
    (Path(store.root) / "link.csv").symlink_to(outside / "secret.csv")
    return {"outside": str(outside), "inside": str(store.root)}


def refused(places: dict[str, str], ask: Callable[[Store, str], object], sql: str) -> str:
    """What it is refused with; the secret does not come out, and nothing new is anywhere."""
    folder = Path(places["outside"]).parent
    before = sorted(folder.rglob("*"))
    with pytest.raises(UsageError) as caught:
        ask(Store.open(places["inside"]), sql.format(**places))
    assert SECRET not in str(caught.value)
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("sql", STATEMENTS)
def test_what_is_not_one_select_is_refused(places: dict[str, str], sql: str) -> None:
    assert "not one SELECT statement" in refused(places, query, sql)


@pytest.mark.parametrize("sql", READS)
def test_a_select_sees_the_store_alone(places: dict[str, str], sql: str) -> None:
    tables_of_python = [SECRET]  # which DuckDB would find by its name
    said = refused(places, lambda store, asked: first_rows(store, asked, most=9), sql)
    assert tables_of_python
    assert re.search("disabled by configuration|not exist|not in the catalog|not found", said)


@pytest.mark.parametrize(
    "where",
    [
        "true; COPY (SELECT 1) TO '{outside}/new.csv'",
        "text IN (SELECT content FROM read_text('{outside}/secret.csv'))",
        "EXISTS (SELECT * FROM '{outside}/secret.csv')",
        "getenv('HOME') = '/root'",
        "text = (SELECT max(file) FROM glob('{outside}/*'))",
    ],
)
def test_a_condition_sees_no_more(places: dict[str, str], where: str) -> None:
    assert refused(places, allowed_generations, where).startswith("--where: query: ")
