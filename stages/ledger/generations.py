"""The books of `generate`: which completions are there and serve, and which are to be made.

They also say which are rejected, and why one is to be made.
"""

from typing import Any

import pyarrow as pa

from .books import Books, Ledger, Pending, different
from .requests import (
    GENERATION_BYTES,
    GenerationRequest,
    generation_key,
    sampling_id,
    sampling_settings,
)

SERVES = """
    CASE WHEN finish_reason <> 'length'
    THEN completion_tokens <= {max_tokens} AND prompt_tokens + completion_tokens <= {context}
    ELSE completion_tokens = {max_tokens}
        OR (prompt_tokens + completion_tokens = {context} AND completion_tokens < {max_tokens})
    END"""
"""Whether a row is what a run with this `max_tokens` and this context would have made."""
ANSWERS_SERVE = """
    prompt_tokens + completion_tokens <= {context}
        AND (finish_reason <> 'length' OR place IN (SELECT place FROM cut_alike))"""
"""The same of an endpoint, which counts other tokens than those of the row: an answer that ended is
whole."""


def generation_ledger(
    books: Books, *, author_id: str, context_tokens: int, author_parts: dict[str, Any] | None = None
) -> Ledger:
    """The books of `generate`.

    They leave the table `asked` (number, held_out, place, stored, tokens, reason) behind.
    """
    generate = books.generate
    sampling = _sampling_id(books, author_id)
    rule = ANSWERS_SERVE if generate.remote else SERVES
    if generate.remote:
        books.index.register("cut_alike", _cut_alike(books, sampling))
    serves = rule.format(max_tokens=generate.max_tokens, context=context_tokens)
    books.index.execute(
        "CREATE TYPE reject_reason AS ENUM (SELECT DISTINCT reason FROM rejects UNION SELECT '')"
    )
    books.index.execute(f"""
        CREATE TEMP TABLE asked AS
        SELECT number, held_out, place, coalesce(stored, 0) > 0 AS stored, tokens,
            reason::reject_reason AS reason
        FROM (
            SELECT prompt_key, held_out, number * {generate.samples} + s AS number,
                s::INT AS sample_index
            FROM inputs, range({generate.samples}) AS samples(s) WHERE first
        ) LEFT JOIN (
            SELECT prompt_key, sample_index, count(*) AS stored,
                min(place) FILTER ({serves}) AS place,
                arg_min(completion_tokens, place) FILTER ({serves}) AS tokens
            FROM generations WHERE sampling_id = '{sampling}' GROUP BY ALL
        ) USING (prompt_key, sample_index) LEFT JOIN (
            SELECT prompt_key, sample_index, min(reason) AS reason
            FROM rejects WHERE context_id = '{sampling}' AND limit_tokens = {context_tokens}
            GROUP BY ALL
        ) USING (prompt_key, sample_index)""")
    ledger = Ledger()
    for served, reason, stored, count, tokens in books.index.rows(
        "SELECT place IS NOT NULL, reason, stored, count(*), sum(tokens) FROM asked GROUP BY ALL"
    ):
        why = "stored under another max_tokens" if stored else "new"
        ledger.enter(count, tokens, served=served, rejected=reason, why=why)
    _explain_new(books, ledger, author_id, author_parts or {})
    ledger.sources = books.sources("asked", "place")
    ledger.tokens_to_do = ledger.pending * generate.max_tokens
    ledger.bytes_to_do = ledger.tokens_to_do * GENERATION_BYTES
    return ledger


def pending_held_out(books: Books) -> int:
    """How many of the completions that `generation_ledger` finds to do are judged on."""
    ((count,),) = books.index.rows(
        "SELECT count(*) FROM asked WHERE held_out AND place IS NULL AND reason IS NULL"
    )
    return int(count)


def _cut_alike(books: Books, sampling: str) -> pa.Table:
    """`place` of an endpoint's answers that were cut by the limit that the recipe has."""
    cut: dict[str, list[tuple[int, int]]] = {}
    for (place,) in books.index.rows(f"""
        SELECT place FROM generations
        WHERE sampling_id = '{sampling}' AND finish_reason = 'length'"""):
        shard, row = books.place("generations", place)
        cut.setdefault(shard, []).append((row, place))
    found = []
    for shard, rows in cut.items():
        read = books.store.rows("generations", {shard: [row for row, _ in rows]}, ["max_tokens"])
        limits = [row["max_tokens"] for row in read]
        alike = zip(limits, rows, strict=True)
        found += [place for limit, (_, place) in alike if limit == books.generate.max_tokens]
    return pa.table({"place": pa.array(found, pa.int64())})


def published_alike(books: Books, *, author_id: str) -> int:
    """How many of the published rows were written as the recipe says."""
    ((rows,),) = books.index.rows(f"""
        SELECT count(*) FROM published p JOIN generations g ON g.key = p.key::UUID
        WHERE g.sampling_id = '{_sampling_id(books, author_id)}'""")
    return int(rows)


def pending_generations(books: Books, *, author_id: str) -> Pending[GenerationRequest]:
    """What is still to be made, after `generation_ledger`."""
    generate = books.generate
    sampling = _sampling_id(books, author_id)
    rows = books.index.on_disk(f"""
        SELECT a.number, i.prompt_key::BLOB AS prompt_key,
            (a.number % {generate.samples})::INT AS sample_index, p.place
        FROM asked a JOIN inputs i ON i.number = a.number // {generate.samples}
        JOIN (SELECT prompt_key, min(place) AS place FROM prompts GROUP BY ALL) p
            ON p.prompt_key = i.prompt_key
        WHERE a.place IS NULL AND a.reason IS NULL ORDER BY a.number""")
    ((planned,),) = books.index.rows("SELECT count(*) FROM asked")

    def make(block: pa.Table) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                generation_key(sampling, row["prompt_key"], row["sample_index"]),
                row["prompt_key"],
                row["sample_index"],
                books.place("prompts", row["place"]),
            )
            for row in block.to_pylist()
        ]

    return Pending(rows, planned, make)


def _sampling_id(books: Books, author_id: str) -> str:
    return sampling_id(author_id, sampling_settings(books.generate, books.recipe.data))


def _explain_new(
    books: Books, ledger: Ledger, author_id: str, author_parts: dict[str, Any]
) -> None:
    """Tell of new requests that the store has them otherwise.

    It has them from another author or under other settings.
    """
    generate = books.generate
    sampling = _sampling_id(books, author_id)
    others = f"FROM generations WHERE sampling_id <> '{sampling}' AND source_key IS NULL"
    if not ledger.why["new"] or not books.index.rows(f"SELECT 1 {others} LIMIT 1"):
        return
    settings = sampling_settings(generate, books.recipe.data)
    for other, newest, count in books.index.rows(f"""
        SELECT o.other, max(o.newest), count(*) FROM asked a
        JOIN inputs i ON i.number = a.number // {generate.samples}
        JOIN (SELECT prompt_key, arg_max(sampling_id, place) AS other, max(place) AS newest {others}
            GROUP BY ALL) o
            ON o.prompt_key = i.prompt_key
        WHERE a.place IS NULL AND NOT a.stored AND a.reason IS NULL GROUP BY ALL"""):
        sha256, _ = books.place("generations", newest)
        about = books.store.shard("generations", sha256).about
        how = different(
            settings, {name: value for name, value in about["settings"].items() if name in settings}
        )
        if about["author_id"] != author_id:
            parts = books.store.teacher_parts(about["author_id"])
            how = (
                f"other {different(author_parts, parts)}"
                if author_parts and parts
                else f"author {other[:8]}"
            )
            reason = f"stored from another author ({how})"
        else:
            reason = f"stored with other settings ({how})"
        ledger.why[reason] += count
        ledger.why["new"] -= count
    ledger.why = +ledger.why
