"""The store: a folder of teacher outputs.

Open it, add rows through a writer, read rows by what the commits say.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..bounds import inside, mapping, parsed, understood
from ..errors import IntegrityError, UsageError
from ..files.base import Files
from ..files.opening import open_files
from ..keys import seal
from ..tables.schema import SCHEMAS, STORE_VERSION, TABLES, VERSIONS, TableName
from ..tables.shard import ShardFile, ShardInfo, StoredFile, shard_name
from .commits import Commit, CommitLog, retire
from .inputs import inputs_table, put_inputs, read_inputs
from .matrices import KeptMatrix, keep_matrix, kept_matrix, matrix_file, read_matrix
from .segments import Indexed, indexed
from .writer import CommitLimits, ShardWriter

MARKER = "STORE.json"
TEACHER_FILES = "files.json"
"""Beside what is kept of a teacher: the sha256 of each file."""
_REQUIRED_ABOUT = {
    "soft_targets": ("teacher_id", "tokenizer_id", "vocab_size", "mantissa_bits"),
    "features": ("teacher_id",),
}


class Store:
    """An open store. `Store.open` makes one."""

    def __init__(self, files: Files, store_id: str) -> None:
        self.files = files
        self.id = store_id
        self._logs = {table: CommitLog(files, table) for table in TABLES}

    @classmethod
    def open(cls, root: Path | str, *, create: bool = False) -> "Store":
        """Open the store in a folder or below a URL.

        With `create` it is opened for writing, and made if nothing is there.
        """
        return cls.from_files(open_files(root), create=create)

    @classmethod
    def from_files(cls, files: Files, *, create: bool = False) -> "Store":
        """`open` on given files."""
        if create:
            _create(files)
        if not files.exists(MARKER):
            raise UsageError(
                f"{files.root}: no store here (no {MARKER} found). Check the path, or run a "
                "recipe first. A published folder is no store: it is checked where a recipe names "
                "it in storage.sources."
            )
        try:
            marker = parsed(files.read(MARKER))
            version, store_id = marker["format_version"], str(marker["store_id"])
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(
                f"{files.root}/{MARKER}: the marker is damaged ({error!r}). Write it again, with "
                "any id: "
                f'{{"format_version": {STORE_VERSION}, "store_id": "..."}}'
            ) from error
        if version not in range(1, STORE_VERSION + 1):
            raise IntegrityError(
                f"{files.root}/{MARKER}: format version {version}, this Stillroom reads up to "
                f"{STORE_VERSION}. Use the version of Stillroom that made the store."
            )
        if create and version < STORE_VERSION:
            # An older program must not write here any more: it would not know the new columns.
            files.replace(MARKER, _marker(store_id))
        return cls(files, store_id)

    @property
    def root(self) -> Path | str:
        """The store's folder, or its URL."""
        return self.files.root

    @property
    def parts(self) -> list[tuple["Store", int]]:
        """Its stores, and the number from which the commits of each are counted here."""
        return [(self, 0)]

    def commits(self, table: TableName) -> list[Commit]:
        """Live commits of a table, oldest first, other writers' included."""
        return self._logs[table].refresh()

    def shards(self, table: TableName) -> list[ShardInfo]:
        """The files that hold a table's rows."""
        return [commit.shard for commit in self.commits(table)]

    def indexed(self, table: TableName, *, scratch: Path, write: bool = False) -> Indexed:
        """What a plan asks of a table's rows: `segments.indexed`."""
        return indexed(self.files, table, self.commits(table), write=write, scratch=scratch)

    def source_of(self, table: TableName, sha256: str) -> str:
        """Which read-only source a shard is in; empty: the store's own."""
        return ""

    def writer(
        self, table: TableName, *, about: Mapping[str, Any], limits: CommitLimits | None = None
    ) -> ShardWriter:
        """A context manager that adds rows.

        `about` goes into each shard's metadata: who wrote it, and how.
        """
        missing = [name for name in _REQUIRED_ABOUT.get(table, ()) if name not in about]
        if missing:
            raise ValueError(
                f"a writer of {table} needs {', '.join(missing)} in `about`: shards describe "
                "themselves"
            )
        self.files.prove_exclusive()
        log = CommitLog(self.files, table, track_keys=True)
        return ShardWriter(self.files, log, about=about, limits=limits or CommitLimits())

    def retire(self, commit: Commit, *, reason: str) -> bool:
        """Withdraw a commit; its rows may then be made again. False if it was withdrawn before."""
        return retire(self.files, commit.table, commit.seq, reason=reason)

    def index(self, table: TableName, columns: Sequence[str]) -> pa.Table:
        """Some columns of every committed row, with `shard` (its sha256) and `row` (its place)."""
        chosen = [SCHEMAS[table].field(name).remove_metadata() for name in columns]
        schema = pa.schema([*chosen, pa.field("shard", pa.string()), pa.field("row", pa.int32())])
        parts = [schema.empty_table()]
        for commit in self.commits(table):
            shard = self.shard(table, commit.shard.sha256)
            if shard.rows_per_group != commit.shard.row_groups:
                raise IntegrityError(
                    f"{shard.name}: row groups {shard.rows_per_group}, committed "
                    f"{commit.shard.row_groups}."
                )
            data = shard.read_all(columns)
            shas = pa.chunked_array([pa.repeat(commit.shard.sha256, data.num_rows)])
            rows = pa.chunked_array([shard.numbers.astype(np.int32)])
            parts.append(pa.Table.from_arrays([*data.columns, shas, rows], schema=schema))
        return pa.concat_tables(parts)

    def rows(
        self,
        table: TableName,
        places: Mapping[str, Sequence[int] | np.ndarray],
        columns: Sequence[str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Rows by shard sha256 and row index, in the order given.

        Numeric lists are numpy arrays.
        """
        for sha256, rows in places.items():
            yield from self.shard(table, sha256).take(rows, columns)

    def shard(self, table: TableName, sha256: str) -> ShardFile:
        """A shard opened for reading."""
        name = shard_name(table, sha256)
        return ShardFile(self.files, name)

    def stored(self, table: TableName, sha256: str) -> list[StoredFile]:
        """The files that a shard's rows are read from."""
        return [StoredFile(self.files, shard_name(table, sha256), sha256)]

    def put_inputs(self, data_id: str, table: pa.Table, about: Mapping[str, Any]) -> None:
        """Record which prompts a recipe's data are, in which split.

        The first record of a `data_id` stays.
        """
        put_inputs(self.files, data_id, table, about=about)

    def inputs(self, data_id: str) -> pa.Table | None:
        """The prompts recorded under `data_id`: key, prompt_key, split, windows, first.

        None if there is no record.
        """
        inputs = read_inputs(self.files, data_id)
        return None if inputs is None else inputs_table(self.files, inputs)

    def inputs_about(self, data_id: str) -> dict[str, Any] | None:
        """What `put_inputs` was told about the data. None if there is no record."""
        inputs = read_inputs(self.files, data_id)
        return None if inputs is None else inputs.about

    def put_teacher(self, teacher_id: str, files: Mapping[str, bytes]) -> None:
        """Keep a teacher's small files (tokenizer, config, template).

        `identity.json` comes after them, it makes them count; then a record of their hashes.
        """
        folder = f"teachers/{teacher_id}"
        if self.files.exists(f"{folder}/{TEACHER_FILES}"):
            return
        for name in sorted(set(files) - {"identity.json"}):
            self.files.put_if_absent(f"{folder}/{name}", files[name])
        self.files.put_if_absent(f"{folder}/identity.json", files["identity.json"])
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        # One that was there before may say something else in what no identity holds.
        ours = {n: d for n, d in digests.items() if self.files.sha256(f"{folder}/{n}") == d}
        self.files.put_if_absent(f"{folder}/{TEACHER_FILES}", seal({"files": ours}))

    def put_matrix(self, name: str, matrix: np.ndarray, about: Mapping[str, Any]) -> None:
        """Keep a matrix [R, C] of float16 or float32 under a name; the first that is kept stays."""
        self.files.prove_exclusive()
        keep_matrix(self.files, name, matrix, about)

    def matrix_named(self, name: str) -> KeptMatrix | None:
        """The record of the matrix that is kept under a name, here or in a source, or None."""
        found = (kept_matrix(part.files, name) for part, _ in self.parts)
        return next((record for record in found if record is not None), None)

    def matrix(self, matrix_id: str) -> np.ndarray:
        """The numbers of a matrix, here or in a source; mapped, their hash is checked.

        Raises:
            IntegrityError: its file is missing or damaged.
        """
        name = matrix_file(matrix_id)
        there = (part.files for part, _ in self.parts if part.files.exists(name))
        return read_matrix(next(there, self.files), matrix_id)

    def teacher_parts(self, teacher_id: str) -> dict[str, Any]:
        """What a teacher's identity is made of; nothing if the store does not know it."""
        name = f"teachers/{teacher_id}/identity.json"
        with understood(name, "teacher's identity"):
            if not self.files.exists(inside(name)):
                return {}
            parts = mapping(parsed(self.files.read(name)))
            config = mapping(parts.get("config") or {})
            mapping(config.get("text_config") or {})  # of a model that reads more than text
            return parts

    def teacher_dir(self, teacher_id: str) -> Path:
        """Folder of this machine with a teacher's tokenizer, config and template."""
        folder = f"teachers/{teacher_id}"
        with understood(folder, "folder of a teacher"):
            names = self.files.names(inside(folder))
        if "identity.json" not in names:
            raise UsageError(
                f"{self.root}/{folder}: the store does not know this teacher. Run the recipe first."
            )
        paths = [self.files.local(f"{folder}/{name}") for name in names]
        return paths[0].parent


def is_store(root: Path | str) -> bool:
    """Whether there is a store in a folder or below a URL."""
    return open_files(root).exists(MARKER)


def _create(files: Files) -> None:
    # The marker is a store's first file: entries seen before looking for it must have come after
    # it.
    occupied = not files.empty()
    if occupied and not files.exists(MARKER):
        raise UsageError(
            f"{files.root}: the folder is not empty and not a store. Choose another folder for "
            "the store."
        )
    files.prove_exclusive()
    files.put_if_absent(MARKER, _marker(str(uuid.uuid4())))


def _marker(store_id: str) -> bytes:
    marker = {"format_version": STORE_VERSION, "tables": VERSIONS, "store_id": store_id}
    return json.dumps(marker, indent=1).encode() + b"\n"
