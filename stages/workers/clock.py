"""Where the seconds of a stage go: the wall time of its main thread, split by what it was spent on.

    with clock.span("model"):
        logits = model(ids)

At every moment one name is charged: that of the innermost span, "other" outside of all. So the
seconds of all names together are the wall time. What runs beside the main thread, such as writes
that overlap with the model, costs no wall time and is not counted. A GPU works behind the calls
that start it: there, seconds are those of waiting for it.

A span must end before its function yields; `each` is for what a generator makes.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Literal, TypeVar

Name = Literal["start", "model", "tokenizer", "disk"]
NAMES: tuple[Name, ...] = ("start", "model", "tokenizer", "disk")
"""Start-up (imports, identity, loading, warm-up); the model's passes with what is computed of their
logits, and its updates; the tokenizer; reading and writing, with the decoding and encoding that
belong to it."""
OTHER = "other"

T = TypeVar("T")


class Clock:
    """The clock of one process. Spans of other threads count nothing."""

    def __init__(self, *, began: float | None = None) -> None:
        """Begin to count at `began`, the `time.monotonic()` at which the process was started.

        What has passed since is "start".
        """
        self._thread = threading.get_ident()
        self._outer: list[str] = []
        self._name: str = OTHER
        self._since = time.monotonic()
        self._spent: dict[str, float] = dict.fromkeys((*NAMES, OTHER), 0.0)
        if began is not None:
            self._spent["start"] = self._since - began
        self._spans = {name: _Span(self, name) for name in NAMES}

    def span(self, name: Name) -> "_Span":
        """A `with` block charged to a name; spans within it are taken off."""
        return self._spans[name]

    def each(self, name: Name, items: Iterable[T]) -> Iterator[T]:
        """The items, the making of each charged to a name."""
        span, iterator = self._spans[name], iter(items)
        while True:
            with span:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Name -> seconds so far, "other" included; together the wall time."""
        spent = dict(self._spent)
        spent[self._name] += time.monotonic() - self._since
        return {name: round(value, 3) for name, value in spent.items()}

    def enter(self, name: str) -> None:
        """Charge a name from now on."""
        if threading.get_ident() == self._thread:
            self._outer.append(self._name)
            self._charge(name)

    def leave(self) -> None:
        """Charge what was charged before again."""
        if threading.get_ident() == self._thread:
            self._charge(self._outer.pop())

    def _charge(self, name: str) -> None:
        now = time.monotonic()
        self._spent[self._name] += now - self._since
        self._name, self._since = name, now


class _Span:
    """Enters and leaves; one object per name, for it holds nothing of its own."""

    __slots__ = ("_clock", "_name")

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.enter(self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clock.leave()
