"""Which texts a teacher is asked for.

They are those whose prompts its `where` takes, up to its budget of tokens.

Equal tokens are one text, whatever their prompts: a teacher that is asked for one of them has them
all.
"""

import re

import pyarrow as pa
import pyarrow.compute as pc

from ...storage.errors import UsageError
from ...storage.integrity.checked import Memory, prove_bytes
from ...storage.store.sql import query
from ...storage.tables.schema import TableName
from ...storage.tables.shard import StoredFile
from ..recipe.sections import OneTeacher, Recipe
from .books import Books

EVERYTHING = ""
"""In place of a condition."""


def reads_source(recipe: Recipe) -> bool:
    """Whether a teacher's `where` may ask which file a prompt is of."""
    return any(_asks_source(one) for one in recipe.several)


def _asks_source(one: OneTeacher) -> bool:
    return one.where is not None and re.search(r"\bsource\b", one.where, re.IGNORECASE) is not None


def take_route(books: Books, one: OneTeacher) -> str:
    """SQL that goes on with AND: what a teacher is asked for, by `tokens_key`.

    It is to be called after `choose_generations`.

    The budget is over texts to train on: of those that judge, the teacher scores all that its
    `where` takes.
    """
    if one.where is None and one.budget_tokens is None:
        return EVERYTHING
    where = "true"
    if one.where is not None:
        field = f"teachers: where of {one.name!r}"
        taken = keys_where(books, "prompts", _rows(books, one, field), one.where, field=field)
        books.index.register("taken", taken)
        # Only the recipe's own rows are asked: other data in the store may have a prompt with
        # another label, say.
        rows = "SELECT prompt_key FROM inputs WHERE key IN (SELECT key::UUID FROM taken)"
        where = f"prompt_key IN ({rows})"
    books.index.execute(f"""
        CREATE OR REPLACE TEMP TABLE routed AS
        SELECT DISTINCT tokens_key FROM texts WHERE {where}""")
    if one.budget_tokens is not None:
        _spend(books, one.budget_tokens)
    return "AND tokens_key IN (SELECT tokens_key FROM routed)"


def _rows(books: Books, one: OneTeacher, field: str) -> str:
    """SQL of the rows that a `where` is asked of.

    Where it asks for `source`, they are as this recipe read them.

    Raises:
        UsageError: the record of this recipe's prompts does not say where they stood.
    """
    if not _asks_source(one):
        return "prompts"
    mine = (
        "SELECT key, any_value(source) AS source FROM inputs "
        f"WHERE data_id = '{books.data_id}' GROUP BY key"
    )
    if query(books.store, f"SELECT 1 FROM ({mine}) WHERE source IS NULL LIMIT 1").num_rows:
        raise UsageError(
            f"{field}: asks for `source`, and the store's record of these prompts does not say "
            "where each was read: no such `where` was there when it was made. Put teacher and data "
            "there again, or ask for another column."
        )
    return f"(SELECT p.* REPLACE (i.source AS source) FROM prompts p JOIN ({mine}) i USING (key))"


def _spend(books: Books, tokens: int) -> None:
    """Take the texts that are beyond the budget out of `routed`."""
    texts = books.index.table("""
        SELECT tokens_key::BLOB AS tokens_key, any_value(scored) AS scored FROM chosen
        WHERE tokens_key IN (SELECT tokens_key FROM routed)
            AND tokens_key NOT IN (SELECT tokens_key FROM judged)
        GROUP BY chosen.tokens_key ORDER BY min(prompt_key), min(key)""")
    # Up to the first that does not fit: so a larger budget takes none away. The first in any case.
    fits = pc.less_equal(pc.cumulative_sum(texts["scored"].cast(pa.int64())), tokens)
    books.index.register("paid", texts.slice(0, max(1, pc.sum(fits).as_py() or 0)))
    books.index.execute("""
        DELETE FROM routed WHERE tokens_key NOT IN (SELECT tokens_key FROM judged)
            AND tokens_key NOT IN (SELECT tokens_key::UUID FROM paid)""")


def keys_where(
    books: Books, table: TableName, rows: str, condition: str, *, field: str
) -> pa.Table:
    """Keys of the rows of a table for which an SQL condition holds.

    Args:
        books: Of the store.
        table: Which.
        rows: SQL of its rows.
        condition: Over their columns.
        field: Of the recipe, for messages.

    Raises:
        UsageError: the condition is none.
        IntegrityError: a file of the table is damaged.
    """
    memory = Memory.of_user()
    for part, _ in books.store.parts:  # DuckDB would read a flipped bit without a word
        for shard in part.shards(table):
            prove_bytes(StoredFile(part.files, shard.name, shard.sha256), memory)
    try:
        return query(books.store, f"SELECT key FROM {rows} WHERE {condition}")
    except UsageError as error:
        raise UsageError(f"{field}: {error}") from error
