"""Forward passes made ahead.

A thread reads, packs and copies to the device while the passes before are computed.

The order is that of the steps, with or without the thread. At most `AHEAD` things wait, and while
passes that wait hold more than `AHEAD_BYTES` no other is made: so many bytes and one pass, on the
device and again in page-locked memory. A pass of 8,192 tokens with 100 entries each has 10 MB; with
full targets of V = 65,536 it has 2.1 GB, and one waits. What was made ahead plays no part in where
a run stands: that is the cursor of the step that was taken last. Copies go to the stream that
computes, behind what is queued there, so nothing has to be synchronised; at 10 MB a pass they are
short.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from threading import Condition
from types import TracebackType
from typing import Any, Self

from ..workers.clock import Clock
from .samples import Step

AHEAD = 4
"""Things that wait at most: a step, its passes one by one, its end."""
AHEAD_BYTES = 256 * 2**20
"""While what waits holds more, nothing is made."""
THREAD_NAME = "stillroom-prefetch"

_END = object()


class Prefetch:
    """The steps of an iterable, in order, and the passes of each.

    with Prefetch(steps, make) as feed:
        for step in feed:
            for batch in feed.passes(): ...

    What `steps` or `make` raise is raised where it would have been without the thread.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        make: Callable[[Step], Iterable[Any]],
        *,
        clock: Clock | None = None,
    ) -> None:
        """Begin to read.

        Args:
            steps: What is trained on.
            make: The passes of a step, on the device; called in a thread, one step after the other.
                What has no `nbytes` counts as holding nothing.
            clock: What the caller waits for is charged to its "disk": reading and decoding, and
                packing behind it.
        """
        self._steps, self._make, self._clock = iter(steps), make, clock or Clock()
        self._taken: deque[Step] = deque()  # from the current step to the last one that was read
        self._asked = self._ended = False
        self._broken: Exception | None = None
        self._room = Condition()  # guards the next two
        self._held, self._stopping = 0, False
        self.waited_seconds = 0.0
        """What the caller spent waiting, because nothing was ready."""
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def __iter__(self) -> Iterator[Step]:
        while (step := self._next()) is not None:
            self._asked = self._ended = False
            yield step
            while not self._ended:  # passes that nobody wanted
                self._ended = self._next() is _END
            self._taken.popleft()

    def passes(self) -> Iterator[Any]:
        """Those of the current step.

        Asked for again they are made again, and so are those of the steps that follow.
        """
        if self._asked:
            self._stop()
            self._start()
            self._next()
        self._asked, self._ended = True, False
        while (batch := self._next()) is not _END:
            yield batch
        self._ended = True

    def _next(self) -> Any:
        began = time.perf_counter()
        try:
            with self._clock.span("disk"):
                thing = self._waiting.popleft().result()
            with self._room:
                self._held -= _bytes(thing)
                self._room.notify()
            return thing
        finally:
            self.waited_seconds += time.perf_counter() - began
            self._waiting.append(self._thread.submit(self._one_more))

    def _start(self) -> None:
        self._held, self._stopping = 0, False
        self._made = self._all(chain(tuple(self._taken), self._read()))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
        self._waiting: deque[Future[Any]] = deque()
        for _ in range(AHEAD):
            self._waiting.append(self._thread.submit(self._one_more))

    def _one_more(self) -> Any:
        """What comes next, once there is room for it; the thread calls this."""
        with self._room:
            self._room.wait_for(lambda: self._stopping or self._held <= AHEAD_BYTES)
            if self._stopping:
                return None
        thing = next(self._made, None)
        with self._room:
            self._held += _bytes(thing)
        return thing

    def _all(self, steps: Iterable[Step]) -> Iterator[Any]:
        for step in steps:
            yield step
            yield from self._make(step)
            yield _END

    def _stop(self) -> None:
        with self._room:
            self._stopping = True
            self._room.notify()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()

    def _read(self) -> Iterator[Step]:
        """Steps that were not read yet, which are noted.

        What ended the reading is raised again whenever a step is asked for.
        """
        if self._broken is not None:
            raise self._broken
        try:
            for step in self._steps:
                self._taken.append(step)
                yield step
        except Exception as error:
            self._broken = error
            raise


def _bytes(thing: Any) -> int:
    return getattr(thing, "nbytes", 0)
