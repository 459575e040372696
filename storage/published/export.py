"""Export of a snapshot: its rows as Parquet files, in a version folder that never changes.

`make_tables` writes the files into a working folder; `place` moves a finished version into the
published folder, data first, its MANIFEST last. Who reads the folder starts from the card, which
the caller replaces after that, so nobody sees half a version. `manifest.py` says what lies where.
Equal rows and choices give equal bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UsageError
from ..files.base import file_sha256
from ..files.local import LocalFiles
from ..integrity.checked import Memory, check_file, files_of
from ..snapshots.snapshot import Snapshot
from ..store.store import Store
from ..tables.schema import KEY, VERSIONS, TableName
from ..tables.shard import FEATURE_GROUP_BYTES, text_keys
from .choice import Choice, FeatureChoice
from .export_features import (
    COLUMNS,
    FeatureNumbers,
    feature_places,
    feature_rows,
    shards_of_places,
    take_matrices,
)
from .export_files import TableFiles
from .export_numbers import TargetNumbers, TextNumbers
from .export_rows import (
    PUBLISHED,
    allowed_generations,
    can_be_cut,
    chosen_columns,
    columns_of_some,
    cut_rows,
    generations_of,
    published_columns,
    shards_of,
    snapshot_rows,
)
from .manifest import MANIFEST, Manifest, PublishedFile, PublishedSplit

# What shards say that holds for this or that shard only, or is told in PROVENANCE.json.
_OF_ONE_SHARD = {"statistics", "again", "versions", "format_version", "table", "settings", "stage"}
_WHOLE_FEATURES = {"columns": COLUMNS, "complete": True, "format_version": VERSIONS["features"]}
_ONE_FOR_ALL = ("teacher_id", "tokenizer_id", "vocab_size", "head", "class_names")


@dataclass(kw_only=True, slots=True)
class Made:
    """What `make_tables` made."""

    splits: dict[str, PublishedSplit] = field(default_factory=dict)
    files: dict[Path, PublishedFile] = field(default_factory=dict)
    """Finished Parquet files in the working folder."""
    tables: dict[str, Any] = field(default_factory=dict)
    """Table -> `Manifest.tables`."""
    about: dict[str, Any] = field(default_factory=dict)
    """Table -> what all of its shards say."""
    statistics: dict[str, Any] = field(default_factory=dict)
    said: dict[str, list[tuple[dict[str, Any], int]]] = field(default_factory=dict)
    """Table -> what each shard says, and how many rows were taken of it."""
    texts: dict[str, pa.Array] = field(default_factory=dict)
    """Split -> keys of its generations."""
    records: dict[str, bytes] = field(default_factory=dict)
    """Of matrices: names below the version's folder -> contents."""
    matrices: dict[str, Any] = field(default_factory=dict)
    """Of each file with one: name -> what it is."""
    authors: set[str] = field(default_factory=set)
    """Ids of the models whose text or distribution is in the rows."""


def make_tables(
    store: Store, snapshots: Mapping[str, Snapshot], folder: Path, choice: Choice
) -> Made:
    """Write the rows of some splits as Parquet files into a working folder.

    Raises:
        UsageError: the choice names what is not there, or leaves nothing.
        IntegrityError: a shard is damaged or holds a row that cannot be right, or a generation is
            gone.
    """
    memory = Memory.of_user()
    for snapshot in snapshots.values():
        if choice.min_k is not None and snapshot.table != "soft_targets":
            raise UsageError(
                "--min-k: nothing was scored for this snapshot, so there are no entries. Leave "
                "it out."
            )
        _refuse_others_rows(store, snapshot)
        for file in files_of(store, snapshot):
            check_file(file, snapshot.table, memory)
    allowed = None if choice.where is None else allowed_generations(store, choice.where)
    made = Made()
    splits = [_Split(store, snapshot, split, made) for split, snapshot in snapshots.items()]
    for split in splits:
        split.choose(allowed, choice.min_k)
    made.tables = _tables(store, snapshots, made, choice.columns)
    ids: set[str] = set()
    for split in splits:
        split.write(folder, choice.min_k)
        if choice.features is not None:
            ids |= split.write_features(folder, choice.features)
    if choice.features is not None:
        _matrices(store, folder, ids, choice.features, made)
    if next(iter(snapshots)) not in made.splits:  # those that come with it may lose all of theirs
        gone = [split for split in snapshots if split not in made.splits]
        raise UsageError(
            f"export: --where and --min-k leave no row of {', '.join(gone)}. Ask for fewer "
            "entries, or for a condition that some rows meet."
        )
    written = {file.table for file in made.files.values()}
    made.tables = {table: facts for table, facts in made.tables.items() if table in written}
    made.about = {
        table: common([about for about, _ in said]) for table, said in made.said.items() if said
    } | ({"matrices": made.matrices} if made.matrices else {})
    return made


def _matrices(store: Store, folder: Path, ids: set[str], choice: FeatureChoice, made: Made) -> None:
    taken = take_matrices(store, folder, ids=ids, wanted=choice.matrices)
    made.records, made.matrices = taken.records, taken.about
    for path, name in taken.files.items():
        sha256, size = file_sha256(path), path.stat().st_size
        made.files[path] = PublishedFile(name=name, sha256=sha256, bytes=size)


def _tables(
    store: Store, snapshots: Mapping[str, Snapshot], made: Made, wanted: Sequence[str]
) -> dict[str, Any]:
    """What `Manifest.tables` says of each table.

    A table's version is that of the newest shard that gives it rows.
    """
    scored = [snapshot for snapshot in snapshots.values() if snapshot.table == "soft_targets"]
    parts = [part for snapshot in scored for part in snapshot.shards]
    abouts = {
        "generations": [about for about, _ in made.said.get("generations", [])],
        "soft_targets": [store.shard("soft_targets", part.sha256).about for part in parts],
    }
    keys = pa.chunked_array(list(made.texts.values()), KEY).combine_chunks()
    of_some = columns_of_some(store, pc.unique(keys))
    versions = {
        table: max((about["format_version"] for about in found), default=1)
        for table, found in abouts.items()
    }
    there = {
        table: published_columns(table, version, of_some) for table, version in versions.items()
    }
    return {
        table: {"columns": names, "complete": set(names) >= set(there[table])}
        | ({"format_version": versions[table]} if versions[table] > 1 else {})
        for table, names in chosen_columns(wanted, there).items()
    }


def _refuse_others_rows(store: Store, snapshot: Snapshot) -> None:
    live = {commit.shard.sha256 for commit in store.commits(snapshot.table)}
    for part in snapshot.shards:
        if part.sha256 not in live and not store.files.exists(part.name):
            raise UsageError(
                f"{store.root}: has no {part.name}, which snapshot {snapshot.id} names. If its "
                "recipe has storage.sources, export the store that the rows are in; else run "
                "`stillroom verify`."
            )


def common(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of some shards say.

    Raises:
        UsageError: they do not agree on what the numbers of their rows mean.
    """
    first = abouts[0]
    nothing = object()
    agreed = {
        name
        for name, said in first.items()
        if all(other.get(name, nothing) == said for other in abouts)
    }
    for name in _ONE_FOR_ALL:
        if name in first and name not in agreed:
            raise UsageError(
                f"export: the snapshot's rows differ in their {name}: they cannot be one dataset. "
                "A recipe in the store's place says which are meant."
            )
    return {name: first[name] for name in sorted(agreed - _OF_ONE_SHARD)}


class _Split:
    """One split on its way out."""

    _rows: int
    _keep: np.ndarray
    """Which of the snapshot's rows go along, `_rows` of them."""
    _about: list[dict[str, Any]]
    """What the shards say that hold their texts."""

    def __init__(self, store: Store, snapshot: Snapshot, split: str, made: Made) -> None:
        self._store, self._snapshot, self._split = store, snapshot, split
        self._made, self._scored = made, snapshot.table == "soft_targets"

    def choose(self, allowed: pa.Array | None, min_k: int | None) -> None:
        """Choose the rows."""
        keys, self._keep = self._chosen(allowed, min_k)
        self._rows = len(keys)
        if self._rows:
            texts = self._made.texts[self._split] = pc.unique(keys)
            said = shards_of(self._store, "generations", texts)
            self._about = self._hear("generations", said)

    def write(self, folder: Path, min_k: int | None) -> None:
        """Write the tables, keep the numbers."""
        if not self._rows:
            return
        numbers: dict[str, Any] = {}
        if self._scored and "soft_targets" in self._made.tables:
            numbers["soft_targets"] = self._targets(folder, self._keep, min_k)
        if "generations" in self._made.tables:
            texts = self._made.texts[self._split]
            numbers["generations"] = self._generations(folder, texts, common(self._about))
        if not numbers:
            raise UsageError(
                f"--columns: none is of {self._snapshot.table}, and the snapshot has no other rows."
            )
        lengths = next(iter(numbers.values()))
        self._made.statistics[self._split] = numbers
        self._made.splits[self._split] = PublishedSplit(
            snapshot=self._snapshot.id,
            table=self._snapshot.table,
            whole=min_k is None and bool(self._keep.all()),
            rows=self._rows,
            tokens=lengths["tokens"]["total"],
            scored_tokens=lengths["scored_tokens"]["total"],
        )

    def write_features(self, folder: Path, choice: FeatureChoice) -> set[str]:
        """Write the features of the split's texts, whole.

        Returns:
            The ids of the matrices that they name.
        """
        if not self._rows or not self._scored:
            return set()
        (teacher_id,) = {about["teacher_id"] for about, _ in self._made.said["soft_targets"]}
        texts = pc.unique(pa.concat_arrays(list(self._texts())))
        places = feature_places(self._store, texts, choice, teacher_id=teacher_id)
        if not places.num_rows:
            return set()
        said = shards_of_places(self._store, places)
        about = common(self._hear("features", said))
        numbers = FeatureNumbers()
        self._made.tables.setdefault("features", _WHOLE_FEATURES)
        files = self._open(folder, "features", about, counted="vectors")
        for rows in feature_rows(self._store, places):
            numbers.add(rows)
            files.add(rows)
        self._made.statistics[self._split]["features"] = numbers.numbers() | self._close(
            files, "features"
        )
        return numbers.matrices

    def _texts(self) -> Iterator[pa.Array]:
        """The text of each row that goes along, in their order."""
        before = 0
        for part in self._snapshot.shards:
            rows = part.rows[self._keep[before : before + len(part.rows)]]
            yield text_keys(self._store.shard("soft_targets", part.sha256), rows)
            before += len(part.rows)

    def _chosen(self, allowed: pa.Array | None, min_k: int | None) -> tuple[pa.Array, np.ndarray]:
        """Keys of the generations that go along, in order; which of the snapshot's rows do."""
        name = "generation_key" if self._scored else "key"
        columns = [name, "kind", "k"] if self._scored and min_k is not None else [name]
        keys, kept = [pa.array([], pa.binary(16))], [np.ones(0, bool)]
        for rows in snapshot_rows(self._store, self._snapshot, columns):
            names = rows[name].combine_chunks()
            chosen = np.ones(len(names), bool)
            if allowed is not None:
                chosen &= np.array(pc.is_in(names, value_set=allowed).to_pylist(), bool)
            if self._scored and min_k is not None:
                chosen &= can_be_cut(rows, min_k)
            keys.append(names.filter(pa.array(chosen)))
            kept.append(chosen)
        return pa.concat_arrays(keys), np.concatenate(kept)

    def _targets(self, folder: Path, keep: np.ndarray, min_k: int | None) -> dict[str, Any]:
        shards = [
            (self._store.shard("soft_targets", part.sha256), len(part.rows))
            for part in self._snapshot.shards
        ]
        about = common(self._hear("soft_targets", [(shard.about, rows) for shard, rows in shards]))
        classes = about.get("class_names")
        if min_k is not None and classes:
            raise UsageError(
                "--min-k: targets over classes are whole, they cannot be cut. Leave it out."
            )
        numbers = TargetNumbers(len(classes) if classes else int(about["vocab_size"]))
        files = self._open(folder, "soft_targets", about, counted="span_tokens")
        for rows in snapshot_rows(
            self._store, self._snapshot, PUBLISHED["soft_targets"].names, keep=keep
        ):
            rows = rows if min_k is None else cut_rows(rows, min_k)
            numbers.add(rows)
            files.add(rows)
        return numbers.numbers() | self._close(files, "soft_targets")

    def _generations(
        self, folder: Path, keys: pa.Array, about: Mapping[str, Any]
    ) -> dict[str, Any]:
        numbers = TextNumbers()
        files = self._open(folder, "generations", about, counted="completion_tokens")
        for rows in generations_of(self._store, keys):
            numbers.add(rows)
            files.add(rows)
        return numbers.numbers() | self._close(files, "generations")

    def _hear(self, table: str, said: list[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
        """Keep what shards say, for the provenance; returns it without the rows."""
        self._made.said.setdefault(table, []).extend(said)
        names = ("teacher_id", "author_id")
        self._made.authors |= {
            about[name] for about, _ in said for name in names if about.get(name)
        }
        return [about for about, _ in said]

    def _open(
        self, folder: Path, table: TableName, about: Mapping[str, Any], *, counted: str
    ) -> TableFiles:
        parts = folder / table / self._split
        parts.mkdir(parents=True)
        facts = self._made.tables[table]
        schema = pa.schema([PUBLISHED[table].field(name) for name in facts["columns"]])
        version = facts.get("format_version", 1)
        named = {"format_version": version, "table": table, "split": self._split}
        return TableFiles(
            parts,
            schema=schema,
            about={**about, **named},
            counted=counted,
            # Features are read one by one, in any order.
            group_bytes=FEATURE_GROUP_BYTES if table == "features" else None,
        )

    def _close(self, files: TableFiles, table: str) -> dict[str, Any]:
        files.close()
        for number, (path, groups) in enumerate(zip(files.paths, files.row_groups, strict=True)):
            self._made.files[path] = PublishedFile(
                name=f"{table}/{self._split}-{number:05d}-of-{len(files.paths):05d}.parquet",
                sha256=file_sha256(path),
                bytes=path.stat().st_size,
                table=table,
                split=self._split,
                rows=sum(groups),
                tokens=files.tokens[number],
                row_groups=tuple(groups),
            )
        return {"bytes": files.bytes, "rows": sum(map(sum, files.row_groups))}


def place(
    files: LocalFiles, manifest: Manifest, made: Mapping[Path, str], small: Mapping[str, bytes]
) -> None:
    """Move a version into a published folder: data and small files first, the manifest last.

    Args:
        files: The published folder.
        manifest: Of the version.
        made: Finished files on the folder's filesystem -> their names below the version's folder.
        small: Names below the version's folder -> contents.
    """
    hashes = {file.name: file.sha256 for file in manifest.files}
    for path, name in made.items():
        target = f"{manifest.version}/{name}"
        if not files.exists(target) or files.sha256(target) != hashes[name]:
            files.move_in(path, target)
    for name, content in small.items():
        put(files, f"{manifest.version}/{name}", content)
    put(files, f"{manifest.version}/{MANIFEST}", manifest.sealed())


def put(files: LocalFiles, name: str, content: bytes) -> None:
    """Give a name this content, unless it has it."""
    if not files.exists(name) or files.read(name) != content:
        files.replace(name, content)
