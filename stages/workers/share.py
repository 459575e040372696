"""One worker's share of a stage's requests.

It is claimed block by block, noted while in flight, and done once. What others committed meanwhile
is left out, before a request is started and while it runs.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ...storage.errors import RowError, StillroomError
from ...storage.store.store import Store
from ...storage.tables.schema import TableName
from ..ledger.books import Ledger, Pending
from ..ledger.requests import reject_key
from ..recipe.stages import stage_named
from .claims import Claims
from .job import Job, StageResult
from .journal import Journal, Suspects, find_suspects, new_journal
from .rejects import Rejects
from .shard_about import commit_limits

if TYPE_CHECKING:
    from ...storage.store.writer import ShardWriter

LOOK_SECONDS = 2.0  # at least, between two looks at what others committed
LOOK_SHARE = 20  # and so many times as long as a look takes: a twentieth of the time at most
_NAP_SECONDS = 0.2
MANY_BLOCKS = 1000  # of more than these, what others have done is not looked for row by row


class Asked(Protocol):
    """A request."""

    @property
    def reuse_key(self) -> bytes:
        """Its name."""

    @property
    def prompt_key(self) -> bytes:
        """Whose prompt it begins with."""


R = TypeVar("R", bound=Asked)


RowKeys = Mapping[TableName, Sequence[bytes]]
MadeRows = Mapping[TableName, Sequence[dict[str, Any]]]


class DoneByOthers(StillroomError):
    """Others have committed all that this worker has in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWork(Generic[R]):
    """What a stage says of the rows that it is to make."""

    stage: str
    about: dict[str, Any]
    """What its shards say of their rows."""
    ledger: Ledger
    pending: Pending[R]
    claims: Claims
    limit_tokens: int
    """What the model reads at once; a part of a reject's name."""
    row_keys: Callable[[Job, R], RowKeys]
    """Keys of the rows that are made for a request."""
    again: Callable[[], Pending[R]]
    """Asks the books anew what is pending, in the same blocks."""
    names: Callable[[Job, R], dict[str, Any]]
    """What a rejects row calls the request, besides its prompt."""
    beside: Mapping[TableName, dict[str, Any]] = field(default_factory=dict)
    """Other tables that it fills, and what their shards say of their rows."""
    beside_first: bool = False
    """Whether a row's rows in those tables are committed before it is."""
    kills: bool = True
    """Whether a row may kill the process that works on it."""
    times_rows: Mapping[TableName, int] = field(default_factory=dict)
    """Of a table whose rows are small: how many times as many a commit has."""


@contextmanager
def open_share(job: Job, store: Store, work: StageWork[R]) -> Iterator["Share[R]"]:
    """A worker's share of a stage's work, with the journal and the tables that it writes."""
    run_dir, stage = Path(job.recipe.run.dir), work.stage
    table = stage_named(stage).table
    assert table is not None
    described = {table: work.about, **work.beside, "rejects": work.about}
    usual = commit_limits(job.recipe)
    limits = {
        name: replace(usual, rows=usual.rows * work.times_rows.get(name, 1)) for name in described
    }
    with job.clock.span("start"):
        suspects = find_suspects(run_dir, stage)
        if not work.kills:
            suspects = Suspects(journals=suspects.journals)
    with ExitStack() as open_ones:
        journal = open_ones.enter_context(Journal(job.journal or new_journal(run_dir, stage)))
        tables = {
            name: open_ones.enter_context(store.writer(name, about=about, limits=limits[name]))
            for name, about in described.items()
        }
        if work.beside_first:
            for name in work.beside:
                tables[table].follows(tables[name])
        yield Share(
            job=job,
            work=work,
            tables=tables,
            rows=tables[table],
            rejects=tables["rejects"],
            journal=journal,
            suspects=suspects,
        )


@dataclass(kw_only=True, slots=True)
class Share(Generic[R]):
    """Hands out requests until none is left in the store's books."""

    job: Job
    work: StageWork[R]
    tables: dict[TableName, "ShardWriter"]
    """All that it writes, `rows` and `rejects` among them."""
    rows: "ShardWriter"
    """The stage's own table."""
    rejects: "ShardWriter"
    journal: Journal
    suspects: Suspects
    _failed: Rejects = field(init=False)
    _pending: Pending[R] = field(init=False)
    _in_flight: dict[bytes, R] = field(default_factory=dict)
    _aside: dict[bytes, R] = field(default_factory=dict)
    _killers: dict[bytes, R] = field(default_factory=dict)
    _gone_of: dict[int, int] = field(default_factory=dict)
    """Of each block that was looked at, the requests that others had done by then."""
    _refused: int = 0
    _exhausted: bool = False
    _alone: bool = False
    _next_look: float = 0.0

    def __post_init__(self) -> None:
        self._failed = Rejects(self.rejects, proven=self.work.ledger.committed > 0)
        self._pending = self.work.pending

    def rounds(self) -> Iterator[None]:
        """Go once, and then again as long as `blocks` has left work to others.

        It waits until they may need help. Nothing is in flight between two rounds.
        """
        yield
        while (wait := self.work.claims.wait) is not None:
            until = time.monotonic() + min(wait, LOOK_SECONDS)
            while (left := until - time.monotonic()) > 0:
                time.sleep(min(left, _NAP_SECONDS))
                self.heartbeat()
            yield

    def blocks(self) -> Iterator[tuple[int, list[R]]]:
        """How many have a block already, and its requests.

        The next block is claimed when it is asked for.
        """
        pending = self._pending.blocks
        blocks = self.work.claims.blocks(
            pending,
            look=self._look,
            left=self._left,
            again=self._again if len(pending) > MANY_BLOCKS else None,
        )
        yield from self.job.clock.each("disk", blocks)
        self._exhausted = True

    def one_by_one(self) -> Iterator[R]:
        """Requests that may kill the engine, at the end.

        Each is given when all that was done before it is committed.
        """
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
                self.job.progress.others()
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
        self.job.progress.others(len(self._in_flight))
        self.done(list(self._in_flight.values()))

    def add(self, made: MadeRows, *, tokens: int) -> None:
        """The rows of a request are made."""
        with self.job.clock.span("disk"):
            for table, rows in made.items():
                for row in rows:
                    self.tables[table].add(row)
        self._failed.engine_works()
        self.job.progress.advance(tokens=tokens)

    def refuse(self, request: R, error: RowError) -> None:
        """A request cannot be handed to the engine."""
        with self.job.clock.span("disk"):
            self.rejects.add(self._reject(request, error, attempts=1))
        self._refused += 1
        self.job.progress.advance()

    def fail(self, request: R, error: RowError, attempts: int) -> None:
        """The engine failed on a request alone."""
        attempts += self.suspects.deaths[request.reuse_key]
        self._failed.add(self._reject(request, error, attempts=attempts))
        self._refused += 1
        self.job.progress.advance()

    def heartbeat(self) -> None:
        """An engine can be busy for minutes before a row is finished.

        Commits, signals and others do not wait for it.

        Raises:
            Stopped: a signal came.
            DoneByOthers: go on without what is in flight.
        """
        with self.job.clock.span("disk"):
            for writer in self.tables.values():
                writer.tick()
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
        self._failed.check()
        with self.job.clock.span("disk"):
            for writer in self.tables.values():
                writer.flush()
        self._tell()
        self.suspects.forget()

    def result(self) -> StageResult:
        """What this worker committed."""
        beside = {table: self.tables[table].rows for table in self.work.beside}
        return StageResult(
            rows=self.rows.rows,
            tokens=self.rows.tokens,
            rejected=self.rejects.rows,
            details={"rows_beside": beside} if beside else {},
        )

    def _reject(self, request: R, error: RowError, *, attempts: int) -> dict[str, Any]:
        limit = self.work.limit_tokens
        row = {
            "key": reject_key(request.reuse_key, limit),
            "stage": self.work.stage,
            "prompt_key": request.prompt_key,
            "limit_tokens": limit,
            "reason": error.reason,
            "message": str(error),
            "attempts": attempts,
        }
        return row | self.work.names(self.job, request)

    def _tell(self) -> None:
        size = sum(writer.bytes for writer in self.tables.values())
        self.job.progress.wrote(rejects=self._refused, size=size)

    def _look(self, commit: bool) -> int:
        """See what others committed; with `commit`, let them see what this worker has done.

        Returns:
            Their commits since this worker began.
        """
        began = time.monotonic()
        with self.job.clock.span("disk"):
            for writer in self.tables.values():
                if commit:
                    writer.flush()
                writer.refresh()
        now = time.monotonic()
        self._next_look = now + max(LOOK_SECONDS, LOOK_SHARE * (now - began))
        return sum(writer.others for writer in self.tables.values())

    def _gone(self, request: R) -> bool:
        refused = reject_key(request.reuse_key, self.work.limit_tokens)
        if self.rejects.committed(refused):
            return True
        wanted = self.work.row_keys(self.job, request)
        return all(self.tables[table].committed(key) for table in wanted for key in wanted[table])

    def _again(self, blocks: set[int]) -> list[int]:
        """Which blocks have work still.

        The books know it of all at once, where a worker asks for each row.
        """
        self._look(True)
        before = self._pending.count(blocks)
        self._pending = self.work.again()
        self.job.progress.others(before - self._pending.count(blocks))
        return self._pending.blocks

    def _left(self, block: int) -> list[R]:
        left, gone = [], 0
        for request in self._pending.read(block):
            key = request.reuse_key
            if self._gone(request):
                gone += 1
            elif key in self.suspects.killers:
                self._killers[key] = request
            elif key in self.suspects.alone:
                self._aside[key] = request
            else:
                left.append(request)
        self.job.progress.others(gone - self._gone_of.get(block, 0))
        self._gone_of[block] = gone
        return left
