"""What a person sees of a run.

On a terminal it is one screen with all stages, elsewhere plain lines with the same facts.

The runner owns it and feeds it: with the plan's books, with what the process of the stage under way
tells (`progress.ToldProgress`), and with moments to draw in. Only the runner's process writes to
the terminal.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from rich.console import Group
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from ...storage.words import counted
from ..plan.lines import StagePlan, equal_texts
from ..printing.console import Terminal
from ..printing.numbers import duration, human, short, size
from ..printing.text import one_line
from .progress import LINE_SECONDS, Meter

_DRAW_SECONDS = 0.2
_WIDE = 100  # columns from which on there is room for long bars
# The least widths keep columns where they are while numbers grow; all of it fits 80 columns.
_COLUMNS = {"done": 18, "tokens": 6, "tokens/s": 8, "rejects": 7, "written": 9, "time": 9}
_LEFT_OUT = ("tokens", "written", "rejects", "tokens/s")  # in this order, on a narrower terminal
State = Literal["cached", "running", "waiting", "done", "stopped", "left out"]


@dataclass(kw_only=True, slots=True)
class _Row:
    """One stage."""

    state: State
    books: StagePlan
    meter: Meter = field(default_factory=Meter)
    seconds: float | None = None
    """That it took, in this run."""
    expected: float | None = None
    """Seconds that it is likely to take, by what was measured in this run's folder."""


class Screen:
    """A context manager; a reader that went away stops nothing."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._console = _Console(stream, quiet=quiet)
        self._rows: dict[str, _Row] = {}
        self._running: str | None = None
        self._began = self._stage_began = self._drawn = self._printed = time.monotonic()
        self._widths: list[int] = []
        shown = self._console.is_interactive and not self._console.is_dumb_terminal and not quiet
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._animated = shown

    def __enter__(self) -> Self:
        if self._animated:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running is not None:
            self._rows[self._running].state, self._running = "stopped", None
        if self._animated:
            self._draw()
            self._live.stop()

    def plan(
        self,
        stages: Iterable[StagePlan],
        *,
        chosen: Iterable[str],
        expected: dict[str, float | None],
    ) -> None:
        """The books as they stand now.

        Args:
            stages: All stages, in their order.
            chosen: Names of those that this run does.
            expected: Seconds that a stage is likely to take, where something was measured.
        """
        asked = set(chosen)
        for books in stages:
            state: State = (
                "cached"
                if books.state == "done"
                else "waiting"
                if books.name in asked
                else "left out"
            )
            row = self._rows.setdefault(books.name, _Row(state=state, books=books))
            row.books, row.expected = books, expected.get(books.name)
            if row.state not in ("running", "done"):
                row.state = state
        self.tick(now=True)

    def begin(self, name: str) -> None:
        """A stage's process starts."""
        self._running, self._stage_began = name, time.monotonic()
        self._printed = self._stage_began
        self._rows[name].state, self._rows[name].meter = "running", Meter()
        self.tick(now=True)

    def hear(self, event: dict[str, Any]) -> None:
        """What the process of the stage under way tells."""
        if event["event"] == "say":
            self.say(event["text"])
        elif self._running is not None:
            self._rows[self._running].meter = Meter(**event["meter"])

    def tick(self, *, now: bool = False) -> None:
        """Draw, if it is time to."""
        moment = time.monotonic()
        if self._animated and (now or moment - self._drawn >= _DRAW_SECONDS):
            self._draw()
        elif (
            not self._animated
            and self._running is not None
            and moment - self._printed >= LINE_SECONDS
        ):
            self._printed = moment
            self.say(f"{self._running}: {self._line(self._rows[self._running])}")

    def end(self, name: str, *, seconds: float) -> None:
        """A stage is done; the books were brought up to date before."""
        row, self._running = self._rows[name], None
        row.state, row.seconds = "done", seconds
        if not self._animated:
            self.say(f"{name}: done in {duration(seconds)} ({books_line(row.books)})")
        self.tick(now=True)

    def cached(self, name: str) -> None:
        """Nothing is to do in a stage."""
        if not self._animated:
            self.say(f"{name}: nothing to do ({books_line(self._rows[name].books)})")

    def say(self, text: str) -> None:
        """A line of its own, above the stages."""
        self._rewind()
        self._console.print(one_line(text), soft_wrap=not self._animated)
        self._measure()

    def _line(self, row: _Row) -> str:
        if not row.meter.counts:
            spent = duration(time.monotonic() - self._stage_began)
            return f"{row.meter.line()}, {spent} so far"
        left = self._left()
        waits = (
            f"; about {duration(left)} left of the run"
            if left is not None and len(self._waiting())
            else ""
        )
        return row.meter.line() + waits

    def _waiting(self) -> list[str]:
        return [name for name, row in self._rows.items() if row.state == "waiting"]

    def _left(self) -> float | None:
        """Seconds to the end of the run; None while a stage cannot be estimated."""
        parts = [self._rows[name].expected for name in self._waiting()]
        if self._running is not None:
            row = self._rows[self._running]
            spent = time.monotonic() - self._stage_began
            parts.append(
                row.meter.left if row.meter.left is not None else _less(row.expected, spent)
            )
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._rewind()
        self._live.update(self._screen(), refresh=True)
        self._measure()

    def _rewind(self) -> None:
        """Go up over the lines that stand there.

        A narrower terminal has broken them into more lines, so go up over those too.
        """
        width = self._console.width
        if not self._animated or not self._widths:
            return
        more = sum(max(1, -(-cells // width)) for cells in self._widths) - len(self._widths)
        if more > 0:
            erase = [(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)]
            self._console.control(Control(*erase * more))

    def _measure(self) -> None:
        """Remember how wide the lines are that stand there now."""
        if self._animated and self._live.renderable:
            lines = self._console.render_lines(self._live.renderable, pad=False)
            self._widths = [sum(segment.cell_length for segment in line) for line in lines]

    def _screen(self) -> Group:
        wide = self._console.width >= _WIDE
        table = Table(
            box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="dim"
        )
        table.add_column("stage", no_wrap=True, min_width=8)
        table.add_column("", no_wrap=True, width=max(8, min(40, self._console.width - 88)))
        shown = _fitting(self._console.width)
        for name in shown:
            table.add_column(name, no_wrap=True, justify="right", min_width=_COLUMNS[name])
        for name, row in self._rows.items():
            bar, *cells = self._cells(row)
            numbers = [
                cell for column, cell in zip(_COLUMNS, cells, strict=True) if column in shown
            ]
            table.add_row(
                name, bar, *numbers, style="dim" if row.state in ("waiting", "left out") else ""
            )
        return Group(
            table, *(Text(line, no_wrap=True, overflow="ellipsis") for line in self._foot())
        )

    def _cells(self, row: _Row) -> list[Any]:
        meter, books = row.meter, row.books
        if row.state == "running":
            bar = ProgressBar(
                total=meter.total or None, completed=meter.done, pulse=not meter.total
            )
            left = meter.left
            spent = duration(time.monotonic() - self._stage_began)
            time_cell = self._remaining(left) if left is not None and left >= 1 else spent
            return [
                bar,
                meter.count() if meter.counts else "loading",
                *self._counts(row),
                time_cell,
            ]
        if row.state in ("waiting", "left out"):
            to_do = f"{short(books.pending)} to do" if books.pending else ""
            expected = (
                f"~{duration(row.expected)}" if row.expected and row.state == "waiting" else ""
            )
            return [row.state, to_do, "", "", "", "", expected]
        if row.state == "stopped":
            return [
                row.state,
                meter.count() if meter.counts else "",
                *self._counts(row),
                "",
            ]
        unit = "row" if books.committed == 1 else "rows"
        done = f"{short(books.committed)} {unit}" if books.committed else ""
        return [
            row.state,
            done,
            *self._counts(row),
            "" if row.seconds is None else duration(row.seconds),
        ]

    def _remaining(self, left: float) -> str:
        """Seconds to go; `1m 06s left` is wider than the column of a narrow terminal."""
        text = f"{duration(left)} left"
        return (
            text
            if self._console.width >= _WIDE or len(text) <= _COLUMNS["time"]
            else f"~{duration(left)}"
        )

    @staticmethod
    def _counts(row: _Row) -> list[str]:
        """Tokens, tokens/s, rejects and bytes of a stage.

        They are this process's while it works, and then what is in the books.
        """
        meter, books = row.meter, row.books
        under_way = row.state in ("running", "stopped")
        tokens = meter.tokens if under_way else books.tokens or meter.tokens
        rejects = meter.rejects if under_way else books.rejected
        return [
            human(tokens) if tokens else "",
            human(meter.rate) if meter.rate else "",
            short(rejects) if rejects else "",
            size(meter.written) if meter.written else "",
        ]

    def _foot(self) -> list[str]:
        """What the stage says of itself; of the run how long, and how long still."""
        spent = f"run        {duration(time.monotonic() - self._began)}"
        if self._running is None:
            return [spent]
        meter = self._rows[self._running].meter
        several = f"{meter.workers} workers" if meter.workers > 1 else ""
        left, note = self._left(), ", ".join(filter(None, (several, meter.note)))
        unknown = [name for name in self._waiting() if self._rows[name].expected is None]
        if left is not None:
            spent += f", about {duration(left)} left"
        elif unknown:
            spent += f"; not measured here yet: {', '.join(unknown)}"
        return [f"{self._running}: {note}", spent] if note else [spent]


class _Console(Terminal):
    """A pipe that nobody reads any more is no reason to stop a run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def _fitting(width: int) -> list[str]:
    """The columns of numbers that a terminal has room for.

    Beside them stand the names of stages and their bars.
    """
    found = dict(_COLUMNS)
    for name in _LEFT_OUT:
        if 8 + 1 + 8 + sum(1 + least for least in found.values()) > width:
            del found[name]
    return list(found)


def books_line(books: StagePlan) -> str:
    """What a stage has, for a line of text."""
    parts = [counted(books.committed, "row")]
    unit = "token" if books.tokens == 1 else "tokens"
    parts += [f"{human(books.tokens)} {unit}"] if books.tokens else []
    parts += [f"{books.rejected} rejected"] if books.rejected else []
    parts += [equal_texts(books.equal)] if books.equal else []
    return ", ".join(parts)


def _less(seconds: float | None, spent: float) -> float | None:
    return None if seconds is None else max(0.0, seconds - spent)
