"""What a person sees of a run.

It is one screen on a terminal of any width, plain lines in a pipe, and nothing when quiet.
"""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from kit import ENVIRONMENT, command, prompts, stillroom, write_jsonl, write_recipe
from running import start
from tiny_llama import save_tiny_llama

from stillroom.pipeline.plan.lines import StagePlan
from stillroom.pipeline.printing.numbers import duration, human, short, size
from stillroom.pipeline.run import screen as module
from stillroom.pipeline.run.progress import Meter, ToldProgress
from stillroom.pipeline.run.screen import Screen
from stillroom.pipeline.run.worker import Line

CONTROL = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])")


class Terminal:
    """Enough of a terminal: text, carriage return, line feed, cursor up, erase line.

    Colours are passed over.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text: str) -> None:
        while text:
            if found := CONTROL.match(text):
                self._control(*found.groups())
                text = text[found.end() :]
                continue
            self._write(text[0])
            text = text[1:]

    def resize(self, width: int) -> None:
        """Break lines that are too long now, as terminals do.

        The cursor stays where it was, at the end.
        """
        above = self.lines[: self.row + 1]
        broken = [line[i : i + width] for line in above for i in range(0, max(1, len(line)), width)]
        self.width, self.lines, self.row, self.column = (
            width,
            broken,
            len(broken) - 1,
            len(broken[-1]),
        )

    def _write(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
        else:
            assert self.column < self.width, f"over the edge after {self.lines[self.row]!r}"
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _control(self, numbers: str, kind: str) -> None:
        if kind == "A":
            self.row -= int(numbers or 1)
            assert self.row >= 0
        elif kind == "K":
            assert numbers == "2"
            self.lines[self.row] = ""
        else:
            assert kind in "mhl"


def at_a_terminal(words: list[str], width: int) -> tuple[Terminal, str, int]:
    """Run a command whose standard error is a terminal.

    What stands there in the end, its output and its exit code are returned.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "LINES")} | {
        "TERM": "xterm"
    }
    with subprocess.Popen(
        words, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
        assert process.stdout is not None
        printed = process.stdout.read().decode()
    os.close(ours)
    terminal = Terminal(width)
    terminal.feed(said.decode().replace("\r\n", "\n"))
    return terminal, printed, process.returncode


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screen")
    teacher = save_tiny_llama(folder / "teacher")
    source = write_jsonl(folder / "prompts.jsonl", [*prompts(24), {"prompt": ""}])
    return write_recipe(folder, teacher, source)


@pytest.fixture(scope="module")
def narrow(recipe: Path) -> tuple[Terminal, str, int]:
    """The first run, at 80 columns."""
    return at_a_terminal(command("run", recipe, "--until", "generate", "--json"), 80)


def rows_of(terminal: Terminal) -> dict[str, str]:
    """First word -> line, from the header of the last screen on."""
    start = max(i for i, line in enumerate(terminal.lines) if line.startswith("stage "))
    return {line.split()[0]: line.rstrip() for line in terminal.lines[start:] if line.strip()}


@pytest.mark.slow
def test_eighty_columns_hold_every_stage_and_what_was_said_stands_above(
    narrow: tuple[Terminal, str, int],
) -> None:
    terminal, printed, code = narrow
    assert code == 0
    assert '"state": "done"' in printed
    assert sum(line.startswith("stage ") for line in terminal.lines) == 1
    rows = rows_of(terminal)
    assert list(rows) == ["stage", "data", "generate", "score", "train", "evaluate", "run"]
    assert re.match(r"data +done +24 rows +1 +[\d.]+ KiB +\d+s$", rows["data"])
    assert re.match(r"generate +done +24 rows +\d+ +[\d.]+k? +[\d.]+ KiB +\d+s$", rows["generate"])
    assert rows["score"].split()[:3] == ["score", "left", "out"]
    above = terminal.lines[
        : terminal.lines.index(next(li for li in terminal.lines if li.startswith("stage ")))
    ]
    assert any(line.startswith("generate: loading ") for line in above)


@pytest.mark.slow
def test_a_wide_terminal_and_a_run_with_nothing_to_do(
    recipe: Path, narrow: tuple[Terminal, str, int]
) -> None:
    terminal, _, code = at_a_terminal(command("run", recipe, "--until", "generate"), 140)
    assert code == 0
    rows = rows_of(terminal)
    assert rows["data"].split()[1] == rows["generate"].split()[1] == "cached"
    assert max(len(line.rstrip()) for line in terminal.lines) > 100


@pytest.mark.slow
def test_the_log_has_all_that_was_said_and_how_far_it_came(
    recipe: Path, narrow: tuple[Terminal, str, int]
) -> None:
    log = (recipe.parent / "run" / "logs" / "generate.log").read_text()
    assert f"generate: loading {recipe.parent / 'teacher'} into hf" in log
    assert re.search(r"generate: 24/24 rows, .* tokens/s, .* written", log)


@pytest.mark.slow
def test_what_is_no_terminal_gets_plain_lines_and_quiet_gets_none(
    recipe: Path, tmp_path: Path
) -> None:
    fresh = [
        "--set",
        f"storage.dir={tmp_path}/store",
        "--set",
        f"run.dir={tmp_path}/run",
        "--until",
        "data",
    ]
    _, said = start(recipe, *fresh).communicate()
    # A stage that takes ten seconds says how far it came besides; no line has anything but text.
    assert re.fullmatch(r"(data: [ -~]+\n)*data: done in \d+s \(24 rows, 1 rejected\)\n", said)
    quiet = command("run", recipe, *fresh, "--quiet", "--set", "data.limit=20")
    terminal, _, code = at_a_terminal(quiet, 80)
    assert (terminal.lines, code) == ([""], 0)
    assert "data: 20/20 records" in (tmp_path / "run" / "logs" / "data.log").read_text()
    limited = ("--quiet", "--set", "data.limit=20", "--set", "data.holdout=20")
    failed = stillroom("run", recipe, *fresh, *limited, expect=2)
    assert failed.stderr.startswith("error: data.holdout: 20 of")


BOOKS = {
    "data": StagePlan(name="data", state="done", committed=9),
    "score": StagePlan(name="score", state="to do"),
}
BOOKS |= {
    "train": StagePlan(name="train", state="waits"),
    "evaluate": StagePlan(name="evaluate", state="waits"),
}


SHOWN = ["stage", *BOOKS, "score:", "run"]


class Hours:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> Hours:
    found = Hours()
    monkeypatch.setattr(module, "time", found)
    return found


def under_way(stream: Any, expected: dict[str, float | None]) -> Screen:
    screen = Screen(stream)
    screen.plan(BOOKS.values(), chosen=["data", "score", "train"], expected=expected)
    screen.begin("score")
    meter = Meter(
        total=100,
        first=20,
        done=60,
        tokens=8000,
        seconds=40.0,
        note="a note",
        rejects=2,
        written=2_500_000,
    )
    screen.hear({"event": "at", "meter": asdict(meter)})
    return screen


def test_a_line_every_ten_seconds_says_what_the_screen_would(hours: Hours) -> None:
    stream = io.StringIO()
    screen = under_way(stream, {"train": 60.0})
    for _ in range(100):
        hours.now += 0.25
        screen.tick()
    screen.hear({"event": "say", "text": "score: something"})
    screen.end("score", seconds=41.0)
    line = (
        "score: 60/100 rows, 200 tokens/s, 2 rejected, 2.4 MiB written, a note, 40s left; "
        "about 1m 40s left of the run"
    )
    assert stream.getvalue().splitlines() == [
        line,
        line,
        "score: something",
        "score: done in 41s (0 rows)",
    ]


def test_the_time_left_of_the_run_is_not_made_up(hours: Hours) -> None:
    stream = io.StringIO()
    screen = under_way(stream, {"train": None, "evaluate": 5.0})
    hours.now += 10
    screen.tick()
    assert stream.getvalue().endswith(" 40s left\n")
    assert screen._foot() == ["score: a note", "run        10s; not measured here yet: train"]


def test_a_reader_that_went_away_stops_nothing(hours: Hours) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream, under_way(stream, {}) as screen:
        for _ in range(3):
            hours.now += 10
            screen.tick()
            screen.say("nobody hears this")


@pytest.mark.parametrize("widths", [(140, 90, 80), (80, 140), (120, 100, 84, 130)])
def test_another_width_leaves_no_old_lines_behind(
    hours: Hours, monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...]
) -> None:
    for name, value in {
        "TTY_COMPATIBLE": "1",
        "TTY_INTERACTIVE": "1",
        "TERM": "xterm",
        "LINES": "24",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", str(widths[0]))
    stream, terminal = io.StringIO(), Terminal(widths[0])

    def drawn() -> None:
        terminal.feed(stream.getvalue())
        stream.seek(0)
        stream.truncate()

    with under_way(stream, {}) as screen:
        for width in widths:
            drawn()
            terminal.resize(width)
            screen._console.width = width
            for _ in range(3):
                hours.now += 1
                screen.tick()
                drawn()
            screen.say(f"at {width}")
            drawn()
            assert [line.split()[0] for line in terminal.lines if line.strip()][-7:] == SHOWN
    drawn()
    assert sum(line.startswith("stage ") for line in terminal.lines) == 1
    assert [line.rstrip() for line in terminal.lines if line.startswith("at ")] == [
        f"at {w}" for w in widths
    ]
    assert any(line.split()[:2] == ["score", "stopped"] for line in terminal.lines)


@pytest.mark.parametrize(("width", "gone"), [(80, set()), (60, {"tokens", "written", "rejects"})])
def test_a_narrow_terminal_has_fewer_columns_and_cuts_no_number(
    hours: Hours, monkeypatch: pytest.MonkeyPatch, width: int, gone: set[str]
) -> None:
    for name, value in {
        "TTY_COMPATIBLE": "1",
        "TTY_INTERACTIVE": "1",
        "TERM": "xterm",
        "LINES": "24",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", str(width))
    terminal, stream = Terminal(width), io.StringIO()
    with under_way(stream, {"train": 7300.0}) as screen:
        hours.now += 1
        screen.tick()
        terminal.feed(stream.getvalue())
    rows = rows_of(terminal)
    assert (
        set("stage done tokens tokens/s rejects written time".split()) - set(rows["stage"].split())
        == gone
    )
    assert re.search(r" 60/100 rows .* 200 .*40s left$", rows["score"])
    assert rows["train"].endswith("~2h 01m")
    assert "\u2026" not in "".join(rows.values())
    meter = Meter(total=100, first=20, done=60, tokens=8000, seconds=66.0, note="a note")
    with under_way(stream, {"train": 7300.0}) as screen:
        screen.hear({"event": "at", "meter": asdict(meter)})
        screen.tick(now=True)
        later = Terminal(width)
        later.feed(stream.getvalue())
    assert re.search(r" 60/100 rows .* ~1m 06s$", rows_of(later)["score"])


def test_an_error_is_broken_between_words(recipe: Path) -> None:
    terminal, _, code = at_a_terminal(command("run", recipe, "--only", "nowhere"), 40)
    assert code == 2
    assert " ".join(line.strip() for line in terminal.lines).strip() == (
        "error: no stage 'nowhere'. The stages are data, generate, score, train, evaluate."
    )


def test_a_stage_does_not_wait_for_a_runner_that_does_not_read() -> None:
    import socket

    ours, theirs = socket.socketpair()
    line = Line(theirs)
    for number in range(20_000):
        line.tell({"event": "say", "text": f"{number} {'x' * 100}"})
    heard: list[str] = []
    reading = ours.makefile("r")
    heard.append(reading.readline())
    assert '"0 xxx' in heard[0]
    ours.settimeout(5)
    lost = False
    while '"answer"' not in heard[-1]:
        if len(heard) == 100:
            line.answer({"answer": 1}) if not lost else None
            lost = True
        heard.append(reading.readline())
    assert len(heard) < 20_000  # what did not fit is lost, and no line is torn
    assert all(said.endswith("}\n") for said in heard)


def test_progress_is_told_a_few_times_a_second_and_its_end_always(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[dict[str, Any]] = []
    progress = ToldProgress("score", told.append)
    progress.start(total=5000, unit="rows")
    for _ in range(5000):
        progress.advance(tokens=2)
    progress.wrote(rejects=1, size=10)
    progress.finish()
    assert len(told) < 500
    assert told[-1]["meter"] | {"seconds": 0} == asdict(
        Meter(total=5000, done=5000, tokens=10_000, rejects=1, written=10)
    )
    assert "score: 5000/5000 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (99_999, "99999"), (102_912, "103k"), (1_234_567, "1.2M"), (123_456_789, "123M")],
)
def test_a_count_takes_five_characters_at_most(count: int, shown: str) -> None:
    assert short(count) == shown


def test_what_rounds_up_to_the_next_unit_is_in_that_unit() -> None:
    assert [human(count) for count in (999, 999.7, 999_940, 999_960)] == [
        "999",
        "1.0k",
        "999.9k",
        "1.0M",
    ]
    assert [size(octets) for octets in (999, 2**20 - 1)] == ["999 B", "1.0 MiB"]
    assert [duration(seconds) for seconds in (59.4, 59.5, 3599.6)] == ["59s", "1m 00s", "1h 00m"]
    assert [duration(seconds, places=1) for seconds in (59.94, 59.96)] == ["59.9s", "1m 00s"]
