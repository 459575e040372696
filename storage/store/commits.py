"""The commit log of one table: numbered records that say which shards exist.

Each is put in place once.

The contents of a table are its commit records minus the retired ones. Nothing else counts: a data
file without a record is not there. A writer appends by putting the next number; whoever loses that
race reads the winner's record and tries again.
"""

import base64
import json
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Any

from ..bounds import integer, mapping, string, understood
from ..errors import IntegrityError
from ..files.base import Files
from ..keys import KEY_BYTES, KeySet, seal, unseal
from ..tables.schema import RECORD_VERSION, TableName
from ..tables.shard import ShardInfo, shard_name

_AT_ONCE = 256  # records read together: an object store answers many requests in the time of one
_NEWEST = 1024  # commits that a writer keeps in memory, of what may be hundreds of thousands
_NUMBERED = re.compile(r"[0-9]{8}\.json")
_FEW = 1024  # numbers that may be missing, whatever is there


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit record."""

    table: TableName
    seq: int
    writer: str
    """Which writer made it (a uuid)."""
    shard: ShardInfo
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
    """Sequence numbers that a listing shows.

    Raises:
        IntegrityError: as `missing` does.
    """
    found = listed(files, table, folder)
    if _too_many(found):  # without what the other folder has, which is asked for then only
        missing(table, {at: set(listed(files, table, at)) for at in ("commits", "retired")})
    return found


def listed(files: Files, table: str, folder: str) -> list[int]:
    """Sequence numbers that a listing shows, however far from one another."""
    names = files.names(f"{folder}/{table}")
    return [int(name[:8]) for name in names if _NUMBERED.fullmatch(name)]


def missing(table: str, shown: Mapping[str, Collection[int]]) -> list[int]:
    """Numbers below the last one that no listing shows; `shown`: what they show, by folder.

    Records are numbered without gaps. A few may be missing: lost ones, and those that were put
    while the folder was listed. More than there are of others means that a record is not where its
    writer put it, and nobody asks for a hundred million names because one file has a high number.

    Raises:
        IntegrityError: so many are missing; names the record above the widest gap.
    """
    there = sorted(set().union(*shown.values()))
    if _too_many(there):
        below, above = _widest_gap(there)
        folder = next(folder for folder, seqs in shown.items() if above in seqs)
        raise IntegrityError(
            f"{record_name(table, above, folder=folder)}: {above - below - 1} numbers before this "
            "record have none, and records are numbered without gaps. Delete this file if it does "
            "not belong here; else restore the others from a backup."
        )
    return [seq for below, above in pairwise([-1, *there]) for seq in range(below + 1, above)]


def near(seqs: Iterable[int]) -> list[int]:
    """Of the numbers of records, ascending, those below the records that `missing` would refuse."""
    there = sorted(seqs)
    while _too_many(there):
        below, _ = _widest_gap(there)
        there = [seq for seq in there if seq <= below]
    return there


def _widest_gap(there: Sequence[int]) -> tuple[int, int]:
    """Of ascending numbers the two between which most are missing."""
    return max(pairwise([-1, *there]), key=lambda gap: gap[1] - gap[0])


def _too_many(there: Sequence[int]) -> bool:
    """Whether more numbers are missing below the highest of some ascending ones than may be."""
    last = there[-1] if there else -1
    return last + 1 - len(there) > len(there) + _FEW


class CommitLog:
    """The records of one table as known so far."""

    def __init__(self, files: Files, table: TableName, *, track_keys: bool = False) -> None:
        """`track_keys`: keep the keys of all live rows, as a writer must."""
        self._files = files
        self.table: TableName = table
        self.next = 0
        """The number after the newest commit known."""
        self._live: dict[int, Commit] = {}
        self._retired: set[int] = set()
        self._track_keys = track_keys
        self.keys = KeySet()
        """Keys of every live row, where they are tracked."""

    def refresh(self) -> list[Commit]:
        """List what there is, read what is new, and return the live commits, oldest first.

        Of a log that keeps keys, only the newest.
        """
        retired = set(listed(self._files, self.table, "retired"))
        committed = set(listed(self._files, self.table, "commits"))
        # A listing made while others commit may leave a number out below the last: ask for those
        # by name.
        lost = missing(self.table, {"commits": committed, "retired": retired})
        fresh = retired - self._retired
        for seq in fresh:
            read_retired(self._files, self.table, seq)
        if any(seq < self.next for seq in fresh):
            # Rare: read all again, without what was withdrawn.
            self.next, self._live, self.keys = 0, {}, KeySet()
        self._retired = retired
        # A withdrawn number is never used again.
        last = max([*committed, *retired], default=-1)
        self._read(sorted(seq for seq in committed.union(lost) if seq >= self.next))
        self.next = max(self.next, last + 1)
        return self.live(0)

    def live(self, first: int) -> list[Commit]:
        """The live commits known, oldest first, from a number on."""
        return [self._live[seq] for seq in range(first, self.next) if seq in self._live]

    def advance(self) -> None:
        """Read the records that follow those known, asking for them by name.

        That is cheap, but blind to withdrawals.
        """
        self._follow(1)

    def _follow(self, ahead: int) -> None:
        """Ask for so many records at once, for twice as many if all are there, and so on."""
        while True:
            names = [record_name(self.table, self.next + n) for n in range(ahead)]
            found = self._files.read_many(names)
            # Beyond one that is not there, one may be that came meanwhile: it is for the next look.
            there = list(takewhile(found.__contains__, names))
            seqs = range(self.next, self.next + len(there))
            pairs = zip(there, seqs, strict=True)
            self._add([_read_record(found[name], self.table, seq) for name, seq in pairs])
            self.next += len(there)
            if len(there) < ahead:
                return
            ahead = min(2 * ahead, _AT_ONCE)

    def append(
        self, fields: Mapping[str, Any], shard: ShardInfo, keys: Iterable[bytes]
    ) -> Commit | None:
        """Try the next number.

        None: another writer took it; its records are read, look at `keys` and try again.
        """
        commit = Commit(
            table=self.table,
            seq=self.next,
            shard=shard,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **fields,
        )
        joined = b"".join(keys)
        record = seal(_to_json(commit, joined))
        if not self._files.put_if_absent(record_name(self.table, commit.seq), record):
            self._follow(2)  # the winner's, and whether there are more
            return None
        if self._files.exists(record_name(self.table, commit.seq, folder="retired")):
            # `repair` gave this number up while no record was there: nothing stands under it.
            self.refresh()
            return None
        self._add([(commit, joined)])
        self.next += 1
        return commit

    def _read(self, seqs: Iterable[int]) -> None:
        wanted = [seq for seq in seqs if seq not in self._retired]
        for start in range(0, len(wanted), _AT_ONCE):
            names = {record_name(self.table, seq): seq for seq in wanted[start : start + _AT_ONCE]}
            found = self._files.read_many(list(names))
            for name, seq in names.items():  # one after the other: large ones have many keys
                if name in found:
                    self._add([_read_record(found.pop(name), self.table, seq)])

    def _add(self, records: Sequence[tuple[Commit, bytes]]) -> None:
        live = [(commit, joined) for commit, joined in records if commit.seq not in self._retired]
        self._live |= {commit.seq: commit for commit, _ in live}
        if self._track_keys:
            self.keys.update(b"".join(joined for _, joined in live))
            if len(self._live) > 2 * _NEWEST:
                self._live = dict(list(self._live.items())[-_NEWEST:])


def retire(files: Files, table: TableName, seq: int, *, reason: str) -> bool:
    """Withdraw a commit: its rows are no longer in the store. False if it was withdrawn before."""
    return files.put_if_absent(
        record_name(table, seq, folder="retired"), withdrawal(table, seq, reason=reason)
    )


def withdrawal(table: TableName, seq: int, *, reason: str) -> bytes:
    """The record that withdraws a commit."""
    return seal({"format_version": RECORD_VERSION, "table": table, "seq": seq, "reason": reason})


def read_commit(files: Files, table: TableName, seq: int) -> tuple[Commit, bytes] | None:
    """One record, checked, and the keys of its rows, 16 bytes each.

    None: there is none under this number.
    """
    try:
        return _read_record(files.read(record_name(table, seq)), table, seq)
    except FileNotFoundError:
        return None


def _read_record(data: bytes, table: TableName, seq: int) -> tuple[Commit, bytes]:
    name = record_name(table, seq)
    record = unseal(data, name)
    _check_name(record, name, table=table, seq=seq)
    with understood(name, "commit record"):
        commit, keys = _from_json(record)
    shard = commit.shard
    if len(keys) != shard.rows * KEY_BYTES or shard.name != shard_name(table, shard.sha256):
        raise IntegrityError(
            f"{name}: the record contradicts itself about its shard. Restore the file from a "
            "backup."
        )
    return commit, keys


def read_retired(files: Files, table: TableName, seq: int) -> None:
    """Check the record that withdraws a commit."""
    name = record_name(table, seq, folder="retired")
    _check_name(unseal(files.read(name), name), name, table=table, seq=seq)


def _check_name(record: dict[str, Any], name: str, *, table: str, seq: int) -> None:
    if record.get("format_version") != RECORD_VERSION:
        raise IntegrityError(
            f"{name}: format version {record.get('format_version')}, this Stillroom reads "
            f"{RECORD_VERSION}. Use the version of Stillroom that wrote the store."
        )
    if (record.get("table"), record.get("seq")) != (table, seq):
        raise IntegrityError(
            f"{name}: the record inside is {record.get('table')} {record.get('seq')}: it was "
            "copied or renamed. Restore the file from a backup."
        )


def _to_json(commit: Commit, keys: bytes) -> dict[str, Any]:
    return {
        "format_version": RECORD_VERSION,
        "table": commit.table,
        "seq": commit.seq,
        "writer": commit.writer,
        "shard": asdict(commit.shard),
        "keys": base64.b64encode(keys).decode(),
        "tokens": commit.tokens,
        "seconds": commit.seconds,
        "stage": commit.stage,
        "versions": dict(commit.versions),
        "created": commit.created,
    }


@lru_cache(maxsize=64)
def _shared(versions: str) -> Mapping[str, Any]:
    """One mapping for all records that say the same: there may be hundreds of thousands."""
    return mapping(json.loads(versions))


def _from_json(record: dict[str, Any]) -> tuple[Commit, bytes]:
    fields = {name: record[name] for name in record.keys() - {"format_version", "keys"}}
    fields["shard"] = ShardInfo.from_json(mapping(record["shard"]))
    for name in ("writer", "stage", "created"):
        string(record[name])
    integer(record["tokens"])
    if type(record["seconds"]) not in (int, float) or not abs(record["seconds"]) < 2**53:
        raise ValueError("seconds are not a number")
    fields["versions"] = _shared(json.dumps(mapping(record["versions"])))
    return Commit(**fields), base64.b64decode(string(record["keys"]))
