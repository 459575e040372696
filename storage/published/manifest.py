"""A published folder: versions of a dataset, the card that names the current one, MANIFESTs.

    README.md            the card; its front matter names the current version. Replaced last,
                         in one step
    v-<8 digits>/        a version, named by its content; nothing in it changes once
                         MANIFEST.json is there
        MANIFEST.json    every other file of the version with its sha256; put last
        generations/, soft_targets/    <split>-00000-of-0000N.parquet
        snapshots/, teachers/, PROVENANCE.json

`storage/published/README.md` is the format for people.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..bounds import MOST_ROWS, hexdigest, inside, integer, mapping, row_groups, string, understood
from ..errors import IntegrityError, UsageError
from ..files.base import Files
from ..files.local import LocalFiles
from ..keys import content_id, seal, unseal
from ..tables.schema import RECORD_VERSION

PUBLISHED_VERSIONS = (1, 2, 3)
"""1: rows have one span. 2: they may have several, which a reader of version 1 would not see."""
CARD, MANIFEST = "README.md", "MANIFEST.json"
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_WORD = re.compile(r"\w+", re.ASCII)
_PATH = re.compile(r"^\s*(?:- )?path: ['\"]?(v-[0-9a-f]{8})/", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """One file of a version."""

    name: str
    """Below the version's folder."""
    sha256: str
    bytes: int
    table: str | None = None
    """Of a Parquet file; the rest too."""
    split: str | None = None
    rows: int = 0
    tokens: int = 0
    """Completion tokens of generations, scored tokens of soft targets."""
    row_groups: tuple[int, ...] = ()
    """Rows of each row group."""

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "PublishedFile":
        """Read what `to_json` gave; ValueError where it is out of bounds."""
        file = cls(**said | {"row_groups": tuple(said.get("row_groups", ()))})
        if file.name == MANIFEST:
            raise ValueError(f"{MANIFEST} names itself")
        inside(file.name)
        hexdigest(file.sha256)
        # Each row has a key of 16 bytes that no codec makes shorter.
        integer(file.rows, most=min(integer(file.bytes), MOST_ROWS))
        row_groups(file.row_groups, rows=file.rows)
        integer(file.tokens)
        return file

    def to_json(self) -> dict[str, Any]:
        """What the manifest says; of a file that is no table, name, hash and size."""
        if not self.table:
            return {"name": self.name, "sha256": self.sha256, "bytes": self.bytes}
        return asdict(self) | {"row_groups": list(self.row_groups)}


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedSplit:
    """The rows of one split."""

    snapshot: str
    """Id of the snapshot that the rows were chosen from."""
    table: str
    """Of that snapshot: soft_targets, or (black box) generations."""
    whole: bool
    """Whether row n is the n-th chosen row of the snapshot, uncut; its record is then in
    `snapshots/`."""
    rows: int
    tokens: int
    """Positions: prompt and completion."""
    scored_tokens: int

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "PublishedSplit":
        """Read what `dataclasses.asdict` gave to JSON; ValueError where it is out of bounds."""
        split = cls(**said)
        inside(split.snapshot)
        string(split.table)
        if not isinstance(split.whole, bool):
            raise ValueError("whole is neither true nor false")
        for count in (split.rows, split.tokens, split.scored_tokens):
            integer(count)
        return split


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a version holds."""

    name: str
    splits: Mapping[str, PublishedSplit]
    tables: Mapping[str, Any]
    """Table -> `columns`; `complete`: whether every column that its rows have is among them;
    `format_version`, where that is not 1."""
    about: Mapping[str, Any]
    """Table -> what all of its shards said of themselves."""
    chosen: Mapping[str, Any]
    """`where`, `columns`, `min_k`: what of the snapshots was taken."""
    statistics: Mapping[str, Any]
    """Split -> numbers for the card."""
    request: str
    """Hash of all that was asked for: an equal request makes the same version."""
    files: Sequence[PublishedFile] = field(repr=False)

    @property
    def id(self) -> str:
        """Hash of the files' names and contents, of the dataset's name and of what was chosen."""
        files = {file.name: file.sha256 for file in self.files}
        return content_id("published", files=files, name=self.name, chosen=dict(self.chosen))

    @property
    def version(self) -> str:
        """Name of the version's folder."""
        return f"v-{self.id[:8]}"

    def tables_of(self, table: str, split: str) -> list[PublishedFile]:
        """The Parquet files of a table's split, in order."""
        files = [file for file in self.files if (file.table, file.split) == (table, split)]
        return sorted(files, key=lambda file: file.name)

    def sealed(self) -> bytes:
        """The manifest as the file's bytes."""
        return seal(
            {
                "format_version": RECORD_VERSION,
                "published_version": max(
                    (facts.get("format_version", 1) for facts in self.tables.values()), default=1
                ),
                "id": self.id,
                "name": self.name,
                "splits": {name: asdict(split) for name, split in self.splits.items()},
                "tables": dict(self.tables),
                "about": dict(self.about),
                "chosen": dict(self.chosen),
                "statistics": dict(self.statistics),
                "request": self.request,
                "files": [file.to_json() for file in self.files],
            }
        )

    @classmethod
    def unsealed(cls, data: bytes, name: str) -> "Manifest":
        """Read what `sealed` wrote; `name` is the file, for messages.

        Raises:
            IntegrityError: the manifest was changed, or is of another format.
        """
        record = unseal(data, name)
        versions = record.pop("format_version", None), record.pop("published_version", None)
        if versions[0] != RECORD_VERSION or versions[1] not in PUBLISHED_VERSIONS:
            raise IntegrityError(
                f"{name}: formats {versions}, this Stillroom reads {RECORD_VERSION} and "
                f"{PUBLISHED_VERSIONS}. Use the version of Stillroom that published it."
            )
        with understood(name, "manifest"):
            stated = record.pop("id")
            found = cls(**record | _parts(record))
        if found.id != stated:
            raise IntegrityError(
                f"{name}: names {stated}, its files are {found.id}. Publish it again."
            )
        return found


def _parts(record: dict[str, Any]) -> dict[str, Any]:
    """Files and splits of a manifest's record.

    Raises:
        ValueError: something of it is out of bounds.
    """
    string(record["name"])
    mapping(record["chosen"])
    mapping(record["statistics"])
    for by_table in (record["tables"], record["about"]):
        for facts in mapping(by_table).values():
            mapping(facts)
    files = [PublishedFile.from_json(mapping(file)) for file in record["files"]]
    if len({file.name for file in files}) < len(files):
        raise ValueError("it names a file twice")
    splits = mapping(record["splits"]).items()
    for name in (*record["splits"], *record["tables"], *record["about"]):
        if not _WORD.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a split or a table")
    return {
        "files": files,
        "splits": {name: PublishedSplit.from_json(mapping(said)) for name, said in splits},
    }


def current_version(card: str) -> str | None:
    """The version that a card's front matter points at.

    None: it is no card of a published folder.

    Raises:
        IntegrityError: it points at several.
    """
    front = _FRONT.match(card)
    # What comes before may hold a name of many lines; no line of one begins with a key.
    configs = f"\n{front[1]}".partition("\nconfigs:\n")[2] if front else ""
    versions = set(_PATH.findall(configs))
    if len(versions) > 1:
        raise IntegrityError(
            f"{CARD}: points at {', '.join(sorted(versions))} at once. Publish it again."
        )
    return versions.pop() if versions else None


def read_manifest(files: Files) -> Manifest:
    """The manifest of the version that a published folder's card points at.

    Raises:
        UsageError: this is no published folder.
        IntegrityError: the manifest is missing or damaged, or names what is not in the folder.
    """
    try:
        version = current_version(files.read(CARD).decode(errors="replace"))
    except FileNotFoundError:
        version = None
    if version is None:
        raise UsageError(
            f"{files.root}: not a folder that Stillroom published (no {CARD} that names a "
            "version). Check the path."
        )
    name = f"{version}/{MANIFEST}"
    try:
        found = Manifest.unsealed(files.read(name), name)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{files.root}/{name}: missing. Download the folder again, whole."
        ) from error
    if found.version != version:
        raise IntegrityError(
            f"{files.root}/{name}: is of {found.version}. Download the folder again, whole."
        )
    _refuse_links(files, found)
    return found


def _refuse_links(files: Files, manifest: Manifest) -> None:
    """A name that a link leads out of the folder is no file of it."""
    if not isinstance(files, LocalFiles):
        return
    for file in manifest.files:
        name = f"{manifest.version}/{file.name}"
        if files.leads_out(name):
            raise IntegrityError(
                f"{files.root}/{name}: a link that leads out of the folder. Download the folder "
                "again, whole, or put the file itself there."
            )


def damaged_files(files: Files, manifest: Manifest) -> list[str]:
    """Names, below the folder, of files that are missing or differ from the manifest."""
    found = []
    for file in manifest.files:
        name = f"{manifest.version}/{file.name}"
        try:
            if files.sha256(name) != file.sha256:
                found.append(name)
        except FileNotFoundError:
            found.append(name)
    return found
