"""Being stopped: which signals ask for it, and how a statement that is at work ends.

While DuckDB works in the thread that hears signals, they wait for it, and what their handlers raise
is lost. Here that thread only waits: a handler runs at once, and DuckDB is interrupted by what it
raises, or, where it raises nothing, by `stop_statements`.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import Noticed, Stopped

T = TypeVar("T")
_PATIENCE_SECONDS = 0.5  # for an interrupted statement; a function of one huge value never looks up
_LOOK_SECONDS = 0.02
_HEAR_SECONDS = 0.1
REQUEUE = "STILLROOM_REQUEUE"
"""Set to anything where SIGTERM is a scheduler's notice; Slurm's jobs are known by SLURM_JOB_ID."""
_working: set["_Statement"] = set()


def stop_signals() -> list[signal.Signals]:
    """What asks a command to stop; the terminal's end does not where `nohup` had it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


def stopped_by(number: int) -> Stopped:
    """What a command ends with that this signal stopped."""
    scheduled = os.environ.get("SLURM_JOB_ID") or os.environ.get(REQUEUE)
    return Noticed() if number == signal.SIGTERM and scheduled else Stopped()


class _Statement(threading.Thread):
    """Work of one connection. A daemon: one that cannot be interrupted keeps no process alive."""

    def __init__(self, connection: Any, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name="stillroom-sql")
        self._connection, self._work = connection, work
        self.over = threading.Event()
        """That it ended, or was given up."""
        self.stopped = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error
        self.over.set()

    def stop(self) -> None:
        """Interrupt it until it ends: an interrupt between two steps of it is not heard."""
        self.stopped = True
        for _ in range(round(_PATIENCE_SECONDS / _LOOK_SECONDS)):
            if self.over.wait(_LOOK_SECONDS):
                break
            self._connection.interrupt()
        self.over.set()


def stoppable(connection: Any, work: Callable[[], T]) -> T:
    """What `work` returns. This connection does nothing else meanwhile.

    Errors of `work` are raised here.

    Raises:
        Stopped: `stop_statements` was called.
    """
    statement = _Statement(connection, work)
    _working.add(statement)
    try:
        statement.start()
        while not statement.over.wait(_HEAR_SECONDS):
            pass  # a signal that another thread got waits for this one to wake up
    except BaseException:  # what the handler of a signal raised
        statement.stop()
        raise
    finally:
        _working.discard(statement)
    if statement.stopped:
        raise Stopped()
    if statement.error is not None:
        raise statement.error
    result: T = statement.result
    return result


def at_work() -> bool:
    """Whether a statement that was given up still works.

    Then the process can only end without waiting for it.
    """
    return any(isinstance(thread, _Statement) for thread in threading.enumerate())


def stop_statements() -> None:
    """Interrupt every statement of this process, for a signal handler that raises nothing."""
    for statement in list(_working):
        statement.stop()
