"""One worker's share of a stage's requests: claimed block by block, noted while in flight, done once.

What others committed meanwhile is left out, before a request is started and while it runs.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ...storage.errors import RowError, StillroomError
from ..ledger.books import Pending
from ..ledger.requests import reject_key
from .claims import Claims
from .job import Job
from .journal import Journal, Suspects
from .rejects import Rejects

if TYPE_CHECKING:
    from ...storage.store.writer import ShardWriter

LOOK_SECONDS = 2.0  # at least, between two looks at what others committed
LOOK_SHARE = 20  # and so many times as long as a look takes: a twentieth of the time at most


class Asked(Protocol):
    """A request."""

    @property
    def reuse_key(self) -> bytes:
        """Its name."""


R = TypeVar("R", bound=Asked)


class DoneByOthers(StillroomError):
    """Others have committed all that this worker has in flight."""


@dataclass(kw_only=True, slots=True)
class Share(Generic[R]):
    """Hands out requests until none is left in the store's books."""

    job: Job
    rows: "ShardWriter"
    rejects: "ShardWriter"
    failed: Rejects
    claims: Claims
    pending: Pending[R]
    journal: Journal
    suspects: Suspects
    limit_tokens: int
    """What the model reads at once; a part of a reject's name."""
    row_key: Callable[[R], bytes]
    """Key of the row that would serve a request."""
    reject: Callable[[R, RowError, int], dict[str, Any]]
    """The rejects row of a request, for a reason, after so many attempts."""
    _in_flight: dict[bytes, R] = field(default_factory=dict)
    _aside: dict[bytes, R] = field(default_factory=dict)
    _killers: dict[bytes, R] = field(default_factory=dict)
    _refused: int = 0
    _exhausted: bool = False
    _alone: bool = False
    _next_look: float = 0.0

    def blocks(self) -> Iterator[tuple[int, list[R]]]:
        """How many have a block already, and its requests; the next block is claimed when it is asked for."""
        blocks = self.claims.blocks(self.pending.blocks, look=self._look, left=self._left)
        yield from self.job.clock.each("disk", blocks)
        self._exhausted = True

    def one_by_one(self) -> Iterator[R]:
        """At the end: requests that may kill the engine, each when all that was done before it is committed."""
        for request in self._killers.values():
            message = "the engine's process died each time, with this row alone in the end"
            self.fail(request, RowError("engine_died", message), 0)
        self._alone = True
        for request in self._aside.values():
            self._look(True)
            yield request

    def take(self, requests: Iterable[R]) -> list[R]:
        """Requests go to the engine: those that nobody has done meanwhile."""
        taken = []
        for request in requests:
            if self._gone(request):
                self.job.progress.advance()
            else:
                taken.append(request)
                self._in_flight[request.reuse_key] = request
        with self.job.clock.span("disk"):
            self.journal.take([request.reuse_key for request in taken], alone=self._alone)
        return taken

    def done(self, requests: Iterable[R]) -> None:
        """Requests came back, whatever became of them."""
        keys = [request.reuse_key for request in requests]
        with self.job.clock.span("disk"):
            self.journal.done(keys)
        for key in keys:
            del self._in_flight[key]

    def drop(self) -> None:
        """What is in flight is left where it is: others have done it."""
        self.job.progress.advance(len(self._in_flight))
        self.done(list(self._in_flight.values()))

    def add(self, row: dict[str, Any], *, tokens: int) -> None:
        """A row is made."""
        with self.job.clock.span("disk"):
            self.rows.add(row)
        self.failed.engine_works()
        self.job.progress.advance(tokens=tokens)

    def refuse(self, request: R, error: RowError) -> None:
        """A request cannot be handed to the engine."""
        with self.job.clock.span("disk"):
            self.rejects.add(self.reject(request, error, 1))
        self._refused += 1
        self.job.progress.advance()

    def fail(self, request: R, error: RowError, attempts: int) -> None:
        """The engine failed on a request alone."""
        self.failed.add(
            self.reject(request, error, attempts + self.suspects.deaths[request.reuse_key])
        )
        self._refused += 1
        self.job.progress.advance()

    def heartbeat(self) -> None:
        """An engine can be busy for minutes before a row is finished; commits, signals and others do not wait for it.

        Raises:
            Stopped: a signal came.
            DoneByOthers: go on without what is in flight.
        """
        with self.job.clock.span("disk"):
            self.rows.tick()
            self.rejects.tick()
        self._tell()
        self.job.stop.check()
        if time.monotonic() < self._next_look:
            return
        self._look(self._exhausted)
        if self._in_flight and all(self._gone(r) for r in self._in_flight.values()):
            raise DoneByOthers

    def finish(self) -> None:
        """Everything was handed out and came back.

        Raises:
            StillroomError: every row failed.
        """
        self.failed.check()
        with self.job.clock.span("disk"):
            self.rows.flush()
            self.rejects.flush()
        self._tell()
        self.suspects.forget()

    def _tell(self) -> None:
        self.job.progress.wrote(rejects=self._refused, size=self.rows.bytes + self.rejects.bytes)

    def _look(self, commit: bool) -> None:
        """See what others committed; with `commit`, let them see what this worker has done."""
        began = time.monotonic()
        with self.job.clock.span("disk"):
            for writer in (self.rows, self.rejects):
                if commit:
                    writer.flush()
                writer.refresh()
        now = time.monotonic()
        self._next_look = now + max(LOOK_SECONDS, LOOK_SHARE * (now - began))

    def _gone(self, request: R) -> bool:
        refused = reject_key(request.reuse_key, self.limit_tokens)
        return self.rows.committed(self.row_key(request)) or self.rejects.committed(refused)

    def _left(self, block: int) -> list[R]:
        left = []
        for request in self.pending.read(block):
            key = request.reuse_key
            if self._gone(request):
                self.job.progress.advance()
            elif key in self.suspects.killers:
                self._killers[key] = request
            elif key in self.suspects.alone:
                self._aside[key] = request
            else:
                left.append(request)
        return left
