"""How far a stage is, counted where the work is done.

It is told as facts that a screen, a line or a log can show.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..printing.console import Terminal
from ..printing.numbers import duration, human, short, size
from ..printing.text import one_line, show_line

LINE_SECONDS = 10.0
"""Between two lines of progress, where there is no bar."""
_TELL_SECONDS = 0.2


@dataclass(kw_only=True, slots=True)
class Meter:
    """What is known of a stage's progress.

    As a dict it is what the stage's process tells the runner.
    """

    unit: str = "rows"
    total: int = 0
    """Units in all; 0 if nobody knows."""
    first: int = 0
    """Units that were there before."""
    done: int = 0
    others: int = 0
    """Of these, the units that other workers did since it began to count."""
    workers: int = 1
    """That count together (`together`)."""
    tokens: int = 0
    """By this process."""
    seconds: float = 0.0
    """Since it began to count."""
    note: str = ""
    rejects: int = 0
    """By this process."""
    written: int = 0
    """Bytes committed by this process."""

    @property
    def rate(self) -> float | None:
        """Tokens per second."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds to go at the speed so far, where that is known."""
        fresh = self.done - self.first
        if self.total <= 0 or fresh <= 0:
            return None
        return self.seconds / fresh * max(0, self.total - self.done)

    @property
    def counts(self) -> bool:
        """Whether anything is counted yet; before that libraries and models are loaded."""
        return bool(self.total or self.done)

    def count(self) -> str:
        """Units done, of how many."""
        if not self.total:
            return f"{short(self.done)} {self.unit}"
        # Beside 512k stands 26.6k, not 26624.
        done = human(self.done) if self.done < 100_000 <= self.total else short(self.done)
        return f"{done}/{short(self.total)} {self.unit}"

    def line(self) -> str:
        """All of it, for a line of text."""
        if not self.counts:
            return "loading libraries and models"
        parts = [
            self.count(),
            f"{human(self.rate)} tokens/s" if self.rate else "",
            f"{self.rejects} rejected" if self.rejects else "",
            f"{size(self.written)} written" if self.written else "",
            f"{self.workers} workers" if self.workers > 1 else "",
            self.note,
            f"{duration(self.left)} left" if self.left else "",
        ]
        return ", ".join(part for part in parts if part)


def together(meters: Sequence[Meter]) -> Meter:
    """What the workers of one stage have done, as if one had.

    The first of them began to count first.
    """
    counting = [meter for meter in meters if meter.counts]
    if len(meters) == 1 or not counting:
        return replace(meters[0], workers=len(meters))
    # What each did itself since the first one looked into the store:
    # at least what one of them found there.
    own = sum(meter.done - meter.first - meter.others for meter in counting)
    first, total = (min(m.first for m in counting), max(m.total for m in counting))
    done = max(first + own, *(meter.done for meter in counting))
    return Meter(
        unit=counting[0].unit,
        total=total,
        first=first,
        done=min(done, total) if total else done,
        workers=len(meters),
        tokens=sum(meter.tokens for meter in counting),
        seconds=max(meter.seconds for meter in counting),
        note=next((meter.note for meter in counting if meter.note), ""),
        rejects=sum(meter.rejects for meter in counting),
        written=sum(meter.written for meter in counting),
    )


class Counting:
    """The counting end of a progress line; those who show it say how."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.meter = Meter()
        self._began = time.monotonic()

    def start(self, *, total: int, unit: str, done: int = 0) -> None:
        """Begin counting."""
        self._began = time.monotonic()
        self.meter = Meter(unit=unit, total=total, first=done, done=done)
        self._changed(now=True)

    def advance(self, units: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """Count units and tokens."""
        self.meter.done += units
        self.meter.tokens += tokens
        self.meter.note = one_line(note) or self.meter.note
        self.meter.seconds = time.monotonic() - self._began
        self._changed()

    def others(self, units: int = 1) -> None:
        """Count units that other workers did."""
        self.meter.others += units
        self.advance(units)

    def wrote(self, *, rejects: int, size: int) -> None:
        """Rows rejected and bytes committed so far."""
        self.meter.rejects, self.meter.written = rejects, size

    def _changed(self, *, now: bool = False) -> None:
        raise NotImplementedError


class ToldProgress(Counting):
    """Progress that a stage's process tells the runner a few times a second.

    It also writes to the log, whatever a terminal shows.
    """

    def __init__(
        self, stage: str, tell: Callable[[dict[str, Any]], None], log: TextIO | None = None
    ) -> None:
        """`log`: where lines go; None: standard error, which is the log of a process of its own."""
        super().__init__(stage)
        self._tell, self._file = tell, log
        self._told = self._logged = float("-inf")

    def say(self, text: str) -> None:
        """A line of its own."""
        self._log(text)
        self._tell({"event": "say", "text": f"{self.stage}: {text}"})

    def finish(self) -> None:
        """How far it came."""
        self._changed(now=True)
        self._log(self.meter.line())

    def _changed(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if now or moment - self._told >= _TELL_SECONDS:
            self._told = moment
            self._tell({"event": "at", "meter": asdict(self.meter)})
        if moment - self._logged >= LINE_SECONDS:
            self._logged = moment
            self._log(self.meter.line())

    def _log(self, text: str) -> None:
        show_line(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.stage}: {text}", self._file or sys.stderr
        )


class StageProgress(Counting):
    """One bar, for work in this process.

    It is a bar on a terminal, and a plain line now and then elsewhere.
    """

    def __init__(self, stage: str, stream: TextIO, *, quiet: bool = False) -> None:
        super().__init__(stage)
        self._console = Terminal(stream, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=False,  # what is printed is no part of the bar
            redirect_stderr=False,
        )
        self._task = (
            None
            if not self._console.is_terminal
            else self._bar.add_task(stage, unit="", rate="", note="")
        )
        self._shown = time.monotonic()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(one_line(f"{self.stage}: {text}"), soft_wrap=True)

    def finish(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bar.stop()

    def _changed(self, *, now: bool = False) -> None:
        meter = self.meter
        if self._task is not None:
            rate = f"{human(meter.rate)} tokens/s" if meter.rate else ""
            told: dict[str, Any] = {
                "completed": meter.done,
                "unit": meter.unit,
                "rate": rate,
                "note": meter.note,
            }
            self._bar.update(self._task, total=meter.total or None, **told)
            if now:
                self._bar.start()
        elif not now and time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            self._console.print(f"{self.stage}: {meter.line()}", soft_wrap=True)
