"""A published folder as a store that is read only.

Its rows stand where they stood in the store that they come from.

`export` writes the chosen rows of a snapshot into few large files, and keeps the snapshot's record.
Here each shard of that record is a shard again. So the same recipe chooses the same snapshot and
trains the same student. Of rows that were cut on their way out each file is a shard.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import IntegrityError, UsageError
from ..files.base import Files
from ..files.local import LocalFiles
from ..files.opening import open_files
from ..snapshots.snapshot import load_snapshot
from ..store.commits import Commit
from ..store.segments import INDEXED, Indexed, place_of, segment_schema
from ..store.store import Store
from ..tables.schema import SCHEMAS, TableName
from ..tables.shard import ShardFile, ShardInfo, StoredFile, text_keys
from ..tables.spans import SPAN_COLUMNS, scored_tokens
from .manifest import MANIFEST, Manifest, read_manifest
from .table_file import HELP, PublishedFile


class PublishedShard(ShardFile):
    """A shard of the store that was published from: its published rows, numbered as there."""

    def __init__(
        self, table: "_Rows", shard: ShardInfo, rows: np.ndarray, positions: np.ndarray
    ) -> None:
        """`rows` ascending, `positions` where they are in the published table."""
        self.name = shard.name
        self.rows_per_group = shard.row_groups
        self.starts = np.concatenate([[0], np.cumsum(shard.row_groups, dtype=np.int64)])
        self._table, self._rows, self._positions = table, rows, positions
        self.about = table.file(0).about
        self.schema = table.file(0).schema

    @property
    def numbers(self) -> np.ndarray:
        """Indices of the published rows."""
        return self._rows

    def read(
        self, group: int, columns: Sequence[str] | None = None, *, threads: bool = True
    ) -> pa.Table:
        """The published rows of one row group."""
        first, last = np.searchsorted(self._rows, self.starts[group : group + 2])
        return self._table.select(self._positions[first:last], columns, threads=threads)

    def select(
        self, rows: np.ndarray, columns: Sequence[str] | None = None, *, threads: bool = True
    ) -> pa.Table:
        """Rows by ascending index, page checksums verified."""
        return self._table.select(self._at(rows), columns, threads=threads)

    def take(
        self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rows by index, in the order given."""
        positions = self._at(np.asarray(rows, np.int64))
        for file, group in groupby(positions.tolist(), key=self._table.file_of):
            first = int(self._table.starts[file])
            yield from self._table.file(file).take(
                [position - first for position in group], columns
            )

    def _at(self, rows: np.ndarray) -> np.ndarray:
        found = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        if len(rows) and not np.array_equal(self._rows[found], rows):
            missing = int(rows[self._rows[found] != rows][0])
            raise IntegrityError(
                f"{self.name}: row {missing} was asked for and was not published. {HELP}"
            )
        positions: np.ndarray = self._positions[found]
        return positions


class _Rows:
    """The files of one published table, one after the other."""

    def __init__(self, files: Files, infos: Sequence[ShardInfo]) -> None:
        self._files, self.infos = files, infos
        self.starts = np.concatenate(
            [[0], np.cumsum([info.rows for info in infos], dtype=np.int64)]
        )

    def file_of(self, position: int) -> int:
        """Which file holds a row."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def file(self, number: int) -> PublishedFile:
        """A file, opened."""
        info = self.infos[number]
        file = PublishedFile(self._files, info.name)
        if file.rows != info.rows:
            raise IntegrityError(
                f"{self._files.root}/{info.name}: {file.rows} rows, {MANIFEST} says {info.rows}. "
                f"{HELP}"
            )
        return file

    def select(
        self, positions: np.ndarray, columns: Sequence[str] | None, *, threads: bool
    ) -> pa.Table:
        """Rows by ascending position (of one row group of a store, so of very few files)."""
        of = np.searchsorted(self.starts, positions, side="right") - 1  # file of each row
        parts = []
        for number in np.unique(of).tolist() or [0]:
            rows = positions[of == number] - self.starts[number]
            parts.append(self.file(number).select(rows, columns, threads=threads))
        return pa.concat_tables(parts)

    def lengths(self, ends: np.ndarray) -> np.ndarray:
        """[R] tokens of each row.

        In version 1 a row ends with its span, at `ends`; later versions are counted.
        """
        parts = [np.zeros(0, np.int64)]
        for number, (first, last) in enumerate(pairwise(self.starts.tolist())):
            file = self.file(number)
            if file.about["format_version"] == 1:
                parts.append(ends[first:last])
                continue
            for group in range(len(file.rows_per_group)):  # the ids of all at once are too many
                ids = file.read(group, ["token_ids"])["token_ids"]
                parts.append(pc.list_value_length(ids).to_numpy())
        return np.concatenate(parts)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of every row."""
        return pa.concat_tables([self.file(i).read_all(names) for i in range(len(self.infos))])


class Published(Store):
    """The version that a published folder shows."""

    def __init__(self, files: Files, manifest: Manifest) -> None:
        """`files`: of the version's folder."""
        super().__init__(files, manifest.id)
        self.manifest = manifest
        tables = {split.table for split in manifest.splits.values()}
        if len(tables) != 1 or not tables <= SCHEMAS.keys():
            raise IntegrityError(
                f"{files.root}/{MANIFEST}: its splits are of {sorted(tables)}, expected one table."
            )
        self.table: TableName = tables.pop()  # type: ignore[assignment]
        """The table that its splits are of."""
        for name, split in manifest.splits.items():
            rows = sum(file.rows for file in manifest.tables_of(self.table, name))
            if rows != split.rows:
                raise IntegrityError(
                    f"{files.root}/{MANIFEST}: split {name} has {split.rows} rows, its files have "
                    f"{rows}. {HELP}"
                )

    @classmethod
    def open_folder(cls, root: Path | str) -> "Published":
        """Open the version that the card points at. Missing or short files are found here.

        Raises:
            UsageError: this is no published folder.
            IntegrityError: it is damaged.
        """
        manifest = read_manifest(open_files(root))
        published = cls(open_files(f"{root}/{manifest.version}"), manifest)
        for file in manifest.files:
            published._check_size(file.name, file.bytes)
        return published

    @property
    def about(self) -> dict[str, Any]:
        """What all of its rows share: teacher_id, tokenizer_id, vocab_size, head and the like."""
        return dict(self.manifest.about[self.table])

    def prove(self, sha256: Callable[[Path], str]) -> None:
        """Hash every file that the manifest lists; `sha256` may remember local files.

        Raises:
            IntegrityError: a file is missing or is not the one that was published; names it.
        """
        for file in self.manifest.files:
            if isinstance(self.files, LocalFiles):
                found = sha256(self.files.local(file.name))
            else:
                found = self.files.sha256(file.name)
            if found != file.sha256:
                raise IntegrityError(
                    f"{self.root}/{file.name}: the file is damaged: its sha256 is {found[:16]}, "
                    f"{MANIFEST} says {file.sha256[:16]}. {HELP}"
                )

    def _check_size(self, name: str, size: int) -> None:
        try:
            found = self.files.size(name)
        except FileNotFoundError as error:
            raise IntegrityError(f"{self.root}/{name}: the file is missing. {HELP}") from error
        if found != size:
            raise IntegrityError(
                f"{self.root}/{name}: {found} bytes, {MANIFEST} says {size}. {HELP}"
            )

    def shards(self, table: TableName) -> list[ShardInfo]:
        """The published files of a table, split after split."""
        files = [
            file for split in self.manifest.splits for file in self.manifest.tables_of(table, split)
        ]
        return [
            ShardInfo(file.name, file.sha256, file.bytes, file.rows, file.row_groups)
            for file in files
        ]

    def commits(self, table: TableName) -> list[Commit]:
        """A commit for each shard of which rows were published, in the order of the commits."""
        if table == self.table:
            infos = [self._chosen[sha256][0] for sha256 in self._order]
        else:
            infos = self.shards(table)
        return [_commit(table, seq, info) for seq, info in enumerate(infos)]

    def shard(self, table: TableName, sha256: str) -> ShardFile:
        """A shard opened for reading."""
        if table == self.table:
            return PublishedShard(self._rows(table), *self._chosen[sha256])
        name = next(info.name for info in self.shards(table) if info.sha256 == sha256)
        return PublishedFile(self.files, name)

    def stored(self, table: TableName, sha256: str) -> list[StoredFile]:
        """The published files that a shard's rows are read from."""
        if table == self.table:
            rows, (_, _, positions) = self._rows(table), self._chosen[sha256]
            of = np.searchsorted(rows.starts, positions, side="right") - 1  # file of each row
            infos = [rows.infos[number] for number in np.unique(of).tolist()]
        else:
            infos = [info for info in self.shards(table) if info.sha256 == sha256]
        return [StoredFile(self.files, info.name, info.sha256, PublishedFile) for info in infos]

    def indexed(
        self, table: TableName, *, scratch: Path | None = None, write: bool = False
    ) -> Indexed:
        """What a plan asks of the rows; nothing is written."""
        commits = self.commits(table)
        if not commits:
            return Indexed(commits, segment_schema(table).empty_table(), [])
        rows = self._rows(table)
        if missing := sorted(set(INDEXED[table]) - set(rows.file(0).schema.names)):
            raise UsageError(
                f"{self.root}: its {table} were published without the column {missing[0]}, so no "
                "plan can be made of them. Use a copy that has all columns."
            )
        columns = [self._places(table, commits), *rows.columns(INDEXED[table])]
        newest = pa.Table.from_arrays(columns, schema=segment_schema(table))
        return Indexed(commits, newest, [])

    def _places(self, table: TableName, commits: Sequence[Commit]) -> np.ndarray:
        """Where each published row stood (`place_of`), in the order of the files."""
        firsts = [place_of(commit.seq, 0) for commit in commits]
        if table != self.table:
            counts = [commit.shard.rows for commit in commits]
            parts = [first + np.arange(n) for first, n in zip(firsts, counts, strict=True)]
            return np.concatenate(parts)
        places = np.empty(self._rows(table).starts[-1], np.int64)
        for first, commit in zip(firsts, commits, strict=True):
            _, chosen, positions = self._chosen[commit.shard.sha256]
            places[positions] = first + chosen
        return places

    def samples(self) -> pa.Table:
        """All that there is to train and be judged on.

        Returns key (of the generation), prompt_key, tokens_key, held_out, tokens, scored, place (in
        `table`), number (in its split's order, in which it was asked for).
        """
        texts = self.table == "generations"
        key = "key" if texts else "generation_key"
        spans = SPAN_COLUMNS if texts else ("span_start", "span_tokens")
        of_table = self._rows(self.table)
        rows = of_table.columns([key, *spans, "prompt_key", "tokens_key"])
        first, more = (rows[name].to_numpy() for name in spans[:2])
        return pa.table(
            {
                "key": rows[key],
                "prompt_key": rows["prompt_key"],
                "tokens_key": rows["tokens_key"],
                "held_out": self._held_out(),
                "tokens": first + more if texts else of_table.lengths(ends=first + more),
                "scored": scored_tokens(rows) if texts else more,
                "place": self.indexed(self.table).newest["place"],
                "number": np.concatenate([self._numbers(split) for split in self.manifest.splits]),
            }
        )

    def _numbers(self, name: str) -> np.ndarray:
        """[rows] of a split: each row's place in the snapshot's order, if that is known."""
        split = self.manifest.splits[name]
        order = load_snapshot(self, split.snapshot, most=split.rows).order if split.whole else None
        return np.arange(split.rows) if order is None else np.argsort(order.samples)

    def texts(self) -> pa.Table:
        """`key` (of the generation) and `text_key` of each of its rows."""
        name = "key" if self.table == "generations" else "generation_key"
        parts = []
        for number in range(len(self._rows(self.table).infos)):
            file = self._rows(self.table).file(number)
            keys = file.read_all([name])[name].combine_chunks()
            texts = text_keys(file, np.arange(file.rows))
            parts.append(pa.table({"key": keys, "text_key": texts}))
        return pa.concat_tables(parts)

    def labels(self) -> int:
        """How many of the rows to train on have a gold label."""
        rows = self._rows(self.table)
        names = [n for n in ("label", "labels") if n in rows.file(0).schema.names]
        if not names:
            return 0
        found = rows.columns(names)
        there = np.any([found[name].is_valid().to_numpy() for name in names], axis=0)
        return int((there & ~self._held_out()).sum())

    def _held_out(self) -> np.ndarray:
        """[rows] bool, in the order of the files."""
        splits = self.manifest.splits.items()
        return np.concatenate([np.full(split.rows, name == "test") for name, split in splits])

    def _rows(self, table: TableName) -> _Rows:
        return _Rows(self.files, self.shards(table))

    @cached_property
    def _snapshots(self) -> dict[str, list[tuple[ShardInfo, np.ndarray]]]:
        """By split: shards and their published rows, in the split's order."""
        return {split: self._split(split) for split in self.manifest.splits}

    def _split(self, name: str) -> list[tuple[ShardInfo, np.ndarray]]:
        split = self.manifest.splits[name]
        files = self.manifest.tables_of(self.table, name)
        if not split.whole:
            infos = [ShardInfo(f.name, f.sha256, f.bytes, f.rows, f.row_groups) for f in files]
            return [(info, np.arange(info.rows)) for info in infos]
        published = sum(file.rows for file in files)
        snapshot = load_snapshot(self, split.snapshot, most=published)
        if snapshot.table != self.table or snapshot.rows != published:
            raise IntegrityError(
                f"{self.root}: split {name} has {published} rows of {self.table}, its snapshot "
                f"{snapshot.id} {snapshot.rows} of {snapshot.table}. {HELP}"
            )
        found = []
        for shard in snapshot.shards:
            size = sum(shard.row_groups)
            info = ShardInfo(shard.name, shard.sha256, 0, size, shard.row_groups)
            found.append((info, shard.rows.astype(np.int64)))
        return found

    @cached_property
    def _chosen(self) -> dict[str, tuple[ShardInfo, np.ndarray, np.ndarray]]:
        """Shard by sha256: itself, its published rows, and their places in the published table."""
        found: dict[str, tuple[ShardInfo, list[np.ndarray], list[np.ndarray]]] = {}
        first = 0  # position of the part's first row in the published table
        for parts in self._snapshots.values():
            for info, rows in parts:
                _, chosen, positions = found.setdefault(info.sha256, (info, [], []))
                chosen.append(rows)
                positions.append(first + np.arange(len(rows)))
                first += len(rows)
        joined = {}
        for sha256, (info, chosen, positions) in found.items():
            rows, at = np.concatenate(chosen), np.concatenate(positions)
            order = np.argsort(rows)
            joined[sha256] = (info, rows[order], at[order])
        return joined

    @cached_property
    def _order(self) -> list[str]:
        """Shards in the order in which they were committed, as far as the splits tell."""
        before: dict[str, set[str]] = {sha256: set() for sha256 in self._chosen}
        for parts in self._snapshots.values():
            for earlier, later in pairwise(info.sha256 for info, _ in parts):
                before[later].add(earlier)
        try:
            return list(TopologicalSorter(before).static_order())
        except CycleError as error:
            raise IntegrityError(
                f"{self.root}: its splits order their shards differently. {HELP}"
            ) from error


def _commit(table: TableName, seq: int, info: ShardInfo) -> Commit:
    unknown: Any = dict.fromkeys(("writer", "stage", "created"), "")
    more: Any = {"tokens": 0, "seconds": 0.0, "versions": {}}
    return Commit(table=table, seq=seq, shard=info, **unknown, **more)
