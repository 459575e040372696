"""Stage `data`: reads the source once, into prompts rows of the store, which later stages read.

Where nothing is generated, the text that came with the data is tokenized here too (`given_text.py`)
and becomes generations rows, so that later stages know one kind of row only.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ...storage.credentials import as_written
from ...storage.errors import RowError, StillroomError, UsageError
from ...storage.keys import content_id, content_key
from ...storage.store.hashes import FileHashes
from ...storage.store.store import Store
from ...storage.store.writer import CommitLimits
from ...storage.tables.schema import TableName
from ...storage.words import all_were, counted
from ..ledger.routes import reads_source
from ..models.fit.classes import names_in
from ..models.identity import Identity
from ..recipe.checks.task import refuse_without_labels
from ..recipe.sections import Data, Recipe
from ..workers.job import Job, StageResult
from ..workers.shard_about import about, commit_limits
from .formats import prompt_row, turn_keys, unread_columns
from .given_text import GivenText, given_text, tokens_of
from .images import ImageRows
from .inputs import Intake
from .prompt_lengths import PromptLengths
from .remarks import Remarks
from .sources.source import (
    Source,
    all_records,
    held_out_source,
    left_out,
    refuse_other_order,
    training_source,
)
from .tokenizing import Tokenizing

COMMIT_ROWS = 8192  # reading is cheap to do again, and few large shards are quick to plan from
_LENGTHS = ("window_tokens", "max_tokens", "too_long")
_TABLES: tuple[TableName, ...] = ("prompts", "rejects")


def inputs_id(
    recipe: Recipe,
    teacher: Identity,
    hashes: FileHashes,
    *,
    author_id: str = "",
    day: str | None = None,
) -> str:
    """Name of the inputs record: what the source holds now, and how it is read.

    Args:
        recipe: The recipe.
        teacher: Its teacher.
        hashes: Where file hashes are remembered.
        author_id: Who wrote the text, or is to write it.
        day: What a template that reads the clock is told.
    """
    text = _text(recipe, author_id, context_tokens=teacher.context_tokens, day=day)
    return _inputs_id(recipe, hashes, text=text, classes=teacher.class_names)


def _inputs_id(
    recipe: Recipe,
    hashes: FileHashes,
    *,
    text: dict[str, Any] | None,
    classes: Sequence[str],
) -> str:
    held_out = held_out_source(recipe)
    unread = {"source", "chat_template_kwargs", "turns", "masks", *_LENGTHS}
    how = recipe.data.model_dump(exclude=unread if held_out is None else {*unread, "holdout"})
    if recipe.data.records.labelled:
        how["classes"] = list(classes)  # by their names a label is known
    # A field that is absent is in no hash: sources of before have the names that they had.
    more: dict[str, Any] = {}
    if held_out is not None:
        rows, how_many = held_out.fingerprint(hashes), held_out.limit
        more["held_out"] = {"rows": rows, "split": held_out.split, "limit": how_many}
    source = training_source(recipe).fingerprint(hashes)
    return content_id("inputs", source=source, how=how, text=text, **more)


def _text(
    recipe: Recipe, author_id: str, *, context_tokens: int, day: str | None
) -> dict[str, Any] | None:
    """What decides which rows are too long, and the tokens of given text, or None."""
    if given_text(recipe):
        # The context decides which given completions are too long, whatever the window.
        return {"author": author_id, "context": context_tokens}
    if recipe.data.max_tokens is None:
        return None  # what its author cannot read, `generate` rejects
    rendered = {"chat_template_kwargs": recipe.data.chat_template_kwargs, "day": day}
    return {"author": author_id, "max_tokens": recipe.data.max_tokens, **rendered}


def run(job: Job) -> StageResult:
    """Read, normalise, deduplicate, split; commit prompts (and given text), then the inputs record.

    Raises:
        UsageError: the source is missing or empty, lacks a column, or leaves nothing to train on.
        StillroomError: the source is no longer what the job's `data_id` names.
    """
    recipe, data, clock = job.recipe, job.recipe.data, job.clock
    store = Store.open(recipe.storage.dir)
    how = data.model_dump(exclude={"limit", "holdout", "masks"})
    shard_about = about("data", recipe, how | {"source": as_written(data.source)})
    limits = replace(commit_limits(recipe), rows=max(COMMIT_ROWS, recipe.storage.commit_rows))
    folder = store.teacher_dir(job.teacher_id)
    teacher = _Knows.of(recipe, folder, names_in(folder), whole=True)
    rows = Intake(sources=reads_source(recipe))
    job.progress.start(total=data.limit or 0, unit="records")
    with ExitStack() as stack:
        prompts, rejects = (
            stack.enter_context(store.writer(table, about=shard_about, limits=limits))
            for table in _TABLES
        )
        with clock.span("start"):
            text = _tokens(job, store, stack, limits)
        for found in clock.each("disk", all_records(recipe)):
            job.stop.check()
            try:
                row = _take(recipe, rows, found=found, teacher=teacher, text=text)
            except RowError as error:
                source, record, _ = found
                with clock.span("disk"):
                    rejects.add(_reject(source, record, error))
                rows.remarks.reject(source, error)
                job.progress.wrote(rejects=rows.remarks.rejected.total(), size=prompts.bytes)
                continue
            if row is not None:
                with clock.span("disk"):
                    prompts.add(row)
                job.progress.advance()
        with clock.span("disk"):
            stack.close()
        size = prompts.bytes + (text.bytes if text else 0)
        job.progress.wrote(rejects=rows.remarks.rejected.total(), size=size)
    table = _split(recipe, rows)
    notes = [*_notes(recipe, rows), *(text.notes() if text else ())]
    for note in notes:
        job.progress.say(note)
    with clock.span("disk"):
        _refuse_changed(job, teacher.classes)
        # The record comes last: that it is there says that all of it was read.
        store.put_inputs(job.data_id, table, _record_about(job, rows, notes=notes, text=text))
    return StageResult(
        rows=len(table), rejected=rows.remarks.rejected.total(), tokens=text.tokens if text else 0
    )


class _Knows(NamedTuple):
    """What of a teacher decides how a record is read."""

    classes: Sequence[str]
    """By whose names labels are known (labelled)."""
    images: ImageRows | None
    """What it makes of images; None: it reads text."""

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, classes: Sequence[str], *, whole: bool) -> "_Knows":
        """Of a teacher of these classes, whose small files are in this folder; `whole`: pixels too.

        Raises:
            UsageError: the source has the teacher's classes in another order.
        """
        records = recipe.data.records
        if not records.labelled:
            return _NOTHING
        refuse_other_order(recipe, classes)
        return cls(classes, ImageRows(folder, whole=whole) if records.image else None)


_NOTHING = _Knows((), None)


def _take(
    recipe: Recipe,
    rows: Intake,
    *,
    found: tuple[str, Any, bool],
    teacher: _Knows,
    text: GivenText | PromptLengths | None = None,
) -> dict[str, Any] | None:
    """A record as a row of `prompts`, taken into `rows`; None where a held-out row has its prompt.

    Args:
        recipe: How it is read.
        rows: What was taken before.
        found: Where it stands, the record, and whether the recipe names it as held out.
        teacher: By whose classes and processor it is read.
        text: Who counts its tokens, or writes them; None: nobody.

    Raises:
        RowError: this record cannot be used.
    """
    (source, record, held_out), data, given = found, recipe.data, given_text(recipe)
    rows.remarks.see(record, data.columns.values())
    row = prompt_row(record, source, data, given=given, classes=teacher.classes)
    row = row if teacher.images is None else teacher.images.named(row)
    if not held_out and rows.judges(row["prompt_key"]):
        return None
    # A record that is there twice is one prompt, whose text is written once.
    windows = text.add(row) if text and row["key"] not in rows else 1
    rows.add(
        row["key"],
        row["prompt_key"],
        windows=windows,
        # What a generated answer is judged by stands in no record.
        turns=turn_keys(row, data) if given else (),
        held_out=held_out,
        labelled=not data.records.labelled or row["label"] is not None or row["labels"] is not None,
        source=source,
    )
    rows.remarks.count_unread(unread_columns(record, data))
    return row


def _record_about(
    job: Job,
    rows: Intake,
    *,
    notes: list[str],
    text: GivenText | PromptLengths | None,
) -> dict[str, Any]:
    """What the inputs record says beside its table."""
    data, rejected = job.recipe.data, rows.remarks.rejected
    record_about: dict[str, Any] = {
        "source": as_written(data.source),
        "rejected": rejected.total(),
        "format": data.format,
    }
    if job.recipe.evaluate.source is not None:
        record_about["held_out_source"] = as_written(job.recipe.evaluate.source)
    if job.earlier_author_id:
        record_about["earlier_author"] = job.earlier_author_id
    if notes:
        record_about["notes"] = notes
    if rejected:
        record_about["why_rejected"] = rows.remarks.why_rejected()
    if text is not None and not data.records.document:
        record_about["lengths"] = text.lengths.about()
    return record_about


def _tokens(
    job: Job, store: Store, stack: ExitStack, limits: CommitLimits
) -> GivenText | PromptLengths | None:
    """Who counts the tokens of each row; None where that is left to `generate`."""
    if given_text(job.recipe):
        return GivenText(job, store, stack, limits)
    return None if job.recipe.data.max_tokens is None else PromptLengths(job, store)


class Survey(NamedTuple):
    """What the sources hold, as far as it shows before anything is tokenized."""

    inputs: pa.Table
    """The inputs table, windows unknown."""
    rejected: int
    notes: list[str]
    """What is to be said of the records, a sentence each."""
    why_rejected: str


def survey(recipe: Recipe, teacher: Identity | None = None) -> Survey:
    """What `run` would make of the source, without writing. `teacher` knows labels and images."""
    rows, knows = Intake(sources=reads_source(recipe)), _NOTHING
    if teacher is not None:  # an adapter's classes stand beside its base's folder
        knows = _Knows.of(recipe, teacher.folder, teacher.class_names, whole=False)
    for found in all_records(recipe):
        try:
            _take(recipe, rows, found=found, teacher=knows)
        except RowError as error:
            rows.remarks.reject(found[0], error)
    table = _split(recipe, rows)
    return Survey(
        table, rows.remarks.rejected.total(), _notes(recipe, rows), rows.remarks.why_rejected()
    )


def _notes(recipe: Recipe, rows: Intake) -> list[str]:
    """What is to be said of all records, of those that are not read, and of those that judge."""
    said = [*left_out(recipe), *rows.remarks.notes()]
    if (held_out := held_out_source(recipe)) is not None:
        split = f", split {held_out.split}" if held_out.asked else ""
        said.append(f"held out: {counted(rows.held_out, 'row')} of {held_out.name}{split}")
    return said


def stale_rows(
    recipe: Recipe, teacher: Identity, store: Store, *, author_id: str, day: str | None = None
) -> tuple[int, int]:
    """How many records an author of an earlier rule wrote in other tokens, and how many in all."""
    written = tokens_of(store, author_id)
    context = teacher.context_tokens
    tokenizing = Tokenizing(teacher.folder, recipe.data, context_tokens=context, day=day)
    same = set()
    for source, record, _ in all_records(recipe):
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


def _split(recipe: Recipe, rows: Intake) -> pa.Table:
    """The inputs table.

    Raises:
        UsageError: nothing is left to train on, or nothing to judge by that was to be there.
    """
    named = held_out_source(recipe)
    holdout = 0 if named else recipe.data.holdout
    _refuse_empty(recipe.data.source, named, rows)
    _refuse_absent(recipe.data, rows.remarks)
    if holdout >= (prompts := rows.prompts()):
        raise UsageError(
            f"data.holdout: {holdout} of {counted(prompts, 'prompt')} leaves nothing to train on. "
            f"Use fewer than {prompts}; a tenth is usual."
        )
    table = rows.table(holdout)
    if not pc.any(pc.equal(table["split"].cast(pa.string()), "train")).as_py():
        held_out = f"{named.field}: {named.name}" if named else f"data.holdout: {holdout}"
        raise UsageError(
            f"{held_out} leaves nothing to train on, since every other conversation has the answer "
            "of a held-out record among its turns. Use fewer, or give each conversation once, "
            "whole."
        )
    refuse_without_labels(recipe, rows.labels())
    return table


def _refuse_empty(source: str, held_out: Source | None, rows: Intake) -> None:
    """Raise UsageError where nothing was read to work on, to judge by or to train on."""
    why = rows.remarks.why_rejected() or "it holds no records"
    if not rows:
        rejected = rows.remarks.rejected.total()
        every = f"{all_were(rejected, 'record')} rejected: " if rejected else ""
        raise UsageError(
            f"data.source: nothing to work on in {source}: {every}{why}. Check the file and "
            "data.format."
        )
    if held_out is not None and not rows.held_out:
        raise UsageError(
            f"{held_out.field}: no row to judge by in {held_out.name}, split {held_out.split}: "
            f"{why}. Check the file; its columns are those of the data."
        )
    if held_out is not None and rows.held_out == len(rows):
        said = "; ".join(rows.remarks.notes()) or why
        raise UsageError(
            f"data.source: nothing to train on in {source}: {said}. Name other held-out rows, or "
            "more data."
        )


def _refuse_absent(data: Data, remarks: Remarks) -> None:
    """Raise UsageError for a named column that no record has: its content would be missed."""
    if not (absent := remarks.absent(data.columns.values())):
        return
    ours = next(name for name, column in data.columns.items() if column == absent[0])
    raise UsageError(
        f"data.columns: {ours!r} is read from the column {absent[0]!r}, which no record has (the "
        f"first has {', '.join(map(repr, remarks.columns))}). Name the column as the source spells "
        "it, or leave it out."
    )


def _refuse_changed(job: Job, classes: Sequence[str]) -> None:
    """Refuse data that is not what the plan named: it would keep the old name for good."""
    now = _inputs_id(
        job.recipe,
        FileHashes(job.recipe.storage.dir, remember=False),
        text=_text(job.recipe, job.author_id, context_tokens=job.context_tokens, day=job.day),
        classes=classes,
    )
    if now != job.data_id:
        raise StillroomError(
            f"data.source: {job.recipe.data.source} changed while it was read. Run again."
        )
