"""The watch over ranks: it says by its number which of them keeps the others waiting.

A collective that waits too long names nobody, and NCCL ends the process before Python hears of it.
So a thread of each rank writes into the store where they met that its process lives, how often the
rank has come to a meeting, and which line it is at. Where a rank has waited for nearly as long as a
collective does, its thread compares what all have written.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOOKS = 20
"""In the time that a collective waits."""
FIRST, LAST = 0.5, 0.9
"""Shares of that time: from when on signs of life are read, and when they are judged."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspicion:
    """Who keeps the others waiting."""

    ranks: tuple[int, ...]
    text: str


class Watch:
    """Two threads of one rank: one asks the store, which may never answer; the other one judges."""

    def __init__(self, store: Any, *, rank: int, count: int, seconds: float) -> None:
        """`store`: torch's, a connection of its own, so that nobody else waits for it."""
        self._store, self._rank, self._count, self._seconds = store, rank, count, seconds
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._meetings = self._beats = 0
        self._moved = self._answered = time.monotonic()
        self._signs: Mapping[int, Sign] = {}
        self._before: Mapping[int, Sign] | None = None
        self._over = threading.Event()
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
        self._moved, self._before, self.suspicion = time.monotonic(), None, None

    def _pauses(self) -> Iterator[float]:
        """After each pause, the share of a collective's time that the rank has waited."""
        while not self._over.wait(self._seconds / LOOKS):
            yield (time.monotonic() - self._moved) / self._seconds

    def _ask(self) -> None:
        for waited in self._pauses():
            try:
                self._write()
                if waited >= FIRST:
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
        )
        self._store.set(f"sign-{self._rank}", json.dumps(asdict(sign)))

    def _read(self) -> dict[int, Sign]:
        names = {rank: f"sign-{rank}" for rank in range(self._count)}
        there = {rank: name for rank, name in names.items() if self._store.check([name])}
        return {rank: Sign(**json.loads(self._store.get(name))) for rank, name in there.items()}

    def _judge(self) -> None:
        for waited in self._pauses():
            if waited < FIRST:
                self._signs = {}
                continue
            signs = self._signs
            before = self._before = self._before or signs
            if waited >= LAST and self.suspicion is None:
                found = self.suspicion = self._judged(before, signs)
                if found is not None and self._suspect is not None:
                    self._suspect(found)

    def _judged(self, before: Mapping[int, Sign], signs: Mapping[int, Sign]) -> Suspicion | None:
        waited = f"{LAST * self._seconds:.0f} s"
        if not signs or time.monotonic() - self._answered > (LAST - FIRST) / 2 * self._seconds:
            if self._keeper in (None, self._rank):
                return None
            text = (
                f"rank {self._keeper} hangs: it keeps the store where the ranks meet, and has not"
            )
            return Suspicion(ranks=(self._keeper,), text=f"{text} answered for {waited}")
        ranks, why = suspects(before, signs)
        if not ranks:
            return None
        named = "; ".join(
            f"rank {rank} ({signs[rank].process}, at {signs[rank].at})" for rank in ranks
        )
        hang = "hangs" if len(ranks) == 1 else "hang"
        return Suspicion(
            ranks=tuple(ranks),
            text=f"{named} {hang}: {why}, and the others have waited for {waited}",
        )


def suspects(before: Mapping[int, Sign], signs: Mapping[int, Sign]) -> tuple[Sequence[int], str]:
    """Who keeps the others waiting, and the reason.

    It is the strongest reason that singles some of them out.
    """
    stopped = [r for r, sign in signs.items() if r in before and sign.beats == before[r].beats]
    furthest = max(sign.meetings for sign in signs.values())
    behind = [r for r, sign in signs.items() if sign.meetings < furthest]
    at_work = [r for r, sign in signs.items() if not sign.waits]
    for ranks, why in (
        (stopped, "its process has shown no sign of life"),
        (behind, "it has not come to where the others wait"),
        (at_work, "it is not where the others wait"),
    ):
        if 0 < len(ranks) < len(signs):
            return ranks, why
    return [], ""


def _place() -> tuple[str, bool]:
    """The line that the main thread is at, and whether it is one of torch's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end", False
    path = Path(frame.f_code.co_filename)
    name = f"{path.parent.name}/{path.name}:{frame.f_lineno}"
    return name, "torch" in path.parts
