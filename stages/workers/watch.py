"""The watch over ranks: it says by its number which of them keeps the others waiting.

A collective that waits too long names nobody, and NCCL ends the process before Python hears of it.
So a thread of each rank writes into the store where they met that its process lives, how often the
rank has come to a meeting, and which line it is at. Where a rank has waited for nearly as long as a
collective does, a second thread of it compares what all have written.

Some work takes one rank longer than a collective waits, as where it saves the student. The others
wait for that outside of a collective, for as long as it computes, which its signs say too.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

LOOKS = 20
"""In the time that a collective waits."""
FIRST, LAST = 0.5, 0.9
"""Shares of that time: from when on signs of life are read, and when they are judged."""
COMPUTES = 1 / 500
"""Of that time, seconds of a processor that a rank at work takes at least until it is judged.

Where a collective waits ten minutes, that is 1.2 seconds in nine. A process that hangs takes less,
where threads that serve the ranks are left out.
"""
NO_SIGN = "its process has shown no sign of life"
_LOOK_SECONDS = 0.2
_THREADS = Path("/proc/self/task")

T = TypeVar("T")
Does = Literal["meets", "works", "waits"]
"""A rank meets the others at every turn; or it works by itself, and they wait, however long that
takes; or it waits so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """What a rank has written last."""

    process: str
    beats: int
    """Of its thread: they go on as long as its process does."""
    meetings: int
    """That the rank has come to."""
    at: str
    """The line it is at."""
    waits: bool
    """Whether that is one of torch's, as of all that wait in a collective."""
    does: Does = "meets"
    computed: float = 0.0
    """Seconds of a processor, all threads but those that serve the ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspicion:
    """Who keeps the others waiting."""

    ranks: tuple[int, ...]
    text: str


class Lost(Exception):
    """Another rank is gone, hangs or has failed; the text says which."""


class Watch:
    """Two threads of one rank: one asks the store, which may never answer; the other one judges."""

    def __init__(self, store: Any, *, rank: int, count: int, seconds: float) -> None:
        """`store`: torch's, a connection of its own, so that nobody else waits for it."""
        self._store, self._rank, self._count, self._seconds = store, rank, count, seconds
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._meetings = self._beats = self._moves = 0
        self._moved = self._answered = time.monotonic()
        self._signs: Mapping[int, Sign] = {}
        self._before: Mapping[int, Sign] | None = None
        self._does: Does = "meets"
        self._last: dict[int, tuple[Sign, float]] = {}
        self.serve: Collection[str] = ()
        """Threads that go on where the rank hangs: the watch, the store, torch's connections."""
        self._over, self._move = threading.Event(), threading.RLock()
        self.suspicion: Suspicion | None = None
        """Since the last meeting."""

    def begin(
        self, suspect: Callable[[Suspicion], None] | None = None, *, keeper: int | None = None
    ) -> None:
        """Watch.

        `suspect` is told; `keeper` is the rank in whose process the store is, if it is in one.
        """
        self._suspect, self._keeper = suspect, keeper
        self._write()  # before the first meeting: whoever came to that has shown a sign
        for work in (self._ask, self._judge):
            threading.Thread(target=work, daemon=True, name="stillroom-watch").start()

    def end(self) -> None:
        """Watch no more."""
        self._over.set()

    def come(self, *, further: bool) -> None:
        """The rank is at a meeting, a `further` one or still before the next; it does not hang."""
        self._meetings += further
        with self._move:
            self._moved, self._before, self.suspicion = time.monotonic(), None, None
            self._moves += 1  # last: whoever reads it finds the rest as new

    @contextmanager
    def does(self, what: Does) -> Iterator[None]:
        """The rank works by itself, or waits for one that does."""
        with self._move:
            self._last, self._does = {}, what
            self.come(further=False)
        try:
            yield
        finally:
            with self._move:
                self._does = "meets"
                self.come(further=False)

    def until(self, ask: Callable[[], T]) -> T:
        """What `ask` gives, however long it waits for the others, while those work.

        Raises:
            Lost: one of them hangs.
        """
        answer: Future[T] = Future()

        def asking() -> None:
            try:
                answer.set_result(ask())
            except Exception as error:
                answer.set_exception(error)

        with self.does("waits"):
            # The store may never answer, and then this thread has no end.
            threading.Thread(target=asking, daemon=True).start()
            while not wait_for([answer], _LOOK_SECONDS).done:
                if self.suspicion is not None:
                    raise Lost(self.suspicion.text)
            return answer.result()

    @property
    def _waited(self) -> str:
        return f"{LAST * self._seconds:.0f} s"

    def _pauses(self) -> Iterator[tuple[int, float]]:
        """After each pause, the moves so far and how long the rank has waited since.

        That is a share of a collective's time.
        """
        while not self._over.wait(self._seconds / LOOKS):
            moves = self._moves
            yield moves, (time.monotonic() - self._moved) / self._seconds

    def _ask(self) -> None:
        for _, waited in self._pauses():
            try:
                self._write()
                if waited >= FIRST or self._does == "waits":
                    self._signs = self._read()
            except RuntimeError:  # the store is gone with the process that kept it
                return self.end()
            self._answered = time.monotonic()

    def _write(self) -> None:
        self._beats += 1
        at, waits = _place()
        sign = Sign(
            process=self._process,
            beats=self._beats,
            meetings=self._meetings,
            at=at,
            waits=waits,
            does=self._does,
            computed=time.process_time() - sum(map(_seconds_of, self.serve)),
        )
        self._store.set(f"sign-{self._rank}", json.dumps(asdict(sign)))

    def _read(self) -> dict[int, Sign]:
        names = {rank: f"sign-{rank}" for rank in range(self._count)}
        there = {rank: name for rank, name in names.items() if self._store.check([name])}
        return {rank: Sign(**json.loads(self._store.get(name))) for rank, name in there.items()}

    def _judge(self) -> None:
        for moves, waited in self._pauses():
            found: Suspicion | None = None
            if self.suspicion is not None or self._does == "works":
                pass  # a rank at work waits for nobody
            elif self._does == "waits":
                found = self._idle(self._signs)
            elif waited < FIRST:
                self._signs = {}
            else:
                signs = self._signs
                before = self._before = self._before or signs
                if waited >= LAST:
                    found = self._judged(before, signs)
            if found is not None and self._suspects(found, moves) and self._suspect is not None:
                self._suspect(found)

    def _suspects(self, found: Suspicion, moves: int) -> bool:
        """Keep what was found, unless the rank has moved meanwhile: then it waits no more."""
        with self._move:
            if self._moves == moves:
                self.suspicion = found
            return self._moves == moves

    def _idle(self, signs: Mapping[int, Sign]) -> Suspicion | None:
        """Who has done nothing for as long as a collective waits, while this rank waits for it."""
        most, now = LAST * self._seconds, time.monotonic()
        if now - max(self._moved, self._answered) > most:
            return self._silent_store()
        for rank, sign in signs.items():
            last, since = self._last.get(rank, (None, now))
            if last is None or moved(last, sign, least=COMPUTES * self._seconds):
                self._last[rank] = sign, now
            elif now - since > most:
                silent = sign.beats == last.beats
                why = NO_SIGN if silent else "its process has computed nothing"
                return self._suspicion([rank], signs, why)
        return None

    def _judged(self, before: Mapping[int, Sign], signs: Mapping[int, Sign]) -> Suspicion | None:
        if not signs or time.monotonic() - self._answered > (LAST - FIRST) / 2 * self._seconds:
            return self._silent_store()
        ranks, why = suspects(before, signs)
        if not ranks:
            return None
        return self._suspicion(ranks, signs, why)

    def _suspicion(self, ranks: Sequence[int], signs: Mapping[int, Sign], why: str) -> Suspicion:
        named = "; ".join(
            f"rank {rank} ({signs[rank].process}, at {signs[rank].at})" for rank in ranks
        )
        hang = "hangs" if len(ranks) == 1 else "hang"
        text = f"{named} {hang}: {why}, and the others have waited for {self._waited}"
        return Suspicion(ranks=tuple(ranks), text=text)

    def _silent_store(self) -> Suspicion | None:
        if self._keeper in (None, self._rank):
            return None
        text = f"rank {self._keeper} hangs: it keeps the store where the ranks meet, and has not"
        return Suspicion(ranks=(self._keeper,), text=f"{text} answered for {self._waited}")


def moved(last: Sign, sign: Sign, *, least: float) -> bool:
    """Whether a rank that others wait for goes on.

    Its process lives; and it waits for others itself, or has computed for `least` seconds.
    """
    lives = sign.beats > last.beats
    return lives and (sign.does == "waits" or sign.computed - last.computed >= least)


def suspects(before: Mapping[int, Sign], signs: Mapping[int, Sign]) -> tuple[Sequence[int], str]:
    """Who keeps the others waiting, and the reason.

    It is the strongest reason that singles some of them out. While a rank that lives works by
    itself, and some wait for it, only a process without a sign of life is named: those who wait
    judge by what the rank has done.
    """
    stopped = [r for r, sign in signs.items() if r in before and sign.beats == before[r].beats]
    if 0 < len(stopped) < len(signs):  # whatever it did when it wrote its last sign
        return stopped, NO_SIGN
    if any(sign.does != "meets" for sign in signs.values()):
        return [], ""
    furthest = max(sign.meetings for sign in signs.values())
    behind = [r for r, sign in signs.items() if sign.meetings < furthest]
    at_work = [r for r, sign in signs.items() if not sign.waits]
    for ranks, why in (
        (behind, "it has not come to where the others wait"),
        (at_work, "it is not where the others wait"),
    ):
        if 0 < len(ranks) < len(signs):
            return ranks, why
    return [], ""


def threads() -> set[str]:
    """Those of this process, as Linux numbers them; none elsewhere."""
    try:
        return set(os.listdir(_THREADS))
    except OSError:
        return set()


def _seconds_of(thread: str) -> float:
    """Of a processor."""
    try:
        return int((_THREADS / thread / "schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return 0.0


def _place() -> tuple[str, bool]:
    """The line that the main thread is at, and whether it is one of torch's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end", False
    path = Path(frame.f_code.co_filename)
    name = f"{path.parent.name}/{path.name}:{frame.f_lineno}"
    return name, "torch" in path.parts
