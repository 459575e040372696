"""How many calls an endpoint is given at once.

There are fewer when it says that they are too many, and then one more at a time.

Additive increase, multiplicative decrease (Chiu and Jain 1989), as TCP does it: a refusal halves
the limit, and so many answers as the limit is raise it by one. Refusals of calls that had begun
before the last halving say nothing new.
"""

import threading
import time


class Throttle:
    """The limit of one process; threads may tell it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._halvings = 0
        self._not_before = 0.0
        self._lock = threading.Lock()
        self.answers = 0
        """Calls that were answered so far."""
        self.lowest = most
        """The smallest limit that there was."""

    @property
    def limit(self) -> int:
        """Calls at once, now."""
        return int(self._limit)

    @property
    def wait_seconds(self) -> float:
        """How long no other call may begin."""
        return max(0.0, self._not_before - time.monotonic())

    def begins(self) -> int:
        """A call begins; `refused` is told what this returns."""
        return self._halvings

    def answered(self) -> None:
        """A call came back."""
        with self._lock:
            self.answers += 1
            self._limit = min(self._most, self._limit + 1 / self._limit)

    def refused(self, began: int, wait_seconds: float) -> None:
        """The endpoint has too many calls; `wait_seconds`: none is to begin so long."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + wait_seconds)
            if began == self._halvings:
                self._halvings += 1
                self._limit = max(1.0, self._limit / 2)
                self.lowest = min(self.lowest, self.limit)
