"""Rows in an engine's hands, kept on disk: who was there when an engine died.

A row can kill the process that works on it, and then nothing in memory says which row it was. So a
stage notes each row before the engine gets it and again when it is done, in a journal in the run
folder which the living process has locked:

    +<reuse key>   the engine has it         *<reuse key>   the engine has it, and nothing else
    -<reuse key>   it came back              !              the runner saw the process die
    # ...          whose journal it is, for people

Nothing is synced: a journal survives its process, and a power cut may well clear everybody of
suspicion.

Rows in flight at a death are suspects. A death that the runner saw weighs two: the engine or the
system did it. One that took the runner along weighs one: most likely somebody killed everything,
and that must not put rows under suspicion. At a weight of two a row is tried alone, one at a time,
after everything else. A row that was alone at deaths of weight two is what kills, and is rejected.
So a row that kills the engine costs two restarts and the time of trying its neighbours alone, also
where a death takes the whole container along; and no row is rejected for what happened beside it.
"""

import os
import re
import socket
import uuid
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from ...storage.errors import EngineDied
from ...storage.files.base import explained
from ..recipe.run_folder import LOGS
from .locks import try_lock

_LINE = re.compile(r"[+*-][0-9a-f]{32}|!")
PROOF = 2  # weight of deaths, see above


def new_journal(run_dir: Path, stage: str) -> Path:
    """A name for the journal of one process."""
    return run_dir / LOGS / f"{stage}-{uuid.uuid4().hex}.inflight"


class Journal:
    """The journal of this process. It is taken away when the block ends, unless the engine died."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        with explained("cannot write", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try_lock(self._file)
        self._write([f"# process {os.getpid()} on {socket.gethostname()}"])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, EngineDied):
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    def take(self, keys: Iterable[bytes], *, alone: bool = False) -> None:
        """Rows go to the engine."""
        self._write(("*" if alone else "+") + key.hex() for key in keys)

    def done(self, keys: Iterable[bytes]) -> None:
        """Rows came back."""
        self._write(f"-{key.hex()}" for key in keys)

    def _write(self, lines: Iterable[str]) -> None:
        with explained("cannot write", self._path):
            os.write(self._file, "".join(f"{line}\n" for line in lines).encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class Flight:
    """What a journal says."""

    rows: frozenset[bytes]
    """In the engine's hands at the end."""
    alone: bool
    """Whether that was one row, by itself."""
    came_back: int
    """Rows that did not stay there."""
    seen: bool


def read_journal(path: Path) -> Flight:
    """The state at the end of a journal; one that is not there says nothing."""
    rows: dict[bytes, bool] = {}
    marks = Counter[str]()
    data = b""
    # Another worker, to which nothing is left to do, takes it away.
    with suppress(FileNotFoundError):
        data = path.read_bytes()
    for line in data.decode(errors="replace").splitlines():
        if not _LINE.fullmatch(line):  # for people, or torn by a power cut
            continue
        mark, key = line[0], bytes.fromhex(line[1:])
        marks[mark] += 1
        if mark in ("+", "*"):
            rows[key] = mark == "*"
        elif mark == "-":
            rows.pop(key, None)
    return Flight(
        rows=frozenset(rows), alone=all(rows.values()), came_back=marks["-"], seen="!" in marks
    )


def mark_seen(path: Path) -> None:
    """Note that the runner outlived the process of this journal."""
    with path.open("a") as file:
        file.write("!\n")


@dataclass(kw_only=True, slots=True)
class Suspects:
    """What the journals of dead processes say together."""

    deaths: Counter[bytes] = field(default_factory=Counter)
    """Row -> deaths at which it was in flight."""
    alone: set[bytes] = field(default_factory=set)
    """Rows to be tried alone."""
    killers: set[bytes] = field(default_factory=set)
    """Rows to be rejected."""
    journals: list[Path] = field(default_factory=list)

    def forget(self) -> None:
        """Nothing is left to do: take the journals away."""
        for path in self.journals:
            path.unlink(missing_ok=True)


def find_suspects(run_dir: Path, stage: str) -> Suspects:
    """Read the journals that dead processes of a stage left in a run folder."""
    suspects, weights, proof = Suspects(), Counter[bytes](), Counter[bytes]()
    for path in sorted((run_dir / LOGS).glob(f"{stage}-*.inflight")):
        abandoned = _abandoned(path)
        flight = read_journal(path)
        if not (flight.seen or abandoned):
            continue
        suspects.journals.append(path)
        weight = PROOF if flight.seen else 1
        for key in flight.rows:
            suspects.deaths[key] += 1
            weights[key] += weight
            proof[key] += weight * flight.alone
    suspects.alone = {key for key, weight in weights.items() if weight >= PROOF}
    suspects.killers = {key for key, weight in proof.items() if weight >= PROOF}
    return suspects


def _abandoned(path: Path) -> bool:
    """Whether its process is gone. An empty one may belong to a process that has yet to lock it."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return os.fstat(descriptor).st_size > 0 and try_lock(descriptor, shared=True) is True
    finally:
        os.close(descriptor)
