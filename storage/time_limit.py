"""A limit on the time of what others wrote and nobody sees the end of: a regular expression, a template."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_LOOK_SECONDS = 0.1  # of the whole process, at most as long as the same of this thread


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
    end = time.thread_time() + seconds

    def look(number: int, frame: FrameType | None) -> None:
        if time.thread_time() > end:
            raise TimeoutError(f"no end within {seconds:g} s of CPU time")

    handler = signal.signal(signal.SIGPROF, look)
    timer = signal.setitimer(signal.ITIMER_PROF, _LOOK_SECONDS, _LOOK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, *timer)
        signal.signal(signal.SIGPROF, handler)
