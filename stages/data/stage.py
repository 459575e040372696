"""Stage `data`: reads the source once, into prompts rows of the store; everything after it reads the store alone.

Where nothing is generated, the text that came with the data is tokenized here too (`given_text.py`)
and becomes generations rows, so that later stages know one kind of row only.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...storage.errors import RowError, StillroomError, UsageError
from ...storage.keys import content_id, content_key
from ...storage.store.store import Store
from ...storage.tables.schema import TableName
from ..models.classes import names_in
from ..models.identity import FileHashes, Identity
from ..recipe.sections import Data, Recipe
from ..recipe.task_checks import refuse_without_labels
from ..workers.job import Job, StageResult
from ..workers.shard_about import about, commit_limits
from .formats import prompt_row, turn_keys, unread_columns
from .given_text import GivenText, given_text, tokens_of
from .inputs import Intake
from .readers import fingerprint, records
from .tokenizing import Tokenizing

COMMIT_ROWS = 8192  # reading is cheap to do again, and few large shards are quick to plan from
_TABLES: tuple[TableName, ...] = ("prompts", "rejects")


def inputs_id(recipe: Recipe, teacher: Identity, hashes: FileHashes, *, author_id: str = "") -> str:
    """Name of the inputs record: what the source holds now, and how it is read.

    `author_id`: of given text.
    """
    return _inputs_id(
        recipe,
        hashes,
        author_id=author_id,
        context_tokens=teacher.context_tokens,
        classes=teacher.class_names,
    )


def _inputs_id(
    recipe: Recipe,
    hashes: FileHashes,
    *,
    author_id: str,
    context_tokens: int,
    classes: Sequence[str],
) -> str:
    how = recipe.data.model_dump(
        exclude={"source", "chat_template_kwargs", "window_tokens", "turns"}
    )
    if recipe.data.records.labelled:
        how["classes"] = list(classes)  # by their names a label is known
    # The context decides which given completions are too long, whatever the window.
    text = {"author": author_id, "context": context_tokens} if given_text(recipe) else None
    return content_id("inputs", source=fingerprint(recipe.data, hashes), how=how, text=text)


def run(job: Job) -> StageResult:
    """Read, normalise, deduplicate, split; commit prompts (and given text), then the inputs record.

    Raises:
        UsageError: the source is missing or empty, lacks a column, or the holdout leaves nothing to
            train on.
        StillroomError: the source is no longer what the job's `data_id` names.
    """
    recipe, data, clock = job.recipe, job.recipe.data, job.clock
    store = Store.open(recipe.storage.dir)
    shard_about = about("data", recipe, data.model_dump(exclude={"limit", "holdout"}))
    limits = replace(commit_limits(recipe), rows=max(COMMIT_ROWS, recipe.storage.commit_rows))
    classes = names_in(store.teacher_dir(job.teacher_id)) if data.records.labelled else ()
    rows = Intake()
    rejected, first = 0, ""
    job.progress.start(total=data.limit or 0, unit="records")
    with ExitStack() as stack:
        prompts, rejects = (
            stack.enter_context(store.writer(table, about=shard_about, limits=limits))
            for table in _TABLES
        )
        with clock.span("start"):
            text = GivenText(job, store, stack, limits) if given_text(recipe) else None
        for source, record in islice(clock.each("disk", records(data)), data.limit):
            job.stop.check()
            try:
                row = prompt_row(record, source, data, given=text is not None, classes=classes)
                # A record that is there twice is one prompt, whose text is written once.
                windows = text.add(row) if text and row["key"] not in rows else 1
            except RowError as error:
                with clock.span("disk"):
                    rejects.add(_reject(source, record, error))
                rejected += 1
                first = first or f"{source}: {error}"
                job.progress.wrote(rejects=rejected, size=prompts.bytes)
                continue
            with clock.span("disk"):
                prompts.add(row)
            rows.add(
                row["key"],
                row["prompt_key"],
                windows=windows,
                turns=_turns(recipe, row),
                labelled=_labelled(data, row),
            )
            rows.count_unread(unread_columns(record, data))
            job.progress.advance()
        with clock.span("disk"):
            stack.close()
        size = prompts.bytes + (text.bytes if text else 0)
        job.progress.wrote(rejects=rejected, size=size)
    _refuse_empty(data, rows, rejected=rejected, first=first)
    table = _split(recipe, rows)
    notes = [*rows.notes(), *(text.notes() if text else ())]
    for note in notes:
        job.progress.say(note)
    with clock.span("disk"):
        _refuse_changed(job, classes)
        # The record comes last: that it is there says that all of it was read.
        record_about: dict[str, Any] = {
            "source": data.source,
            "rejected": rejected,
            "format": data.format,
        }
        if job.earlier_author_id:
            record_about["earlier_author"] = job.earlier_author_id
        if notes:
            record_about["notes"] = notes
        store.put_inputs(job.data_id, table, record_about)
    return StageResult(rows=len(table), rejected=rejected, tokens=text.tokens if text else 0)


def survey(recipe: Recipe, classes: Sequence[str] = ()) -> tuple[pa.Table, int, list[str]]:
    """What `run` would make of the source, without writing.

    The inputs table (windows unknown), the number of rejects, and what is to be said of the records.

    `classes`: the teacher's, by whose names labels are known (labelled).
    """
    rows = Intake()
    rejected, first = 0, ""
    for source, record in islice(records(recipe.data), recipe.data.limit):
        try:
            row = prompt_row(record, source, recipe.data, given=given_text(recipe), classes=classes)
        except RowError as error:
            rejected += 1
            first = first or f"{source}: {error}"
            continue
        turns, labelled = _turns(recipe, row), _labelled(recipe.data, row)
        rows.add(row["key"], row["prompt_key"], turns=turns, labelled=labelled)
        rows.count_unread(unread_columns(record, recipe.data))
    _refuse_empty(recipe.data, rows, rejected=rejected, first=first)
    return _split(recipe, rows), rejected, rows.notes()


def _turns(recipe: Recipe, row: dict[str, Any]) -> list[bytes]:
    """What a generated answer is judged by stands in no record."""
    return turn_keys(row, recipe.data) if given_text(recipe) else []


def stale_rows(
    recipe: Recipe, teacher: Identity, store: Store, *, author_id: str, day: str | None = None
) -> tuple[int, int]:
    """How many records an author of an earlier rule wrote in other tokens than today's, and how many it wrote."""
    written = tokens_of(store, author_id)
    context = teacher.context_tokens
    tokenizing = Tokenizing(teacher.folder, recipe.data, context_tokens=context, day=day)
    same = set()
    for source, record in islice(records(recipe.data), recipe.data.limit):
        try:
            row = prompt_row(record, source, recipe.data, given=True)
            (text,) = tokenizing.texts(row)
        except RowError:
            continue
        if written.get(row["key"]) == text.tokens_key:
            same.add(row["key"])
    return len(written) - len(same), len(written)


def _reject(source: str, record: Any, error: RowError) -> dict[str, Any]:
    key = content_key("reject", source=source, record=str(record))
    row = {"key": key, "stage": "data", "prompt_key": None, "reason": error.reason, "attempts": 1}
    return row | {"message": f"{source}: {error}"}


def _refuse_empty(data: Data, rows: Intake, *, rejected: int, first: str) -> None:
    """Raise UsageError where nothing is left, to work on or to train on."""
    if not rows:
        found = (
            f"all {rejected} records were rejected, the first at {first}"
            if rejected
            else "it holds no records"
        )
        raise UsageError(
            f"data.source: nothing to work on in {data.source}: {found}. Check the file and "
            "data.format."
        )
    prompts = rows.prompts()
    if data.holdout >= prompts:
        raise UsageError(
            f"data.holdout: {data.holdout} of {prompts} prompts leaves nothing to train on. "
            f"Use fewer than {prompts}; a tenth is usual."
        )


def _labelled(data: Data, row: dict[str, Any]) -> bool:
    return row["label"] is not None or not data.records.labelled


def _split(recipe: Recipe, rows: Intake) -> pa.Table:
    """The inputs table; UsageError where nothing is left to train on, or no label that is asked for."""
    data = recipe.data
    table = rows.table(data.holdout)
    if not pc.any(pc.equal(table["split"].cast(pa.string()), "train")).as_py():
        raise UsageError(
            f"data.holdout: {data.holdout} leaves nothing to train on, since every other "
            "conversation has the answer of a held-out record among its turns. Use fewer, or give "
            "each conversation once, whole."
        )
    refuse_without_labels(recipe, rows.labels())
    return table


def _refuse_changed(job: Job, classes: Sequence[str]) -> None:
    """What was read must be what the plan named: else changed prompts would stand under the old name for good."""
    now = _inputs_id(
        job.recipe,
        FileHashes(job.recipe.storage.dir, remember=False),
        author_id=job.author_id,
        context_tokens=job.context_tokens,
        classes=classes,
    )
    if now != job.data_id:
        raise StillroomError(
            f"data.source: {job.recipe.data.source} changed while it was read. Run again."
        )
