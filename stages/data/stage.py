"""Stage `data`: reads the source once, into prompts rows of the store; everything after it reads the store alone.

Given text (formats text, completion, and answers that came with the data when nothing is generated) is tokenized here
too and becomes generations rows whose author is the data, so that later stages know one kind of row only.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa

from ...storage.errors import StillroomError, UsageError
from ...storage.keys import content_id, content_key
from ...storage.store.store import CommitLimits, Store
from ..ledger.requests import labelled_key, tokens_key
from ..models.classes import label_index, names_in
from ..models.identity import FileHashes, Identity
from ..models.rendering import Renderer, RowError
from ..recipe.sections import COLUMNS, Data, Recipe
from ..workers.job import Job, StageResult
from ..workers.shard_about import about, commit_limits
from .inputs import Intake
from .readers import fingerprint, records

COMMIT_ROWS = 8192  # reading is cheap to do again, and few large shards are quick to plan from


def given_text(recipe: Recipe) -> bool:
    """Whether the data brings the text that is scored and trained on."""
    return recipe.generate is None


def given_author_id(recipe: Recipe, teacher: Identity) -> str:
    """Who wrote given text, as far as its tokens are concerned: tokenizer, template and how it is cut."""
    return content_id(
        "given",
        tokenizer=teacher.tokenizer_id,
        template=teacher.template_id,
        chat_template_kwargs=recipe.data.chat_template_kwargs,
        window_tokens=window_tokens(recipe.data, teacher.context_tokens),
    )


def window_tokens(data: Data, context_tokens: int) -> int:
    """Tokens of one window of long text, for a teacher that reads `context_tokens` at once."""
    return min(data.window_tokens or context_tokens, context_tokens)


def inputs_id(recipe: Recipe, teacher: Identity, hashes: FileHashes) -> str:
    """Name of the inputs record: what the source holds now, and how it is read."""
    author, classes = given_author_id(recipe, teacher), teacher.class_names
    return _inputs_id(recipe, hashes, author_id=author, context_tokens=teacher.context_tokens, classes=classes)


def _inputs_id(
    recipe: Recipe, hashes: FileHashes, *, author_id: str, context_tokens: int, classes: Sequence[str]
) -> str:
    how = recipe.data.model_dump(exclude={"source", "chat_template_kwargs", "window_tokens"})
    if recipe.data.format == "labelled":
        how["classes"] = list(classes)  # by their names a label is known
    # The context decides which given completions are too long, whatever the window.
    text = {"author": author_id, "context": context_tokens} if given_text(recipe) else None
    return content_id("inputs", source=fingerprint(recipe.data, hashes), how=how, text=text)


def run(job: Job) -> StageResult:
    """Read, normalise, deduplicate, split; commit prompts (and given text), then the inputs record.

    Raises:
        UsageError: the source is missing or empty, lacks a column, or the holdout leaves nothing to train on.
        StillroomError: the source is no longer what the job's `data_id` names.
    """
    recipe, data, clock = job.recipe, job.recipe.data, job.clock
    store = Store.open(recipe.storage.dir)
    settings = data.model_dump(exclude={"limit", "holdout"})
    limits = replace(commit_limits(recipe), rows=max(COMMIT_ROWS, recipe.storage.commit_rows))
    rows = Intake()
    rejected, first = 0, ""
    classes = names_in(store.teacher_dir(job.teacher_id)) if data.format == "labelled" else ()
    job.progress.start(total=data.limit or 0, unit="records")
    with ExitStack() as stack:
        prompts = stack.enter_context(store.writer("prompts", about=about("data", recipe, settings), limits=limits))
        rejects = stack.enter_context(store.writer("rejects", about=about("data", recipe, settings), limits=limits))
        with clock.span("start"):
            text = _GivenText(job, store, stack, limits) if given_text(recipe) else None
        for source, record in islice(clock.each("disk", records(data)), data.limit):
            job.stop.check()
            try:
                row = prompt_row(record, source, data, given=text is not None, classes=classes)
                windows = text.add(row) if text and row["key"] not in rows else 1
            except RowError as error:
                with clock.span("disk"):
                    rejects.add(_reject(source, record, error))
                rejected, first = rejected + 1, first or f"{source}: {error}"
                job.progress.wrote(rejects=rejected, size=prompts.bytes)
                continue
            with clock.span("disk"):
                prompts.add(row)
            rows.add(row["key"], row["prompt_key"], windows=windows)
            job.progress.advance()
        with clock.span("disk"):
            stack.close()
        job.progress.wrote(rejects=rejected, size=prompts.bytes + (text.bytes if text else 0))
    _refuse_empty(data, rows, rejected, first)
    table = rows.table(data.holdout)
    with clock.span("disk"):
        _refuse_changed(job, classes)
        store.put_inputs(job.data_id, table, {"source": data.source, "rejected": rejected, "format": data.format})
    return StageResult(rows=len(rows), rejected=rejected, tokens=text.tokens if text else 0)


def survey(recipe: Recipe, classes: Sequence[str] = ()) -> tuple[pa.Table, int]:
    """What `run` would make of the source, without writing: the inputs table (windows unknown) and the rejects.

    `classes`: the teacher's, by whose names labels are known (labelled).
    """
    rows = Intake()
    rejected, first = 0, ""
    for source, record in islice(records(recipe.data), recipe.data.limit):
        try:
            row = prompt_row(record, source, recipe.data, given=given_text(recipe), classes=classes)
        except RowError as error:
            rejected, first = rejected + 1, first or f"{source}: {error}"
            continue
        rows.add(row["key"], row["prompt_key"])
    _refuse_empty(recipe.data, rows, rejected, first)
    return rows.table(recipe.data.holdout), rejected


def prompt_row(
    record: dict[str, Any] | str, source: str, data: Data, *, given: bool, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """One record as a row of `prompts`.

    Args:
        record: As the source has it.
        source: Where it stands.
        data: The recipe's section.
        given: Nothing is generated: the record brings what is scored.
        classes: Names of the teacher's classes (labelled).

    Raises:
        RowError: this record cannot be used.
        UsageError: the columns are not those of the format.
    """
    if isinstance(record, str):
        raise RowError("unreadable", record)
    record = {ours: record[theirs] for ours, theirs in _columns(record, data).items()}
    row: dict[str, Any] = dict.fromkeys(("text", "text_pair", "messages", "completion", "reference", "label"), None) | {
        "format": data.format,
        "source": source,
    }
    row |= _FORMATS[data.format](record)
    if data.format == "labelled":
        row["label"] = label_index(record["label"], classes)
    answer, reference = row.pop("answer", None), record.get("reference")
    if given and data.format not in ("text", "labelled"):
        row["completion"] = _text(answer, "completion", "no answer to score, and no `generate` section to make one")
    elif reference in (None, ""):
        reference = answer
    row["reference"] = None if reference in (None, "") else _text(reference, "reference")
    prompt = {"text": row["text"], "messages": row["messages"], "pair": row["text_pair"]}
    row["prompt_key"] = content_key("prompt", **prompt)
    rest = {k: row[k] for k in ("format", "completion", "reference", "label")}
    row["key"] = content_key("prompts", prompt=row["prompt_key"], **rest)
    return row


def _columns(record: dict[str, Any], data: Data) -> dict[str, str]:
    """Our name -> the record's column."""
    required, optional = COLUMNS[data.format]
    names = {n: data.columns.get(n, n) for n in (*required, *optional)}
    missing = [names[n] for n in required if names[n] not in record]
    if missing:
        raise RowError(
            "missing_column",
            f"no column {missing[0]!r} (found {', '.join(map(repr, record)) or 'nothing'}). "
            f"Name it in data.columns, for example {{{required[0]}: ...}}",
        )
    return {ours: theirs for ours, theirs in names.items() if theirs in record}


def _prompt(record: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text(record["prompt"], "prompt")}


def _completion(record: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text(record["prompt"], "prompt"), "answer": record["completion"]}


def _messages(record: dict[str, Any]) -> dict[str, Any]:
    messages = record["messages"]
    try:
        messages = [{"role": _text(m["role"], "role"), "content": _text(m["content"], "content")} for m in messages]
    except (TypeError, KeyError) as error:
        raise RowError("unreadable", f"messages must be a list of {{role, content}} ({error!r})") from error
    answer = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not messages:
        raise RowError("empty", "the conversation has no message to answer")
    return {"messages": messages, "answer": answer}


def _instruction(record: dict[str, Any]) -> dict[str, Any]:
    content = _text(record["instruction"], "instruction")
    if record.get("input") not in (None, ""):
        content += "\n" + _text(record["input"], "input")
    return {"messages": [{"role": "user", "content": content}], "answer": record.get("output")}


def _document(record: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text(record["text"], "text")}


def _labelled(record: dict[str, Any]) -> dict[str, Any]:
    pair = record.get("text_pair")
    second = None if pair in (None, "") else _text(pair, "text_pair")
    return {"text": _text(record["text"], "text"), "text_pair": second}


_FORMATS = {
    "text": _document,
    "prompt": _prompt,
    "completion": _completion,
    "messages": _messages,
    "instruction": _instruction,
    "labelled": _labelled,
}


def _text(value: Any, name: str, if_empty: str | None = None) -> str:
    if value is None or value == "":
        raise RowError("empty", if_empty or f"{name} is empty")
    if not isinstance(value, str):
        raise RowError("unreadable", f"{name} is a {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("unreadable", f"{name} is not valid UTF-8 ({error.reason})") from error
    return value


def _reject(source: str, record: Any, error: RowError) -> dict[str, Any]:
    key = content_key("reject", source=source, record=str(record))
    row = {"key": key, "stage": "data", "prompt_key": None, "reason": error.reason, "attempts": 1}
    return row | {"message": f"{source}: {error}"}


def _refuse_empty(data: Data, rows: Intake, rejected: int, first: str) -> None:
    if not rows:
        found = f"all {rejected} records were rejected, the first at {first}" if rejected else "it holds no records"
        raise UsageError(f"data.source: nothing to work on in {data.source}: {found}. Check the file and data.format.")
    prompts = rows.prompts()
    if data.holdout >= prompts:
        raise UsageError(
            f"data.holdout: {data.holdout} of {prompts} prompts leaves nothing to train on. "
            f"Use fewer than {prompts}; a tenth is usual."
        )


def _refuse_changed(job: Job, classes: Sequence[str]) -> None:
    """What was read must be what the plan named: else changed prompts would stand under the old name for good."""
    hashes = FileHashes(job.recipe.storage.dir, remember=False)
    author, context = job.author_id, job.context_tokens
    now = _inputs_id(job.recipe, hashes, author_id=author, context_tokens=context, classes=classes)
    if now != job.data_id:
        raise StillroomError(f"data.source: {job.recipe.data.source} changed while it was read. Run again.")


class _GivenText:
    """Tokenizes the text that came with the data into generations rows."""

    def __init__(self, job: Job, store: Store, stack: ExitStack, limits: CommitLimits) -> None:
        folder = store.teacher_dir(job.teacher_id)
        data, self._clock = job.recipe.data, job.clock
        self._renderer = Renderer(folder, data.chat_template_kwargs)
        self._author = job.author_id
        self._context = job.context_tokens
        self._window = window_tokens(data, job.context_tokens)
        settings = {"window_tokens": self._window, "chat_template_kwargs": data.chat_template_kwargs}
        shard_about = about("data", job.recipe, settings, author_id=job.author_id)
        writer = store.writer("generations", about=shard_about, limits=limits)
        self._writer = stack.enter_context(writer)
        self.tokens = 0

    @property
    def bytes(self) -> int:
        """Of what is committed."""
        return self._writer.bytes

    def add(self, row: dict[str, Any]) -> int:
        """Write a prompt's rows; returns how many.

        Raises:
            RowError: nothing to predict, or longer than the context.
        """
        with self._clock.span("tokenizer"):
            pieces = self._pieces(row)
        # RoBERTa counts its positions from 2: its tokenizer knows what it can read, its config does not say.
        limit = self._context if row["format"] != "labelled" else min(self._context, self._renderer.longest)
        for index, (start, ids) in enumerate(pieces):
            if len(ids) > limit:
                raise RowError("too_long", f"{len(ids)} tokens; the teacher reads {limit}")
            self._write(row, index, start, ids)
        if not pieces:
            raise RowError("empty", "fewer than two tokens: nothing to predict")
        return len(pieces)

    def _pieces(self, row: dict[str, Any]) -> list[tuple[int, list[int]]]:
        """Where each of a prompt's rows begins to be scored, and its token ids."""
        if row["format"] == "labelled":
            ids = self._renderer.labelled_ids(row["text"], row["text_pair"])
            return [(len(ids), ids)]
        if row["format"] == "text":
            return [(0, ids) for ids in self._renderer.windows(row["text"], self._window)]
        prompt = self._renderer.prompt_ids(row)
        return [(len(prompt), prompt + self._renderer.completion_ids(row["completion"]))]

    def _write(self, row: dict[str, Any], index: int, start: int, ids: list[int]) -> None:
        reuse_key = content_key("given", author=self._author, source=row["key"], window=index)
        self.tokens += len(ids) - start
        with self._clock.span("tokenizer"):
            text = self._renderer.tokenizer.decode(ids[start:], skip_special_tokens=True)
        tokens = labelled_key(ids, row["label"]) if row["format"] == "labelled" else tokens_key(ids, start)
        generation = {
            "key": content_key("generations", reuse_key=reuse_key, max_tokens=None),
            "reuse_key": reuse_key,
            "prompt_key": row["prompt_key"],
            "source_key": row["key"],
            "author_id": self._author,
            "sampling_id": self._author,
            "sample_index": index,
            "tokens_key": tokens,
            "token_ids": ids,
            "prompt_tokens": start,
            "completion_tokens": len(ids) - start,
            "text": text,
            "finish_reason": "given",
            "max_tokens": None,
            "row_seed": None,
        }
        with self._clock.span("disk"):
            self._writer.add(generation)
