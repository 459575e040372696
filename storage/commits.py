"""The commit log of one table: numbered records, each put in place once, that say which shards exist.

Contents of a table = commit records minus retired records. Nothing else counts: a data file without a record is not
there. A writer appends by putting the next number; whoever loses that race reads the winner's record and tries again.
"""

import base64
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import IntegrityError
from .files import Files
from .keys import KEY_BYTES, seal, unseal
from .schema import FORMAT_VERSION, TableName
from .shard import ShardInfo, shard_name

_NUMBERED = re.compile(r"^\d{8}\.json$")


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit record."""

    table: TableName
    seq: int
    writer: str
    """Which writer made it (a uuid)."""
    shard: ShardInfo
    keys: tuple[bytes, ...]
    """Key of each row of the shard, in order."""
    tokens: int
    """Completion tokens of generations, scored tokens of soft targets."""
    seconds: float
    """Since the writer's previous commit."""
    stage: str
    versions: Mapping[str, str]
    created: str
    """For people; nothing depends on it."""


def record_name(table: str, seq: int, *, folder: str = "commits") -> str:
    """Where a record lies, below the store."""
    return f"{folder}/{table}/{seq:08d}.json"


def numbers(files: Files, table: str, *, folder: str = "commits") -> list[int]:
    """Sequence numbers that a listing shows."""
    return [int(name[:8]) for name in files.names(f"{folder}/{table}") if _NUMBERED.match(name)]


class CommitLog:
    """The records of one table as known so far."""

    def __init__(self, files: Files, table: TableName) -> None:
        self._files = files
        self.table: TableName = table
        self._next = 0
        self._live: dict[int, Commit] = {}
        self._retired: set[int] = set()
        self.keys: set[bytes] = set()
        """Keys of every live row."""

    def refresh(self) -> list[Commit]:
        """Read what is new and return the live commits, oldest first."""
        retired = set(numbers(self._files, self.table, folder="retired"))
        last = max([*numbers(self._files, self.table), *retired], default=-1)  # a withdrawn number is never used again
        # A listing made while others commit may leave a number out below the last: ask for every number by name.
        for seq in range(self._next, last + 1):
            if (commit := read_commit(self._files, self.table, seq)) is not None:
                self._add(commit)
        self._next = max(self._next, last + 1)
        if retired != self._retired:
            for seq in retired - self._retired:
                read_retired(self._files, self.table, seq)
            self._retired = retired
            self._live = {seq: commit for seq, commit in self._live.items() if seq not in retired}
            self.keys = {key for commit in self._live.values() for key in commit.keys}
        return [self._live[seq] for seq in sorted(self._live)]

    def append(self, fields: Mapping[str, Any], shard: ShardInfo, keys: Iterable[bytes]) -> Commit | None:
        """Try the next number. None: another writer took it; its records are read, look at `keys` and try again."""
        commit = Commit(
            table=self.table,
            seq=self._next,
            shard=shard,
            keys=tuple(keys),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **fields,
        )
        if not self._files.put_if_absent(record_name(self.table, commit.seq), seal(_to_json(commit))):
            self.refresh()
            return None
        self._add(commit)
        self._next += 1
        return commit

    def _add(self, commit: Commit) -> None:
        if commit.seq not in self._retired:
            self._live[commit.seq] = commit
            self.keys.update(commit.keys)


def retire(files: Files, table: TableName, seq: int, *, reason: str) -> bool:
    """Withdraw a commit: its rows are no longer in the store. False if it was withdrawn before."""
    record = {"format_version": FORMAT_VERSION, "table": table, "seq": seq, "reason": reason}
    return files.put_if_absent(record_name(table, seq, folder="retired"), seal(record))


def read_commit(files: Files, table: TableName, seq: int) -> Commit | None:
    """One record, checked; None if there is none under this number."""
    name = record_name(table, seq)
    try:
        record = unseal(files.read(name), name)
    except FileNotFoundError:
        return None
    _check_name(record, name, table=table, seq=seq)
    try:
        commit = _from_json(record)
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{name}: not a commit record of this format ({error!r}). Restore the file.") from error
    shard = commit.shard
    if not len(commit.keys) == shard.rows == sum(shard.row_groups) or shard.name != shard_name(table, shard.sha256):
        raise IntegrityError(f"{name}: the record contradicts itself about its shard. Restore the file from a backup.")
    return commit


def read_retired(files: Files, table: TableName, seq: int) -> None:
    """Check the record that withdraws a commit."""
    name = record_name(table, seq, folder="retired")
    _check_name(unseal(files.read(name), name), name, table=table, seq=seq)


def _check_name(record: dict[str, Any], name: str, *, table: str, seq: int) -> None:
    if record.get("format_version") != FORMAT_VERSION:
        raise IntegrityError(
            f"{name}: format version {record.get('format_version')}, this Stillroom reads {FORMAT_VERSION}. "
            "Use the version of Stillroom that wrote the store."
        )
    if (record.get("table"), record.get("seq")) != (table, seq):
        raise IntegrityError(
            f"{name}: the record inside is {record.get('table')} {record.get('seq')}: it was copied or renamed. "
            "Restore the file from a backup."
        )


def _to_json(commit: Commit) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "table": commit.table,
        "seq": commit.seq,
        "writer": commit.writer,
        "shard": asdict(commit.shard),
        "keys": base64.b64encode(b"".join(commit.keys)).decode(),
        "tokens": commit.tokens,
        "seconds": commit.seconds,
        "stage": commit.stage,
        "versions": dict(commit.versions),
        "created": commit.created,
    }


def _from_json(record: dict[str, Any]) -> Commit:
    joined = base64.b64decode(record["keys"])
    keys = tuple(joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES))
    fields = {name: value for name, value in record.items() if name != "format_version"}
    return Commit(**{**fields, "keys": keys, "shard": ShardInfo.from_json(record["shard"])})
