"""Which texts a teacher is asked for: those whose prompts its `where` takes, up to its budget of tokens.

Equal tokens are one text, whatever their prompts: a teacher that is asked for one of them has them all.
"""

import pyarrow as pa
import pyarrow.compute as pc

from ...storage.errors import IntegrityError, UsageError
from ...storage.store.sql import query
from ...storage.tables.schema import TableName
from ...storage.tables.shard import REPAIR
from ..recipe.sections import OneTeacher
from .books import Books

EVERYTHING = ""
"""In place of a condition."""


def take_route(books: Books, one: OneTeacher) -> str:
    """SQL that goes on with AND: what a teacher is asked for, by `tokens_key`; after `choose_generations`.

    The budget is over texts to train on: of those that judge, the teacher scores all that its `where`
    takes.
    """
    if one.where is None and one.budget_tokens is None:
        return EVERYTHING
    where = "true"
    if one.where is not None:
        field = f"teachers: where of {one.name!r}"
        taken = keys_where(books, "prompts", "key", one.where, field=field)
        books.index.register("taken", taken)
        # Of the recipe's own rows: other data in the store may have a prompt with another label, say.
        rows = "SELECT prompt_key FROM inputs WHERE key IN (SELECT key::UUID FROM taken)"
        where = f"prompt_key IN ({rows})"
    books.index.execute(f"""
        CREATE OR REPLACE TEMP TABLE routed AS
        SELECT DISTINCT tokens_key FROM (
            SELECT tokens_key, prompt_key FROM judged
            UNION ALL SELECT tokens_key, prompt_key FROM chosen WHERE NOT held_out)
        WHERE {where}""")
    if one.budget_tokens is not None:
        _spend(books, one.budget_tokens)
    return "AND tokens_key IN (SELECT tokens_key FROM routed)"


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
    books: Books, table: TableName, column: str, condition: str, *, field: str
) -> pa.Table:
    """A column of the rows of a table for which an SQL condition holds; `field`: of the recipe, for messages.

    Raises:
        UsageError: the condition is none.
        IntegrityError: a file of the table is damaged.
    """
    for part, _ in books.store.parts:  # DuckDB would read a flipped bit without a word
        for shard in part.shards(table):
            if part.files.sha256(shard.name) != shard.sha256:
                raise IntegrityError(
                    f"{shard.name}: the file is damaged (its sha256 is another one). {REPAIR}"
                )
    try:
        return query(books.store, f"SELECT {column} FROM {table} WHERE {condition}")
    except UsageError as error:
        raise UsageError(f"{field}: {error}") from error
