"""Samples of several teachers.

It says what each teacher has of a text, which texts are whole, and which engines ran a teacher.

A text is whole where each teacher that is asked for it has scored it. Others are not learnt from
and nobody is judged on them: they are counted.
"""

from collections.abc import Sequence

import pyarrow as pa

from .books import Books
from .coverage import OF_ENGINE
from .targets import AS_ASKED


def keep_scored(books: Books, number: int) -> None:
    """Keep the view `scored` of one teacher beside those of others, after its `target_ledger`."""
    books.index.execute(f"""
        CREATE OR REPLACE TEMP TABLE scored_{number} AS
        SELECT tokens_key, key, tokens, scored, held_out, target, entries, reason FROM scored""")


def _each(teachers: int) -> str:
    parts = (f"SELECT {n} AS teacher, * FROM scored_{n}" for n in range(teachers))
    return f"({' UNION ALL '.join(parts)})"


def sample_rows(books: Books, teachers: int) -> pa.Table:
    """Whole texts to train and be judged on, after `keep_scored` of each teacher.

    Returns held_out, prompt_key, place (of soft_targets: of the first teacher that is asked),
    others (places of the others), tokens, scored, number, bytes (`text_rows`).
    """
    books.index.use_all_memory()
    return books.index.table(f"""
        SELECT s.held_out, c.prompt_key::BLOB AS prompt_key, s.places[1] AS place,
            s.places[2:] AS others, s.tokens, s.scored, {AS_ASKED}
        FROM (
            SELECT tokens_key, any_value(key) AS key, any_value(tokens) AS tokens,
                any_value(scored) AS scored, any_value(held_out) AS held_out,
                arg_min(entries, teacher) AS entries, list(target ORDER BY teacher) AS places
            FROM {_each(teachers)} GROUP BY tokens_key HAVING bool_and(target IS NOT NULL)
        ) s JOIN chosen c USING (key)""")


def left_out(books: Books, names: Sequence[str]) -> list[str]:
    """What is to be said of texts that are not learnt from.

    Nobody is asked for them, or they are not whole.
    """
    each = _each(len(names))
    unasked = books.index.rows(f"""
        SELECT held_out, count(DISTINCT tokens_key) FROM (
            SELECT tokens_key, true AS held_out FROM judged
            UNION ALL SELECT tokens_key, false FROM chosen
                WHERE NOT held_out AND tokens_key NOT IN (SELECT tokens_key FROM judged)
        ) WHERE tokens_key NOT IN (SELECT tokens_key FROM {each}) GROUP BY ALL ORDER BY ALL""")
    lacking = books.index.rows(f"""
        SELECT teacher, coalesce(reason, 'not scored'), count(*) FROM {each}
        WHERE target IS NULL AND tokens_key IN (
            SELECT tokens_key FROM {each} GROUP BY tokens_key HAVING bool_or(target IS NOT NULL))
        GROUP BY ALL ORDER BY ALL""")
    said = [
        f"{count} {'held-out texts' if held_out else 'texts to train on'} are of no teacher: none "
        "is asked for them"
        for held_out, count in unasked
    ]
    if lacking:
        why = ", ".join(f"{names[number]}: {count} {reason}" for number, reason, count in lacking)
        said.append(f"texts are left out that one of their teachers could not score ({why})")
    return said


def engines_of(books: Books, teacher_id: str) -> dict[str, int]:
    """Engine -> how many of a teacher's stored rows it made."""
    return dict(
        books.index.rows(
            f"SELECT {OF_ENGINE}, count(*) FROM soft_targets WHERE teacher_id = '{teacher_id}' "
            "GROUP BY ALL ORDER BY ALL"
        )
    )
