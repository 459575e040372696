"""The books of `score`, and the rows that training and evaluation go on with."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ...storage.tables.spans import SPAN_COLUMNS
from ..recipe.features import Feature, captured, learnt
from ..recipe.sections import OneTeacher
from ..recipe.tasks import TASKS
from ..targets.masks import Masks
from ..targets.spec import Kept, reference, target_bytes, wanted
from .books import Books, Ledger, Pending, different
from .coverage import PLACES, best, entries, lacks, reason
from .features import FeatureSql, Widths, capture_id, name_texts
from .requests import TargetRequest, captured_key, read_of, target_key
from .routes import EVERYTHING, keys_where, take_route

TOKEN_BYTES = 4
AS_ASKED = f"""row_number() OVER (ORDER BY s.tokens, s.tokens_key) AS number,
            s.tokens * {TOKEN_BYTES} + s.scored::BIGINT * s.entries * 8 AS bytes"""
"""SQL: where a row of `scored` is among those asked for, and about what its targets take."""


def choose_generations(books: Books, *, author_id: str) -> None:
    """Make the views `chosen`, `judged` and `texts`: what a recipe goes on with.

    `chosen`: the best row of each request, after `select.where`; comes after `generation_ledger`
    where text is made. `judged`: held-out rows in the order of their hashes, up to
    `evaluate.tokens` scored tokens, one at least. `texts`: `judged`, and all that is trained on.
    """
    if books.published is not None:
        books.index.execute(f"CREATE OR REPLACE VIEW chosen AS {_published(books)}")
        _judge(books)
        return
    if books.recipe.generate is None:
        rows = f"JOIN inputs i ON g.source_key = i.key WHERE {books.given(author_id)}"
    else:
        asked = "SELECT place, held_out, number FROM asked WHERE place IS NOT NULL"
        rows = f"JOIN ({asked}) i ON g.place = i.place WHERE true"
    if books.recipe.select.where is not None:
        books.index.register("allowed", _selected(books, books.recipe.select.where))
        rows += " AND g.key IN (SELECT key::UUID FROM allowed)"
    # All spans where there are some, else what follows the prompt (`spans_of`); a labelled text has
    # one target, at its last token (`alignment.class_span`).
    in_spans = "list_sum(g.spans[2:-:2])"
    after = "g.prompt_tokens + g.completion_tokens - greatest(g.prompt_tokens, 1)"
    whole_text = TASKS[books.recipe.run.task].structure.whole_text
    scored = "1" if whole_text else f"coalesce({in_spans}, {after})"
    books.index.execute(f"""
        CREATE OR REPLACE VIEW chosen AS SELECT * FROM (
            SELECT g.key, g.prompt_key, g.tokens_key, g.place, i.held_out, i.number,
                g.prompt_tokens + g.completion_tokens AS tokens, {scored} AS scored
            FROM generations g {rows}
        ) WHERE scored > 0""")
    _judge(books)


def _published(books: Books) -> str:
    """The published rows, as they are; `select.where` may leave some out.

    `place` is that of the text, where it is.
    """
    where = "WHERE true" if books.recipe.score else "WHERE g.place IS NOT NULL"
    if books.recipe.select.where is not None:
        books.index.register("allowed", _selected(books, books.recipe.select.where))
        where += " AND p.key IN (SELECT key FROM allowed)"
    return f"""
        SELECT p.key::UUID AS key, p.prompt_key::UUID AS prompt_key,
            p.tokens_key::UUID AS tokens_key, g.place, held_out, p.number, tokens, p.scored
        FROM published p
        LEFT JOIN (SELECT key, place FROM generations) g ON g.key = p.key::UUID {where}"""


def _judge(books: Books) -> None:
    held_out = books.index.table(
        "SELECT key::BLOB AS key, scored AS span FROM chosen WHERE held_out ORDER BY "
        "prompt_key, chosen.key"
    )
    budget = books.recipe.evaluate.tokens
    keep: list[bool] = []
    for span in held_out["span"].to_pylist():
        keep.append(not any(keep) or span <= budget)
        budget -= span if keep[-1] else 0
    books.index.register("kept", held_out.filter(pa.array(keep, pa.bool_())))
    books.index.execute(
        "CREATE OR REPLACE TEMP TABLE judged AS SELECT * FROM chosen WHERE key IN (SELECT "
        "key::UUID FROM kept)"
    )
    # No UNION ALL of both: what DuckDB groups of one it holds in memory.
    books.index.execute(
        "CREATE OR REPLACE VIEW texts AS SELECT * FROM chosen WHERE NOT held_out OR key IN (SELECT "
        "key FROM judged)"
    )


def text_rows(books: Books) -> pa.Table:
    """Black-box: rows to train and be judged on; text that is judged on is not trained on.

    Returns held_out, prompt_key, place (of generations), tokens, scored, and as all that a snapshot
    is made of: number (in the order in which they were asked for), bytes (about, when decoded).
    """
    books.index.use_all_memory()
    return books.index.table(f"""
        SELECT held_out, prompt_key::BLOB AS prompt_key, place, tokens, scored,
            row_number() OVER (ORDER BY number, key) AS number, tokens * {TOKEN_BYTES} AS bytes
        FROM (SELECT * FROM chosen
            WHERE NOT held_out AND tokens_key NOT IN (SELECT tokens_key FROM judged)
            UNION ALL SELECT * FROM judged)""")


def target_ledger(
    books: Books,
    *,
    teacher_id: str,
    vocab_size: int,
    limit: int,
    teacher_parts: dict[str, Any] | None = None,
    teacher_widths: Widths | None = None,
    route: OneTeacher | None = None,
) -> Ledger:
    """The books of `score`; leaves the view `scored` behind.

    Equal tokens are scored once, and what is judged on is not trained on.

    Args:
        books: After `choose_generations`.
        teacher_id: Whose distribution.
        vocab_size: Of the teacher; decides what reference targets are.
        limit: Tokens that the teacher reads at once.
        teacher_parts: What the teacher's identity is made of, to say how it differs from another's.
        teacher_widths: Of the teacher's vectors, to say what features take; None: not known.
        route: What it is asked for, of several teachers; None: everything.
    """
    score, asked = books.score, EVERYTHING if route is None else take_route(books, route)
    judged, trained = reference(score, vocab_size), wanted(score, vocab_size)
    features = FeatureSql(captured(score.features), teacher_id=teacher_id, places=PLACES)
    if features.columns:
        name_texts(books)
    _view_scored(
        books,
        teacher_id=teacher_id,
        judged=judged,
        trained=trained,
        limit=limit,
        features=features,
        asked=asked,
    )
    ledger = Ledger()
    for one in _counts(books, features.to_do(teacher_widths or {})):
        ledger.equal += one.texts - one.requests
        kept = judged if one.held_out else trained
        why = "new" if one.lack is None else reason(kept, one.lack)
        if one.stored:
            why = "stored with features of fewer bits" if one.fewer else "stored without features"
        served = one.stored and one.complete
        if ledger.enter(one.requests, one.scored, served=served, rejected=one.reason, why=why):
            ledger.tokens_to_do += one.scored
            ledger.bytes_to_do += one.feature_bytes
            ledger.bytes_to_do += 0 if one.stored else int(one.scored * target_bytes(kept))
    _explain_new(books, ledger, teacher_id, teacher_parts or {})
    ledger.sources = books.sources("scored", "target")
    return ledger


def _view_scored(
    books: Books,
    *,
    teacher_id: str,
    judged: Kept,
    trained: Kept,
    limit: int,
    features: FeatureSql,
    asked: str,
) -> None:
    """Make the view `scored`: each text once, with the stored row to reuse or why there is none.

    Its columns: tokens_key, key, tokens, scored, held_out, texts (how many have these tokens);
    stored (whether there is a row of this teacher at all), reason (why it was rejected), target
    (the row to reuse, its place), entries (that it has of a token, at most) and lacks (what the
    nearest row lacks, for `reason`); complete (whether its features are there, or it needs none),
    fewer (whether some have too few bits), text_key and the place of each feature's row.
    """
    with_features = capture_id(teacher_id, captured(books.score.features))
    bits, engine = books.recipe.storage.mantissa_bits, books.recipe.scoring_engine
    # Held-out rows are judged on reference targets; where nobody can make them, on what there is.
    judging = "coalesce(reference, trained)" if books.lenient else "reference"
    # Not materialized: DuckDB then reads of each step only the columns and parts asked for.
    books.index.execute(f"""
        CREATE OR REPLACE VIEW scored AS
        WITH
        -- Equal tokens are scored once: as what is judged on, which is never trained on.
        requests AS NOT MATERIALIZED (
            SELECT tokens_key, coalesce(min(key) FILTER (held_out), min(key)) AS key,
                any_value(tokens) AS tokens, any_value(scored) AS scored,
                bool_or(held_out) AS held_out, count(*) AS texts
            FROM texts WHERE true {asked} GROUP BY tokens_key
        ),
        -- The teacher's stored rows of each text: the best one for either purpose, and what the
        -- nearest one lacks.
        stored_rows AS NOT MATERIALIZED (
            SELECT tokens_key, count(*) AS stored,
                {best(trained, bits, engine)} AS trained,
                {lacks(trained, bits, engine)} AS trained_lacks,
                {best(judged, bits, engine)} AS reference,
                {lacks(judged, bits, engine)} AS reference_lacks
            FROM soft_targets WHERE teacher_id = '{teacher_id}' GROUP BY tokens_key
        ),
        -- What this teacher, reading as many tokens at once, could not score.
        -- With features, of the rows that have some: what fails with them may be had without.
        rejected AS NOT MATERIALIZED (
            SELECT tokens_key, min(reason) FILTER (context_id = '{teacher_id}') AS alone,
                min(reason) AS reason
            FROM rejects WHERE context_id IN ('{teacher_id}', '{with_features}')
                AND limit_tokens = {limit}
            GROUP BY tokens_key
        ){features.tables}
        -- `best` has the row's place in its low bits, below how good it is.
        SELECT requests.*, coalesce(stored, 0) > 0 AS stored,
            CASE WHEN held_out THEN alone ELSE reason END AS reason,
            (CASE WHEN held_out THEN {judging} ELSE trained END % {PLACES})::BIGINT AS target,
            {entries(f"CASE WHEN held_out THEN {judging} ELSE trained END")} AS entries,
            CASE WHEN held_out THEN reference_lacks ELSE trained_lacks END AS lacks
            {features.selected}
        FROM requests
        LEFT JOIN stored_rows USING (tokens_key)
        LEFT JOIN rejected USING (tokens_key)
        {features.joined}""")


class _Count(NamedTuple):
    """How many requests are alike."""

    stored: bool
    """Whether there are targets that can be reused."""
    complete: bool
    fewer: bool
    reason: str | None
    lack: int | None
    held_out: bool
    requests: int
    scored: int
    """Tokens."""
    texts: int
    feature_bytes: int
    """Of the features that are missing."""


def _counts(books: Books, feature_bytes: str) -> Iterator[_Count]:
    """What `scored` holds; `feature_bytes`: SQL of what a row lacks."""
    for row in books.index.rows(f"""
        SELECT target IS NOT NULL, complete, fewer, reason, lacks, held_out, count(*),
            sum(scored)::BIGINT, sum(texts)::BIGINT, sum({feature_bytes})::BIGINT
        FROM scored GROUP BY ALL"""):
        yield _Count(*row)


def target_rows(books: Books) -> pa.Table:
    """White-box: rows to train and be judged on, after `target_ledger`.

    A row whose features the loss needs and nobody could make is not trained on. Returns held_out,
    prompt_key, place (of soft_targets), tokens, scored, number, bytes (`text_rows`).
    """
    books.index.use_all_memory()
    needed = "AND s.complete" if books.recipe.loss.features else ""
    return books.index.table(f"""
        SELECT s.held_out, c.prompt_key::BLOB AS prompt_key, s.target AS place, s.tokens, s.scored,
            {AS_ASKED}
        FROM scored s JOIN chosen c USING (key) WHERE s.target IS NOT NULL {needed}""")


def feature_places(books: Books) -> pa.Table:
    """Each `place` of features that the loss needs of rows to train on, after `target_ledger`."""
    asked = captured(books.score.features)
    needed = learnt(books.recipe.loss.features, books.score.features)
    places = " UNION ".join(
        f"SELECT feature_{asked.index(one)} AS place FROM scored "
        "WHERE NOT held_out AND complete AND target IS NOT NULL"
        for one in needed
    )
    return books.index.table(places)


def pending_targets(
    books: Books, *, teacher_id: str, vocab_size: int, masks: Masks | None = None
) -> Pending[TargetRequest]:
    """What is still to be scored, after `target_ledger`.

    Rows of one kind and like length are beside one another. `masks`: how tokens are hidden from
    the teacher; None: none are.
    """
    score = books.score
    books.index.use_all_memory()
    # The gold label is the prompt's: joined by key, never by position.
    head = TASKS[books.recipe.run.task].structure
    label, with_label = "NULL AS label, NULL AS labels, NULL AS prompt", ""
    if head.classes:
        label = "p.label, p.labels, p.place AS prompt"
        with_label = "JOIN generations g ON g.key = s.key JOIN prompts p ON p.key = g.source_key"
    kept = {True: reference(score, vocab_size), False: wanted(score, vocab_size)}
    asked = captured(score.features)
    # The number of each feature that is missing, of others null.
    lacking = ", ".join(
        f"CASE WHEN NOT s.held_out AND s.feature_{n} IS NULL THEN {n} END"
        for n in range(len(asked))
    )
    rows = books.index.on_disk(f"""
        SELECT s.number, s.tokens_key::BLOB AS tokens_key, s.key::BLOB AS key,
            c.prompt_key::BLOB AS prompt_key, c.place, s.tokens, s.held_out,
            s.target IS NULL AS targets, s.text_key::BLOB AS text_key,
            [{lacking}]::INTEGER[] AS lacking, {label}
        FROM (SELECT *, row_number() OVER (ORDER BY held_out DESC, tokens, tokens_key) - 1 AS number
            FROM scored) s
        JOIN chosen c USING (key) {with_label}
        WHERE (s.target IS NULL OR NOT s.complete) AND s.reason IS NULL ORDER BY s.number""")
    ((planned,),) = books.index.rows("SELECT count(*) FROM scored")

    def make(block: pa.Table) -> list[TargetRequest]:
        found = block.sort_by("place").to_pylist()
        places = books.index.places("generations", block["place"].to_numpy())
        texts = books.store.rows("generations", places, ["token_ids", *SPAN_COLUMNS])
        images = _images(books, block["prompt"].to_numpy()) if head.images else {}
        return [
            TargetRequest(
                reuse_key=_request_key(teacher_id, row, asked),
                tokens_key=row["tokens_key"],
                generation_key=row["key"],
                prompt_key=row["prompt_key"],
                kept=kept[row["held_out"]],
                label=row["label"],
                **read_of(row, text, head, masks),
                image=images.get(row["prompt_key"]),
                text_key=row["text_key"] or b"",
                features=_missing(row, asked),
                targets=row["targets"],
            )
            for row, text in zip(found, texts, strict=True)
        ]

    return Pending(rows, planned, make)


def _images(books: Books, prompts: np.ndarray) -> dict[bytes, bytes]:
    """Prompt key -> the image of its row of `prompts`, of rows at these places."""
    found = books.store.rows("prompts", books.index.places("prompts", prompts), _IMAGE)
    return {row["prompt_key"]: row["image"] for row in found}


_IMAGE = ["prompt_key", "image"]


def _missing(row: Mapping[str, Any], asked: Sequence[Feature]) -> tuple[Feature, ...]:
    return tuple(asked[number] for number in row["lacking"] if number is not None)


def _request_key(teacher_id: str, row: Mapping[str, Any], asked: Sequence[Feature]) -> bytes:
    """Key of a request; with features it is another, as one that fails may do without them."""
    target = target_key(teacher_id, row["tokens_key"])
    return captured_key(target, capture_id(teacher_id, asked)) if _missing(row, asked) else target


def _selected(books: Books, condition: str) -> pa.Table:
    return keys_where(books, "generations", "generations", condition, field="select.where")


def _explain_new(
    books: Books, ledger: Ledger, teacher_id: str, teacher_parts: dict[str, Any]
) -> None:
    """Of the new ones, tell those that the store has from another teacher."""
    others = f"FROM soft_targets WHERE teacher_id <> '{teacher_id}'"
    if not ledger.why["new"] or not books.index.rows(f"SELECT 1 {others} LIMIT 1"):
        return
    for other, count in books.index.rows(f"""
        SELECT other, count(*) FROM scored
        JOIN (SELECT tokens_key, arg_max(teacher_id, place) AS other {others} GROUP BY ALL)
            USING (tokens_key)
        WHERE target IS NULL AND NOT stored AND reason IS NULL GROUP BY other"""):
        parts = books.store.teacher_parts(other)
        how = f"other {different(teacher_parts, parts)}" if teacher_parts and parts else other[:8]
        ledger.why[f"stored from another teacher ({how})"] += count
        ledger.why["new"] -= count
    ledger.why = +ledger.why
