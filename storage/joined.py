"""A store joined with read-only sources: other stores and published folders.

Their rows serve requests as the store's own rows do.

A store with sources is a store: what is asked of it comes from all of them, what is written goes
into its own folder. Commits of the n-th source are counted from n * `FIRST` on, so that a place
names one row of all.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from .errors import UsageError
from .files.opening import open_files
from .published.folder import Published
from .published.manifest import CARD
from .store.commits import Commit
from .store.store import MARKER, Store
from .tables.schema import TableName
from .tables.shard import ShardFile, StoredFile

FIRST = 10**8
"""A store's own numbers have eight digits."""
MOST = 20
"""Sources; a place has room for as many."""
_HUB = re.compile(r"^hf://datasets/(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/?$")


def open_store(root: Path | str, sources: Sequence[str] = (), *, update: bool = False) -> Store:
    """The store of a recipe: its own folder, which may be empty still, and its sources.

    Args:
        root: The store's folder or URL.
        sources: Folders or URLs of stores and of published folders, and
            `hf://datasets/USER/NAME[@REVISION]`.
        update: Ask the Hub what is there now; else the newest that was downloaded counts.

    Raises:
        UsageError: a source is not there, or is neither a store nor a published folder.
        IntegrityError: a source is damaged.
    """
    files = open_files(root)
    if not sources:
        return Store.from_files(files)
    own = Store(files, "") if files.empty() else Store.from_files(files)
    return Joined(own, {name: Source.open(name, update=update) for name in sources})


def at_commit(sources: Sequence[str], pinned: Mapping[str, str]) -> list[str]:
    """The same sources, those of the Hub at the commit at which they were opened.

    A source that is opened by its name is the newest that is downloaded by then, which another
    process may change.

    Args:
        sources: As the recipe names them.
        pinned: Name -> `Joined.pinned` of it.
    """
    found = []
    for name in sources:
        if name.startswith("hf://"):
            # hf: '' datasets USER NAME@COMMIT; what follows names a version inside.
            parts = pinned.get(name, name).split("/")
            name = "/".join(parts[:5])
        found.append(name)
    return found


@dataclass(frozen=True, slots=True)
class Source:
    """A read-only source, opened."""

    store: Store
    pinned: str
    """What it is and in which version, for the records: a dataset of the Hub at its commit, a
    published version."""

    @classmethod
    def open(cls, name: str, *, update: bool = False) -> "Source":
        """Open the source of this name; `update` as in `open_store`."""
        root: Path | str = name
        if name.startswith("hf://"):
            root = _downloaded(name, update=update)
            name = f"{name.partition('@')[0].rstrip('/')}@{root.name}"
        files = open_files(root)
        if files.exists(MARKER):
            return cls(Store.from_files(files), name)
        if files.exists(CARD):
            published = Published.open_folder(root)
            return cls(published, f"{name.rstrip('/')}/{published.manifest.version}")
        what = "nothing is there" if files.empty() else f"found neither {MARKER} nor {CARD}"
        raise UsageError(
            f"storage.sources: {name} is no store and no published folder ({what}). Name the "
            "folder or URL that holds one of them, or hf://datasets/USER/NAME."
        )


def _downloaded(name: str, *, update: bool) -> Path:
    """The folder of a dataset of the Hub, at one commit."""
    found = _HUB.match(name)
    if not found:
        raise UsageError(
            f"storage.sources: {name} is not the name of a dataset on the Hub. Write "
            "hf://datasets/USER/NAME, or hf://datasets/USER/NAME@REVISION."
        )
    from huggingface_hub import snapshot_download

    def download(*, offline: bool) -> Path:
        how: dict[str, Any] = {
            "repo_type": "dataset",
            "revision": found["revision"],
            "local_files_only": offline,
        }
        return Path(snapshot_download(found["name"], **how))

    try:
        return download(offline=not update)
    except Exception as error:
        try:
            return download(offline=True)  # a network that is down is no reason to stop
        except Exception:
            raise UsageError(
                f"storage.sources: {name} could not be downloaded ({type(error).__name__}: "
                f"{error}). Check the name, the revision and the network."
            ) from error


class Joined(Store):
    """A store and its sources, read as one; written are the store's own files."""

    def __init__(self, own: Store, sources: dict[str, Source]) -> None:
        super().__init__(own.files, own.id)
        if len(sources) > MOST:
            raise UsageError(
                f"storage.sources: {len(sources)} sources; expected {MOST} at most. Join some of "
                "them."
            )
        self.sources = {name: source.store for name, source in sources.items()}
        """By the name that the recipe gives them."""
        self.pinned = {name: source.pinned for name, source in sources.items()}
        """What each is, in which version."""
        self._own = own
        self._known: dict[TableName, dict[str, str]] = {}

    @property
    def parts(self) -> list[tuple[Store, int]]:
        """The store and its sources, and the number from which the commits of each are counted."""
        stores = [self._own, *self.sources.values()]
        return [(part, FIRST * number) for number, part in enumerate(stores)]

    def commits(self, table: TableName) -> list[Commit]:
        """Live commits of all of them; a shard that several have is the first one's."""
        found: dict[str, Commit] = {}
        for part, first in self.parts:
            for commit in part.commits(table):
                found.setdefault(commit.shard.sha256, replace(commit, seq=first + commit.seq))
        return list(found.values())

    def source_of(self, table: TableName, sha256: str) -> str:
        """Which source a shard is in; empty: the store's own, or none."""
        name = self._places(table).get(sha256)
        return self.pinned[name] if name else ""

    def shard(self, table: TableName, sha256: str) -> ShardFile:
        """A shard opened for reading, wherever it is."""
        name = self._places(table).get(sha256)
        return self.sources[name].shard(table, sha256) if name else super().shard(table, sha256)

    def stored(self, table: TableName, sha256: str) -> list[StoredFile]:
        """The files that a shard's rows are read from, wherever they are."""
        name = self._places(table).get(sha256)
        return self.sources[name].stored(table, sha256) if name else super().stored(table, sha256)

    def _places(self, table: TableName) -> dict[str, str]:
        """Source by shard, of those that the store does not have itself.

        It is read once: sources do not change.
        """
        if table not in self._known:
            found: dict[str, str] = {}
            for name, source in self.sources.items():
                for commit in source.commits(table):
                    found.setdefault(commit.shard.sha256, name)  # several may have it
            for commit in self._own.commits(table):
                found.pop(commit.shard.sha256, None)
            self._known[table] = found
        return self._known[table]

    def inputs(self, data_id: str) -> pa.Table | None:
        """The prompts recorded under `data_id`, here or in a source."""
        found = (part.inputs(data_id) for part, _ in self.parts)
        return next((table for table in found if table is not None), None)

    def inputs_about(self, data_id: str) -> dict[str, Any] | None:
        """What `put_inputs` was told about the data, here or in a source."""
        found = (part.inputs_about(data_id) for part, _ in self.parts)
        return next((about for about in found if about is not None), None)

    def teacher_parts(self, teacher_id: str) -> dict[str, Any]:
        """What a teacher's identity is made of; nothing if nobody knows it."""
        found = (part.teacher_parts(teacher_id) for part, _ in self.parts)
        return next((parts for parts in found if parts), {})

    def teacher_dir(self, teacher_id: str) -> Path:
        """Folder of this machine with a teacher's tokenizer, config and template."""
        known = [part for part, _ in self.parts if part.teacher_parts(teacher_id)]
        return known[0].teacher_dir(teacher_id) if known else super().teacher_dir(teacher_id)

    def prove(self, sha256: Callable[[Path], str]) -> None:
        """Hash the files of published folders.

        Those of stores have page checksums, like the store's own.
        """
        for source in self.sources.values():
            if isinstance(source, Published):
                source.prove(sha256)
