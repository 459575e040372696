"""Forward passes made ahead: a thread reads, packs and copies to the device while the passes before are computed.

The order is that of the steps, with or without the thread; at most `AHEAD` things wait. What was made ahead plays no
part in where a run stands: that is the cursor of the step that was taken last. Copies go to the stream that computes,
behind what is queued there: at some megabytes a pass they are short, and nothing has to be synchronised.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from types import TracebackType
from typing import Any, Self

from .clock import Clock
from .samples import Step

AHEAD = 4
"""Things that wait at most: a step, its passes one by one, its end."""
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
        self, steps: Iterable[Step], make: Callable[[Step], Iterable[Any]], *, clock: Clock | None = None
    ) -> None:
        """Begin to read.

        Args:
            steps: What is trained on.
            make: The passes of a step, on the device; called in a thread, one step after the other.
            clock: What the caller waits for is charged to its "disk": reading and decoding, and packing behind it.
        """
        self._steps, self._make, self._clock = iter(steps), make, clock or Clock()
        self._taken: deque[Step] = deque()  # from the current step to the last one that was read
        self._asked = self._ended = False
        self.waited_seconds = 0.0
        """What the caller spent waiting, because nothing was ready."""
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
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
        """Those of the current step. Asked for again they are made again, and so are those of the steps that follow."""
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
                return self._waiting.popleft().result()
        finally:
            self.waited_seconds += time.perf_counter() - began
            self._waiting.append(self._thread.submit(next, self._made, None))

    def _start(self) -> None:
        self._made = self._all(chain(tuple(self._taken), _noted(self._steps, self._taken)))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
        self._waiting: deque[Future[Any]] = deque()
        for _ in range(AHEAD):
            self._waiting.append(self._thread.submit(next, self._made, None))

    def _all(self, steps: Iterable[Step]) -> Iterator[Any]:
        for step in steps:
            yield step
            yield from self._make(step)
            yield _END

    def _stop(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()


def _noted(steps: Iterator[Step], into: deque[Step]) -> Iterator[Step]:
    for step in steps:
        into.append(step)
        yield step
