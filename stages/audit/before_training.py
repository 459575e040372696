"""The audit before training: do the first rows' tokens and targets belong together?

It also asks whether the student reads them so. What is found here would else show as a student that
learns badly, a day later. There are three questions, and no teacher is needed:

    text      do the ids say the same in the student's tokenizer as in the teacher's, and is
              what the completion's say the text that was written down?
    targets   is the stored log-probability of the token that follows the one that the entries
              give it?
    place     do the targets predict the tokens that they stand beside (`misplaced_targets.py`)?
              Is text that the teacher drew as likely as the entropy says? A scorer that is off
              by one agrees with itself: only this finds it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.errors import IntegrityError, UsageError, answered
from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.index import Index
from ...storage.store.store import Store
from ...storage.tables.doubts import doubts
from ...storage.tables.heads import Head, head_of
from ...storage.tables.spans import SPAN_COLUMNS, spans_of
from ...storage.words import counted
from ..models.inputs.reads import check_ids
from ..recipe.sections import Recipe
from ..recipe.stages import needed
from ..targets.masks import put_back
from .misplaced_targets import shifted, surprise, unknowing

ROWS = 32
VALUES = 1 << 24
"""Numbers of a shard's rows after which no more are looked at: a row of whole distributions may
have as many."""
SHARDS = 4
"""Of the snapshot, first and last among them, that the rows are taken from."""
_HELP = (
    "No step was taken. Score the prompts again into another store (storage.dir); `stillroom "
    "verify STORE --deep --teacher MODEL` compares this one with its teacher. If the rows are "
    "meant as they are, set train.audit: warn."
)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What the rows are held against."""

    tokenizer: Any
    """The student's; None: it reads images."""
    teacher_dir: Path
    """With the teacher's."""
    vocab_size: int
    """Of the student's model."""
    soft: bool
    """Whether the targets are learnt from."""
    own_text: bool
    """Whether the teacher drew the text itself, at temperature 1 or lower, and nobody chose among
    what it drew."""


def fit_of(recipe: Recipe, teacher_dir: Path, *, vocab_size: int, soft: bool) -> Fit:
    """What a recipe's student and loss ask of its rows.

    A pinned snapshot may hold text that others wrote, as rows of several teachers do.
    `select.where` may choose what is unlikely, and of many samples of one prompt equal ones are
    scored once, so rare ones have more than their share.
    """
    from ..models.students.student import student_tokenizer

    generate = recipe.generate
    drawn = (
        generate is not None
        and generate.model is None
        and generate.temperature <= 1.0
        and generate.samples == 1
        and not recipe.several
    )
    pinned = needed(recipe.train, "train").snapshot
    chosen = pinned is not None or recipe.select.where is not None
    return Fit(
        tokenizer=student_tokenizer(recipe, teacher_dir),
        teacher_dir=teacher_dir,
        vocab_size=vocab_size,
        soft=soft,
        own_text=drawn and not chosen,
    )


def audit_rows(store: Store, snapshot: Snapshot, fit: Fit) -> list[str]:
    """Look at the first rows of a few of a snapshot's shards; returns what there is to say of them.

    Raises:
        UsageError: the student does not read the rows as the teacher does.
        IntegrityError: text, tokens and targets of a row do not belong together.
    """
    found = list(_first_rows(store, snapshot))
    rows = [row for row, _ in found]
    _check_vocabulary(rows, fit)
    teacher = None if fit.tokenizer is None else _check_tokenizers(rows, fit)
    # One teacher's, so all of one head. Of a text as a whole no position is in question.
    head = head_of(found[0][1])
    placed = [] if head.whole_text else rows
    written = [row | {"token_ids": put_back(row)} for row in placed] if head.masked else placed
    _check_text(store, written, teacher)
    warnings: list[str] = []
    if fit.soft:
        _check_targets(found)
        warnings = _check_place(placed, head, own_text=fit.own_text)
    return [
        f"audit: {counted(len(rows), 'row')} looked at, their text, tokens and targets belong "
        "together",
        *warnings,
    ]


def _first_rows(store: Store, snapshot: Snapshot) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Rows, and what their shards say of themselves."""
    chosen = np.unique(np.linspace(0, len(snapshot.shards) - 1, SHARDS).astype(int))
    for number in chosen:
        part = snapshot.shards[number]
        shard = store.shard(snapshot.table, part.sha256)
        held = 0
        for row in shard.take(part.rows[: ROWS // len(chosen)]):
            yield row | {"shard": shard.name}, shard.about
            held += sum(len(row[name]) for name in ("logprobs", "ids") if row.get(name) is not None)
            if held > VALUES:
                break


def _check_vocabulary(rows: Sequence[Row], fit: Fit) -> None:
    for row in rows:
        highest = int(row["token_ids"].max())
        check_ids(highest, fit.vocab_size, "the text has", where=f" ({_name(row)})")


def _check_tokenizers(rows: Sequence[Row], fit: Fit) -> Any:
    """Both read every row alike; returns the teacher's."""
    from transformers import AutoTokenizer

    with answered(f"{fit.teacher_dir}: the tokenizer does not load", "Restore its files."):
        teacher: Any = AutoTokenizer.from_pretrained(fit.teacher_dir, trust_remote_code=False)
    for row in rows:
        ids = row["token_ids"].tolist()
        theirs = teacher.decode(ids, clean_up_tokenization_spaces=False)
        ours = fit.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if theirs != ours:
            raise UsageError(
                f"student: its tokenizer reads {_name(row)} as {_cut(ours)}, the teacher's as "
                f"{_cut(theirs)}. Choose a student of the teacher's family, or `student.config` "
                "for one with its tokenizer."
            )
    return teacher


def _check_text(store: Store, rows: Sequence[Row], tokenizer: Any) -> None:
    """What follows the prompt is the text that was written down.

    What is scored are the spans of its generation. The teacher's tokenizer reads the text, as it
    was written: which tokens are special may differ between the two.
    """
    if rows and "text" in rows[0]:
        # Black-box: the rows are generations themselves.
        written = {row["key"]: row for row in rows}
    else:
        written = _generations(store, rows)
    for row in rows:
        text = written.get(row.get("generation_key", row["key"]))
        if text is None:
            continue
        if "span_start" in row:
            _check_span(row, text)
        prompt = text["prompt_tokens"]
        found = tokenizer.decode(row["token_ids"][prompt:].tolist(), skip_special_tokens=True)
        if not _plain(found).startswith(_plain(text["text"])):
            raise IntegrityError(
                f"{_name(row)}: its tokens from {prompt} on say {_cut(found)}, "
                f"expected the completion that was written down, {_cut(text['text'])}. {_HELP}"
            )


def _check_span(row: Row, text: Row) -> None:
    """A row of targets scores its generation's completion, in the same tokens."""
    found, expected = spans_of(row), spans_of(text)
    same = np.array_equal(row["token_ids"], text["token_ids"])
    if not same or not np.array_equal(found, expected):
        raise IntegrityError(
            f"{_name(row)}: scores the spans {found.tolist()} (start, tokens), expected "
            f"{expected.tolist()}, those of its "
            f"generation{'' if same else ', whose tokens are others'}. {_HELP}"
        )


def _generations(store: Store, rows: Sequence[Row]) -> dict[bytes, Row]:
    """Generations by key: those that the rows were made for, as far as the store has them."""
    import pyarrow as pa

    keys = pa.array([row["generation_key"] for row in rows], pa.binary(16))
    index = Index(store)
    try:
        index.register("wanted", pa.table({"key": keys}))
        found = index.rows(
            "SELECT place FROM generations WHERE key IN (SELECT key::UUID FROM wanted) ORDER BY "
            "place"
        )
        commits = index.commits["generations"]
    finally:
        index.close()
    # A place is the commit's number in the high 32 bits, and the row in its shard in the low ones.
    places: dict[str, list[int]] = {}
    for (place,) in found:
        places.setdefault(commits[place >> 32].shard.sha256, []).append(place & 0xFFFFFFFF)
    columns = ["key", "token_ids", "text", *SPAN_COLUMNS]
    return {row["key"]: row for row in store.rows("generations", places, columns)}


def _check_targets(rows: Sequence[tuple[Row, dict[str, Any]]]) -> None:
    """Every row's numbers agree with one another."""
    doubtful = [
        (row, column, message) for row, about in rows for column, message in doubts(row, about)
    ]
    if not doubtful:
        return
    row, column, message = doubtful[0]
    count = len({row["key"] for row, _, _ in doubtful})
    # A shift is the likely cause, and says more than a number that is off.
    head = head_of(rows[0][1])
    beside = None if head.whole_text else shifted([row for row, _ in rows], head)
    cause = f"; these are {beside}" if beside else ""
    raise IntegrityError(
        f"{_name(row)}: {column}: {message}. {count} of the {counted(len(rows), 'row')} that "
        f"{'was' if len(rows) == 1 else 'were'} looked at {'is' if count == 1 else 'are'} wrong, "
        f"expected targets of the tokens that they stand beside{cause}. {_HELP}"
    )


def _check_place(rows: Sequence[Row], head: Head, *, own_text: bool) -> list[str]:
    """What to say of targets that may be in place."""
    if found := shifted(rows, head):
        raise IntegrityError(
            f"{_name(rows[0])} and the others that were looked at: the targets are {found}. "
            f"Expected each position's own. {_HELP}"
        )
    if own_text and (excess := surprise(rows)) is not None:
        raise IntegrityError(
            f"{_name(rows[0])} and the others that were looked at: the teacher finds the text "
            f"that it drew {excess:.2f} nats a token less likely than the targets' entropy says, "
            f"expected 0 or less. The targets are other tokens'. {_HELP}"
        )
    if head.shifted and (found := unknowing(rows)):
        told = "These are other tokens' targets, or the teacher knows nothing of such text"
        return [
            f"audit: {found}. {told}: `stillroom verify STORE --deep --teacher MODEL` tells which"
        ]
    return []


def _plain(text: str) -> str:
    """A text without what decoding tokens apart may change: blanks, and characters cut in two."""
    return "".join(text.split()).replace("\ufffd", "")


def _name(row: Row) -> str:
    return f"row {row['key'].hex()} of {row['shard']}"


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
