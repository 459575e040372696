"""`stillroom import`: a foreign table of token ids and teacher probabilities becomes rows of a store.

Every row is checked (`stages/data/importing/row.py`), the first ones also for targets that belong
to other tokens than those they stand beside (`stages/audit/shift.py`), before anything is written.
What stands in the store afterwards is what a run with given text leaves: prompts, generations, soft
targets, inputs and a binding, so plan, train and report go on from there.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ....storage.errors import UsageError
from ....storage.files.opening import open_files
from ....storage.keys import content_id, content_key
from ....storage.store.bindings import Binding, write_binding
from ....storage.store.store import Store
from ....storage.store.writer import ShardWriter
from ...audit.shift import shifted
from ...ledger.requests import target_key, tokens_key
from ...models.identity import FileHashes, Identity, find_model, identify, identify_unseen
from ...models.rendering import Renderer
from ...recipe.sections import Data, Storage
from ...workers.job import Progress
from ...workers.shard_about import versions
from ..inputs import Intake
from ..readers import records, source_files
from .rounding import refuse_renormalised
from .row import BadRow, Columns, ForeignRow, convert

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


def import_table(asked: ImportRequest, progress: Progress) -> Imported:
    """Read the table into the store.

    Raises:
        UsageError: a column is missing, a row does not fit (without `skip_bad`), or the targets are
            other tokens'.
        IntegrityError: the store is damaged.
    """
    if not open_files(asked.store).empty():
        Store.open(asked.store, create=True)  # refuses what is no store before the work
    hashes = FileHashes(asked.store, remember=False)
    return _Import(asked, hashes, _teacher(asked, hashes), progress).run()


def given_format(done: Imported) -> str:
    """The `data.format` that fits what was imported."""
    return "completion" if done.prompts else "text"


def _teacher(asked: ImportRequest, hashes: FileHashes) -> Identity:
    if asked.teacher is not None and asked.tokenizer is None and asked.teacher_name is None:
        folder = find_model(asked.teacher, asked.revision, field="--teacher", download=True)
        return identify(folder, dtype="auto", hashes=hashes, field="--teacher")
    if asked.teacher is None and asked.tokenizer is not None and asked.teacher_name:
        if not asked.tokenizer.is_dir():
            raise UsageError(
                f"--tokenizer: no folder {asked.tokenizer}. Name a folder with the teacher's "
                "tokenizer."
            )
        return identify_unseen(
            asked.tokenizer, asked.teacher_name, hashes=hashes, vocab_size=asked.vocab_size
        )
    raise UsageError(
        "Whose probabilities are these? Give --teacher MODEL (a folder or Hub id), or, where its "
        "weights are not here, --tokenizer FOLDER and --teacher-name NAME."
    )


class _Import:
    """One table on its way into a store."""

    _store: Store
    """Made when the first rows were found to be right: an import that is refused leaves nothing."""

    def __init__(
        self, asked: ImportRequest, hashes: FileHashes, teacher: Identity, progress: Progress
    ) -> None:
        self._asked, self._hashes, self._teacher, self._progress = asked, hashes, teacher, progress
        self._tokenizer = Renderer(teacher.folder, {}).tokenizer
        self._author = content_id("given", tokenizer=teacher.tokenizer_id, imported=True)
        self._vocab_size = asked.vocab_size or teacher.vocab_size
        self._intake = Intake()
        self._done = Imported(teacher=teacher)

    def run(self) -> Imported:
        """Read, check, write; the binding last."""
        self._progress.start(total=0, unit="rows")
        rows = self._rows()
        first = list(islice(rows, AUDITED))
        found = [row for _, row, _ in first if row is not None]
        if not found and len(first) < AUDITED:
            self._refuse_empty([error for *_, error in first if error is not None])
        self._audit(found)
        self._store = Store.open(self._asked.store, create=True)
        self._hashes.keep()
        k = min((row.targets.probabilities.shape[1] for row in found), default=0)
        self._store.put_teacher(self._teacher.id, self._teacher.files_to_keep())
        with ExitStack() as stack:
            writers = {table: stack.enter_context(self._writer(table, k)) for table in _TABLES}
            for where, row, error in chain(first, rows):
                if row is None:
                    assert error is not None
                    self._reject(writers["rejects"], where, error)
                else:
                    self._write(writers, where, row)
                self._progress.advance()
        self._finish()
        return self._done

    def _writer(self, table: Any, k: int) -> ShardWriter:
        columns = self._asked.columns
        settings = {"targets_at": columns.targets_at, "values": columns.kind}
        about = {
            "stage": "import",
            "head": "lm",
            "class_names": None,
            "author_id": self._author,
            "teacher_id": self._teacher.id,
            "tokenizer_id": self._teacher.tokenizer_id,
            "vocab_size": self._vocab_size,
            "mantissa_bits": self._asked.mantissa_bits,
            "settings": settings | ({"kind": "topk", "k": k} if table == "soft_targets" else {}),
            "versions": versions(),
        }
        return self._store.writer(table, about=about)

    def _rows(self) -> Iterator[tuple[str, ForeignRow | None, BadRow | None]]:
        columns = self._asked.columns
        for where, record in _records(self._asked):
            try:
                if isinstance(record, str):
                    raise BadRow(
                        "unreadable", "-", found=record, expected="a record", help="Mend the file."
                    )
                _refuse_missing(where, record, columns)
                yield where, convert(record, columns, vocab_size=self._vocab_size), None
            except BadRow as error:
                if not self._asked.skip_bad:
                    raise UsageError(
                        f"{where}: {error} --skip-bad leaves such rows out."
                    ) from error
                yield where, None, error

    def _audit(self, rows: list[ForeignRow]) -> None:
        """Refuse targets that are other tokens', seen by what they find likely."""
        if not rows:
            return
        if found := shifted([self._targets(row) for row in rows]):
            other = "same" if self._asked.columns.targets_at == "next" else "next"
            raise UsageError(
                f"{self._asked.source}: in the first {len(rows)} rows, the targets are {found}. "
                f"Expected each position's own. Is it --targets-at {other}?"
            )
        left = np.concatenate([row.nothing_left for row in rows])
        refuse_renormalised(self._asked.source, left, rows=len(rows))
        tokens = sum(len(row.targets.token_logprob) for row in rows)
        self._done.notes.append(
            f"audit: {len(rows)} rows of {tokens} scored tokens looked at, no shift found"
        )

    def _write(self, writers: dict[str, ShardWriter], where: str, row: ForeignRow) -> None:
        ids, start = row.token_ids, row.prompt_tokens
        prompt = content_key("prompt", token_ids=ids[:start].tobytes() if start else ids.tobytes())
        key = content_key("prompts", prompt=prompt, token_ids=ids.tobytes())
        text, completion = (self._decoded(part) for part in (ids[:start], ids[start:]))
        given = {"text": text, "completion": completion} if start else {"text": completion}
        writers["prompts"].add(
            {
                "key": key,
                "prompt_key": prompt,
                "format": "completion" if start else "text",
                "source": where,
            }
            | given
        )
        reuse_key = content_key("given", author=self._author, source=key, window=0)
        generation = {
            "key": content_key("generations", reuse_key=reuse_key, max_tokens=None),
            "reuse_key": reuse_key,
            "prompt_key": prompt,
            "source_key": key,
            "author_id": self._author,
            "sampling_id": self._author,
            "sample_index": 0,
            "tokens_key": tokens_key(ids, start),
            "token_ids": ids,
            "prompt_tokens": start,
            "completion_tokens": len(ids) - start,
            "text": completion,
            "finish_reason": "given",
        }
        writers["generations"].add(generation)
        targets = self._targets(row) | {"generation_key": generation["key"], "prompt_key": prompt}
        new = writers["soft_targets"].add(targets)
        self._intake.add(key, prompt)
        done = self._done
        done.rows, done.known = done.rows + new, done.known + (not new)
        done.tokens += targets["span_tokens"] * new
        done.k = min(done.k or targets["k"], targets["k"])
        done.prompts = done.prompts or start > 0

    def _targets(self, row: ForeignRow) -> dict[str, Any]:
        """The columns of a soft-targets row, less those that name others."""
        columns = row.targets.columns(self._asked.mantissa_bits)
        tokens = tokens_key(row.token_ids, row.prompt_tokens)
        reuse_key = target_key(self._teacher.id, tokens)
        how = {
            "mantissa_bits": self._asked.mantissa_bits,
            "kind": "topk",
            "k": columns["k"],
            "imported": True,
        }
        return columns | {
            "key": content_key("soft_targets_row", reuse_key=reuse_key, **how),
            "reuse_key": reuse_key,
            "tokens_key": tokens,
            "teacher_id": self._teacher.id,
            "kind": "topk",
            "token_ids": row.token_ids,
            "span_start": max(row.prompt_tokens, 1),
        }

    def _decoded(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def _reject(self, writer: ShardWriter, where: str, error: BadRow) -> None:
        key = content_key("reject", source=self._asked.source, row=where, reason=error.reason)
        row = {
            "key": key,
            "stage": "import",
            "reason": error.reason,
            "message": f"{where}: {error}",
            "attempts": 1,
        }
        writer.add(row)
        self._done.rejected[error.reason] = self._done.rejected.get(error.reason, 0) + 1

    def _refuse_empty(self, errors: list[BadRow]) -> None:
        why = (
            f"all {len(errors)} rows were rejected, the first for: {errors[0]}"
            if errors
            else "it holds no rows."
        )
        raise UsageError(
            f"{self._asked.source}: nothing to import: {why} Check the columns that you named."
        )

    def _finish(self) -> None:
        """Say which prompts these are, and whose; a table that was imported before says the same again."""
        done, asked = self._done, self._asked
        prompts = self._intake.prompts()
        if not prompts:
            why = (
                f"all {sum(done.rejected.values())} rows were rejected"
                if done.rejected
                else "it holds no rows"
            )
            raise UsageError(
                f"{asked.source}: nothing to import: {why}. Check the columns that you named."
            )
        done.holdout = min(200, prompts // 10) if asked.holdout is None else asked.holdout
        if done.holdout >= prompts:
            raise UsageError(
                f"--holdout: {done.holdout} of {prompts} prompts leaves nothing to train on. Use "
                f"fewer than {prompts}."
            )
        table = self._intake.table(done.holdout)
        names = {"teacher": self._teacher.id, "author": self._author}
        content = [key.hex() for key in table["key"].to_pylist()]
        data_id = content_id("inputs", imported=names, keys=content, holdout=done.holdout)
        about = {
            "source": asked.source,
            "rejected": sum(done.rejected.values()),
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


def _records(asked: ImportRequest) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Every record, with where it stands."""
    data = Data(source=asked.source, split=asked.split, format="text")
    try:
        files = source_files(asked.source)
        if not files or any(file.suffix not in (".parquet", ".arrow") for file in files):
            yield from records(data)
            return
    except UsageError as error:  # which names the field of a recipe
        said = str(error).replace("data.source:", "SOURCE:").replace("data.split:", "--split:")
        raise UsageError(said) from error
    for file in files:
        yield from _table_rows(file, asked)


def _table_rows(file: Path, asked: ImportRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet or Arrow file, few at a time: the lists of one row may be long."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = asked.columns.named()
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as parquet:
                known = parquet.schema_arrow.names
                batches = parquet.iter_batches(
                    64, columns=[name for name in names if name in known]
                )
                yield from _numbered(file, batches)
            return
        with pa.memory_map(str(file)) as memory:
            yield from _numbered(file, _arrow(memory))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{file}: not readable ({error}). Write it again.") from error


def _numbered(file: Path, batches: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for row in range(
            batch.num_rows
        ):  # one at a time: as Python objects numbers take ten times their room
            number += 1
            yield f"{file.name}:{number}", batch.slice(row, 1).to_pylist()[0]


def _arrow(memory: Any) -> Any:
    """The batches of an Arrow file in either of its two formats."""
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(memory)
    except pa.ArrowInvalid:
        memory.seek(0)
        reader = pa.ipc.open_file(memory)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _refuse_missing(where: str, record: dict[str, Any], columns: Columns) -> None:
    missing = [name for name in columns.named() if name not in record]
    if missing:
        raise UsageError(
            f"{where}: no column {missing[0]!r} (found "
            f"{', '.join(map(repr, record)) or 'none that was named'}). Name the columns: "
            "--columns tokens=COLUMN,ids=COLUMN,values=COLUMN and so on."
        )
