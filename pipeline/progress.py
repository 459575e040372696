"""How far a stage is: a bar on a terminal, a plain line now and then elsewhere; always to one stream."""

import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY_SECONDS = 10.0


def human(count: float) -> str:
    """12345 as 12.3k."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 1000 or unit == "G":
            return f"{count:.1f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds as 3m 20s."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class StageProgress:
    """One stage's line."""

    def __init__(self, stage: str, stream: TextIO, *, quiet: bool = False) -> None:
        self._stage = stage
        self._console = Console(file=stream, quiet=quiet, highlight=False, markup=False)
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
            redirect_stdout=False,  # what is printed goes to the log, not beside the bar
            redirect_stderr=False,
        )
        self._task = None if not self._console.is_terminal else self._bar.add_task(stage, unit="", rate="", note="")
        self._unit, self._total, self._done, self._tokens, self._note = "rows", 0, 0, 0, ""
        self._began = self._shown = time.monotonic()

    def start(self, *, total: int, unit: str, done: int = 0) -> None:
        """Begin counting."""
        self._unit, self._total, self._done, self._first = unit, total, done, done
        self._began = self._shown = time.monotonic()
        if self._task is not None:
            self._bar.update(self._task, total=total or None, completed=done, unit=unit)
            self._bar.start()

    def advance(self, units: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """Count; show at most a few times a second on a terminal, every ten seconds elsewhere."""
        self._done += units
        self._tokens += tokens
        self._note = note or self._note
        if self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate(), note=self._note)
        elif time.monotonic() - self._shown >= _EVERY_SECONDS:
            self._shown = time.monotonic()
            self._console.print(self._line(), soft_wrap=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(f"{self._stage}: {text}", soft_wrap=True)

    def finish(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bar.stop()

    def _rate(self) -> str:
        elapsed = max(time.monotonic() - self._began, 1e-6)
        return f"{human(self._tokens / elapsed)} tokens/s" if self._tokens else ""

    def _line(self) -> str:
        elapsed = time.monotonic() - self._began
        fresh = self._done - self._first
        left = f", {duration(elapsed / fresh * (self._total - self._done))} left" if fresh and self._total else ""
        total = f"/{self._total}" if self._total else ""
        parts = [f"{self._stage}: {self._done}{total} {self._unit}", self._rate(), self._note]
        return ", ".join(p for p in parts if p) + left
