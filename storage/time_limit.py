"""A limit on the time of what others wrote and nobody sees the end of.

That is a regular expression or a template.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_LOOK_SECONDS = 0.1  # of the whole process, at most as long as the same of this thread
_AGAIN_SECONDS = 1.0
_ends: list[float] = []


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this block where it takes more of this thread's CPU time than that.

    Python hears signals between two steps of its own and, every few thousand steps, inside a
    regular expression. One huge step (a text times 10**9) is not ended. In another thread than the
    main one, which hears no signals, nothing is.

    Raises:
        TimeoutError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # The handler stays: a signal on its way to another thread would end the process without one.
    if signal.getsignal(signal.SIGPROF) is not _look:
        signal.signal(signal.SIGPROF, _look)
    _ends.append(time.thread_time() + seconds)
    timer = signal.setitimer(signal.ITIMER_PROF, _LOOK_SECONDS, _LOOK_SECONDS)
    try:
        yield
    finally:
        _ends.pop()
        signal.setitimer(signal.ITIMER_PROF, *timer)


def _look(number: int, frame: FrameType | None) -> None:
    if _ends and time.thread_time() > _ends[-1]:
        _ends[-1] += _AGAIN_SECONDS  # once, and again only where somebody swallowed it
        raise TimeoutError("no end within its time")
