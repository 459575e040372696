"""`stillroom import`: a foreign table of teacher probabilities becomes rows of a store.

Every row is checked (`row.py`), the first ones also for targets that belong to other tokens than
those they stand beside (`stages/audit/misplaced_targets.py`), before anything is written.
What stands in the store afterwards is what a run with given text leaves: prompts, generations, soft
targets, inputs and a binding, so plan, train and report go on from there.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ....storage.credentials import as_written
from ....storage.errors import UsageError
from ....storage.files.opening import open_files
from ....storage.keys import content_id, content_key
from ....storage.store.bindings import Binding, write_binding
from ....storage.store.hashes import FileHashes
from ....storage.store.store import Store
from ....storage.store.writer import ShardWriter
from ....storage.tables.row_builders import given_row, target_row
from ....storage.tables.spans import span_after
from ....storage.words import all_were, counted
from ...audit.misplaced_targets import shifted
from ...ledger.requests import target_key, tokens_key
from ...models.fit.config import config_facts
from ...models.fit.files import read_json
from ...models.identity import Identity, find_model, identify, identify_unseen
from ...models.inputs.rendering import Renderer
from ...recipe.sections import Storage
from ...recipe.tasks import MODELS, TASKS
from ...workers.job import Progress
from ...workers.shard_about import versions
from ..inputs import Intake
from .columns import BadRow, Columns
from .records import table_records
from .rounding import refuse_renormalised
from .row import ForeignRow, convert

AUDITED = 64
"""Rows that are looked at together, before any is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportRequest:
    """What the command line asks for."""

    source: str
    store: str
    columns: Columns
    teacher: str | None = None
    """Folder or Hub id."""
    revision: str | None = None
    tokenizer: Path | None = None
    teacher_name: str | None = None
    vocab_size: int | None = None
    split: str = "train"
    """Of a dataset of the Hub or a saved one."""
    holdout: int | None = None
    """Prompts to be judged on; None: a tenth, 200 at most."""
    mantissa_bits: int = Storage.model_fields["mantissa_bits"].default
    skip_bad: bool = False


@dataclass(kw_only=True, slots=True)
class Imported:
    """What became of a table."""

    rows: int = 0
    """Soft-target rows written now."""
    known: int = 0
    """Rows that the store had already."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    tokens: int = 0
    """Scored tokens of the rows written."""
    k: int = 0
    """Entries that every position has at least."""
    prompts: bool = False
    """Whether the texts have prompts."""
    teacher: Identity
    holdout: int = 0
    notes: list[str] = field(default_factory=list)


def import_table(request: ImportRequest, progress: Progress) -> Imported:
    """Read the table into the store.

    Raises:
        UsageError: a column is missing, a row does not fit (without `skip_bad`), or the targets are
            other tokens'.
        IntegrityError: the store is damaged.
    """
    if not open_files(request.store).empty():
        Store.open(request.store, create=True)  # refuses what is no store before the work
    hashes = FileHashes(request.store, remember=False)
    return _Import(request, hashes, _teacher(request, hashes), progress).run()


def given_format(done: Imported) -> str:
    """The `data.format` that fits what was imported."""
    return "completion" if done.prompts else "text"


def _teacher(request: ImportRequest, hashes: FileHashes) -> Identity:
    if request.teacher is not None and request.tokenizer is None and request.teacher_name is None:
        folder = find_model(request.teacher, request.revision, field="--teacher", download=True)
        _refuse_other_heads(folder, request.teacher)
        return identify(folder, dtype="auto", hashes=hashes, field="--teacher")
    if request.teacher is None and request.tokenizer is not None and request.teacher_name:
        if not request.tokenizer.is_dir():
            raise UsageError(
                f"--tokenizer: no folder {request.tokenizer}. Name a folder with the teacher's "
                "tokenizer."
            )
        return identify_unseen(
            request.tokenizer, request.teacher_name, hashes=hashes, vocab_size=request.vocab_size
        )
    raise UsageError(
        "Whose probabilities are these? Give --teacher MODEL (a folder or Hub id), or, where its "
        "weights are not here, --tokenizer FOLDER and --teacher-name NAME."
    )


def _refuse_other_heads(folder: Path, name: str) -> None:
    """Refuse a model whose probabilities are of classes or of hidden tokens.

    A table's are of next tokens.

    Raises:
        UsageError: it is one.
    """
    where, head = f"--teacher: {name}", TASKS["causal_lm"].head
    facts = config_facts(read_json(folder / "config.json", "--teacher"), where=where)
    if head not in facts.heads:
        raise UsageError(
            f"{where} is {facts.use} ({facts.model_type}), and the rows of a table are of the next "
            f"token. Use {MODELS[head].words}. What other models say of texts, words or images is "
            "scored by `stillroom run`."
        )


class _Import:
    """One table on its way into a store."""

    _store: Store
    """Made when the first rows were found to be right: an import that is refused leaves nothing."""

    def __init__(
        self, request: ImportRequest, hashes: FileHashes, teacher: Identity, progress: Progress
    ) -> None:
        self._request, self._hashes = request, hashes
        self._teacher, self._progress = teacher, progress
        self._tokenizer = Renderer(teacher.folder, {}).tokenizer
        self._author = content_id("given", tokenizer=teacher.tokenizer_id, imported=True)
        self._vocab_size = request.vocab_size or teacher.vocab_size
        self._intake = Intake()
        self._done = Imported(teacher=teacher)
        self._first_error: BadRow | None = None

    def run(self) -> Imported:
        """Read, check, write; the binding last."""
        self._progress.start(total=0, unit="rows")
        rows = self._rows()
        first = list(islice(rows, AUDITED))
        found = [row for _, row in first if isinstance(row, ForeignRow)]
        if not found and len(first) < AUDITED:
            self._refuse_empty(rejected=len(first))
        self._audit(found)
        self._store = Store.open(self._request.store, create=True)
        self._hashes.keep()
        k = min((row.targets.probabilities.shape[1] for row in found), default=0)
        self._store.put_teacher(self._teacher.id, self._teacher.files_to_keep())
        with ExitStack() as stack:
            writers = {table: stack.enter_context(self._writer(table, k)) for table in _TABLES}
            for where, row in chain(first, rows):
                if isinstance(row, BadRow):
                    self._reject(writers["rejects"], where, row)
                else:
                    self._write(writers, where, row)
                self._progress.advance()
        self._finish()
        return self._done

    def _writer(self, table: Any, k: int) -> ShardWriter:
        columns = self._request.columns
        settings = {"targets_at": columns.targets_at, "values": columns.kind}
        about = {
            "stage": "import",
            "head": "lm",
            "class_names": None,
            "author_id": self._author,
            "teacher_id": self._teacher.id,
            "tokenizer_id": self._teacher.tokenizer_id,
            "vocab_size": self._vocab_size,
            "mantissa_bits": self._request.mantissa_bits,
            "settings": settings | ({"kind": "topk", "k": k} if table == "soft_targets" else {}),
            "versions": versions(),
        }
        return self._store.writer(table, about=about)

    def _rows(self) -> Iterator[tuple[str, ForeignRow | BadRow]]:
        """Where each row stands, and what it is in this store's terms, or why it is rejected."""
        request, columns = self._request, self._request.columns
        for where, record in table_records(request.source, request.split, columns.named()):
            try:
                if isinstance(record, str):
                    raise BadRow(
                        "unreadable", "-", found=record, expected="a record", help="Mend the file."
                    )
                _refuse_missing(where, record, columns)
                yield where, convert(record, columns, vocab_size=self._vocab_size)
            except BadRow as error:
                if not request.skip_bad:
                    raise UsageError(
                        f"{where}: {error} --skip-bad leaves such rows out."
                    ) from error
                self._first_error = self._first_error or error
                yield where, error

    def _audit(self, rows: list[ForeignRow]) -> None:
        """Refuse targets that are other tokens', seen by what they find likely."""
        if not rows:
            return
        if found := shifted([self._targets(row, self._generation(row)) for row in rows]):
            other = "same" if self._request.columns.targets_at == "next" else "next"
            raise UsageError(
                f"{self._request.source}: in the first {counted(len(rows), 'row')}, the targets "
                f"are {found}. Expected each position's own. Is it --targets-at {other}?"
            )
        left = np.concatenate([row.nothing_left for row in rows])
        refuse_renormalised(self._request.source, left, rows=len(rows))
        tokens = sum(len(row.targets.token_logprob) for row in rows)
        self._done.notes.append(
            f"audit: {counted(len(rows), 'row')} of {counted(tokens, 'scored token')} looked at, "
            "no shift found"
        )

    def _write(self, writers: dict[str, ShardWriter], where: str, row: ForeignRow) -> None:
        ids, start = row.token_ids, row.prompt_tokens
        generation = self._generation(row)
        key, prompt = generation["source_key"], generation["prompt_key"]
        given = {"text": generation["text"]}
        if start:
            given = {"text": self._decoded(ids[:start]), "completion": generation["text"]}
        writers["prompts"].add(
            {
                "key": key,
                "prompt_key": prompt,
                "format": "completion" if start else "text",
                "source": where,
            }
            | given
        )
        writers["generations"].add(generation)
        targets = self._targets(row, generation)
        new = writers["soft_targets"].add(targets)
        self._intake.add(key, prompt)
        done = self._done
        done.rows, done.known = done.rows + new, done.known + (not new)
        done.tokens += targets["span_tokens"] * new
        done.k = min(done.k or targets["k"], targets["k"])
        done.prompts = done.prompts or start > 0

    def _generation(self, row: ForeignRow) -> dict[str, Any]:
        """The text as a row of `generations`."""
        ids, start = row.token_ids, row.prompt_tokens
        prompt = content_key("prompt", token_ids=(ids[:start] if start else ids).tobytes())
        to_the_end = np.array_equal(row.spans, span_after(start, len(ids)))
        return given_row(
            author_id=self._author,
            source_key=content_key("prompts", prompt=prompt, token_ids=ids.tobytes()),
            prompt_key=prompt,
            window=0,
            tokens_key=tokens_key(ids, start, row.spans),
            token_ids=ids,
            prompt_tokens=start,
            text=self._decoded(ids[start:]),
            spans=None if to_the_end else row.spans,
        )

    def _targets(self, row: ForeignRow, generation: dict[str, Any]) -> dict[str, Any]:
        """Its row of `soft_targets`."""
        bits = self._request.mantissa_bits
        reuse_key = target_key(self._teacher.id, generation["tokens_key"])
        settings = {"kind": "topk", "k": row.targets.probabilities.shape[1]}
        named = {"mantissa_bits": bits, "imported": True, **settings}
        return target_row(
            key=content_key("soft_targets_row", reuse_key=reuse_key, **named),
            reuse_key=reuse_key,
            tokens_key=generation["tokens_key"],
            generation_key=generation["key"],
            prompt_key=generation["prompt_key"],
            teacher_id=self._teacher.id,
            token_ids=row.token_ids,
            spans=row.spans,
            targets=row.targets,
            mantissa_bits=bits,
            settings=settings,
        )

    def _decoded(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def _reject(self, writer: ShardWriter, where: str, error: BadRow) -> None:
        key = content_key("reject", source=self._request.source, row=where, reason=error.reason)
        row = {
            "key": key,
            "stage": "import",
            "reason": error.reason,
            "message": f"{where}: {error}",
            "attempts": 1,
        }
        writer.add(row)
        self._done.rejected[error.reason] = self._done.rejected.get(error.reason, 0) + 1

    def _refuse_empty(self, *, rejected: int) -> None:
        of = "" if rejected == 1 else ", the first"
        why = (
            f"{all_were(rejected, 'row')} rejected{of} for: {self._first_error}"
            if rejected
            else "it holds no rows."
        )
        raise UsageError(
            f"{self._request.source}: nothing to import: {why} Check the columns that you named."
        )

    def _finish(self) -> None:
        """Say which prompts these are, and whose.

        A table that was imported before says the same again.
        """
        done, request = self._done, self._request
        prompts = self._intake.prompts()
        rejected = sum(done.rejected.values())
        if not prompts:
            self._refuse_empty(rejected=rejected)
        # A tenth is held out, of a large table 200.
        done.holdout = min(200, prompts // 10) if request.holdout is None else request.holdout
        if done.holdout >= prompts:
            raise UsageError(
                f"--holdout: {done.holdout} of {counted(prompts, 'prompt')} leaves nothing to "
                f"train on. Use fewer than {prompts}."
            )
        table = self._intake.table(done.holdout)
        names = {"teacher": self._teacher.id, "author": self._author}
        content = [key.hex() for key in table["key"].to_pylist()]
        data_id = content_id("inputs", imported=names, keys=content, holdout=done.holdout)
        about = {
            "source": as_written(request.source),
            "rejected": rejected,
            "format": given_format(done),
        }
        self._store.put_inputs(data_id, table, about)
        unlimited = 2**31 - 1  # what is there was read
        binding = Binding(
            teacher_id=self._teacher.id,
            author_id=self._author,
            data_id=data_id,
            vocab_size=self._vocab_size,
            context_tokens=unlimited,
            author_context_tokens=unlimited,
            imported=True,
        )
        write_binding(
            self._store.files, f"bindings/{content_id('binding', imported=names)}", binding
        )


_TABLES = ("prompts", "generations", "soft_targets", "rejects")


def _refuse_missing(where: str, record: dict[str, Any], columns: Columns) -> None:
    missing = [name for name in columns.named() if name not in record]
    if missing:
        raise UsageError(
            f"{where}: no column {missing[0]!r} (found "
            f"{', '.join(map(repr, record)) or 'none that was named'}). Name the columns: "
            "--columns tokens=COLUMN,ids=COLUMN,values=COLUMN and so on."
        )
