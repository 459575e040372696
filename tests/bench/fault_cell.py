"""One cell of the matrix: a command with a fault, then without.

It says what is to be found after each.
"""

import ctypes
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
from fault_columns import COLUMNS, Column, Found, Place, look, set_up
from fault_kinds import (
    FAULTS,
    Fault,
    Struck,
    age_from_tomorrow,
    mount_read_only,
    on_call,
    unmount,
)
from fault_servers import Bucket, HubBeside, use_hub
from forked import Command, fork, start

PATIENCE = 120.0
"""Seconds after which a command hangs."""
GRACE = 10.0
"""Seconds that what a command started has to end after it."""
NOTHING = "nothing"


def fresh_disk(root: Path, state: Path | None) -> None:
    """A small disk that this process and those it starts see, and nobody else."""
    assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0, "no mount namespace"
    assert ctypes.CDLL(None).prctl(36, 1) == 0, "PR_SET_CHILD_SUBREAPER"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192m", "none", root], check=True)
    if state is not None:
        shutil.copytree(state, root, symlinks=True, dirs_exist_ok=True)
    (root / "tmp").mkdir(exist_ok=True)
    shutil.rmtree(beside(root), ignore_errors=True)
    beside(root).mkdir()


def beside(root: Path) -> Path:
    """Where this bench writes down what happens in a place.

    That is on another disk, which is never full.
    """
    return root.with_name("beside")


class Watch:
    """A command, begun any number of times, and what happens in it."""

    def __init__(
        self, place: Place, column: Column, environment: dict[str, str], *, spared: int = 0
    ) -> None:
        """`spared`: a process of ours that is not the command's."""
        self.place = place
        self._column, self._environment, self._spared = column, environment, spared
        self._events = beside(place.root) / "events"
        self._runs = count()
        self._commands: list[Command] = []

    @contextmanager
    def begun(self, fault: Fault, *, armed: bool, terminal: bool = False) -> Iterator[None]:
        """The command, or two of the same, until the block ends."""
        self._events.unlink(missing_ok=True)
        self._commands = [
            self._start(fault, first=number == 0, armed=armed, terminal=terminal)
            for number in range(self._column.copies)
        ]
        try:
            yield
        finally:
            for process in self._living():
                process.kill()

    def _start(self, fault: Fault, *, first: bool, armed: bool, terminal: bool) -> Command:
        place, column = self.place, self._column
        own = {
            "TMPDIR": str(place.root / "tmp"),
            "XDG_CACHE_HOME": str(place.root / "cache"),
            "HF_HOME": str(place.root / "hub"),
        }

        def before() -> None:
            events = os.open(self._events, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            struck = Struck(root=place.root, runner=os.getpid(), events=events)
            _report_to(struck, column, self._environment)
            if armed and fault.throughout is not None:
                fault.throughout(struck)
            if armed and first and fault.strike is not None:
                _arm(struck, column, fault)

        return start(
            column.words(place),
            said=beside(place.root) / f"said-{next(self._runs)}",
            environment=set_up() | own | self._environment,
            before=before,
            terminal=terminal and first,
        )

    def end(self) -> int | None:
        """The exit code of the first command, when all have ended; None where one hangs."""
        deadline = time.monotonic() + PATIENCE
        while [1 for command in self._commands if command.poll() is None]:
            if "hit" in self.events():
                self._commands[0].hang_up()
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        return self._commands[0].code

    def others(self) -> list[int | None]:
        """The exit codes of the others."""
        return [command.code for command in self._commands[1:]]

    def left(self) -> list[str]:
        """What the commands started and did not end, after a time of grace."""
        deadline = time.monotonic() + GRACE
        while living := self._living():
            if time.monotonic() > deadline:
                return [str(process.pid) for process in living]
            time.sleep(0.02)
        return []

    def _living(self) -> list[psutil.Process]:
        processes = psutil.Process().children(recursive=True)
        return [p for p in processes if p.pid != self._spared and _lives(p)]

    def said(self) -> str:
        """All that the first command printed."""
        path = self._commands[0].said
        text = path.read_text(errors="replace") if path.exists() else ""
        return text.replace("\r", "").replace(str(self.place.root), "DIR")

    def events(self) -> list[str]:
        """What happened since it began."""
        return self._events.read_text().splitlines() if self._events.exists() else []

    def made(self) -> int:
        """How many units of the column's."""
        return self.events().count("made")

    def committed(self) -> set[str]:
        """Rows that a commit record names."""
        lines = [line.split() for line in self.events() if line.startswith("committed")]
        return {word.replace(":", " ") for line in lines for word in line[1:]}


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _report_to(struck: Struck, column: Column, environment: dict[str, str]) -> None:
    """Let the product's processes say what they commit and make."""
    from stillroom.stages.data import stage
    from stillroom.storage.store.commits import CommitLog

    stage.COMMIT_ROWS = 8
    append = CommitLog.append

    def appended(self: CommitLog, fields: Any, shard: Any, keys: Any) -> Any:
        keys = list(keys)
        commit = append(self, fields, shard, keys)
        if commit is not None:
            struck.say("committed", *(f"{self.table}:{key.hex()}" for key in keys))
        return commit

    CommitLog.append = appended  # type: ignore[method-assign]
    on_call(column.unit[1], lambda: struck.say("made"), after=True)
    if "HF_ENDPOINT" in environment:
        use_hub(environment["HF_ENDPOINT"], struck.root / "hub")


def _arm(struck: Struck, column: Column, fault: Fault) -> None:
    """Let the fault strike at the moment, once."""
    place, at = (fault.disk and column.disk_moment) or column.moment
    calls = count(1)

    def strike() -> None:
        if next(calls) != at:
            return
        try:
            os.close(os.open(beside(struck.root) / "struck", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        struck.say("hit")
        assert fault.strike is not None
        fault.strike(struck)

    if column.beside:
        on_call(place, lambda: _later(strike))
    else:
        on_call(place, strike)


def _later(strike: Callable[[], None]) -> None:
    threading.Timer(0.3, strike).start()


def run_cell(
    place: Place, name: str, fault_name: str, *, state: Path, bucket: Bucket, plain: dict[str, Any]
) -> dict[str, Any]:
    """The command with the fault, then without; in a process that is there for this alone.

    Args:
        place: A folder for it.
        name: The column.
        fault_name: The row.
        state: What the place holds before.
        bucket: Where the store lies if the fault is one of S3.
        plain: The cell without a fault; empty to make that.
    """
    column, fault = COLUMNS[name], FAULTS.get(fault_name, Fault(codes=(0,)))
    cell: dict[str, Any] = {"column": name, "fault": fault_name}
    if fault.needs_stage and column.words(place)[0] != "run":
        return cell | {"verdict": "does not apply: starts no process"}
    fresh_disk(place.root, state)
    if column.make is not None:
        in_child(partial(column.make, place))
    server: Bucket | HubBeside = HubBeside.start() if name == "publish" else bucket
    if fault.around in ("503", "slow") and isinstance(server, Bucket):
        place = Place(place.root, url=server.take(place.root / "store"))
    environment = server.environment()
    os.environ |= environment
    watch = Watch(place, column, environment, spared=getattr(server, "pid", 0))
    before = () if plain else look_in_child(place, column).rows
    cell |= disturb(watch, fault, fault_name=fault_name, server=server)
    committed = watch.committed()
    after = look_in_child(place, column)
    with watch.begun(fault, armed=False):
        cell |= {"again_code": watch.end(), "again_said": last_line(watch.said())}
    made = cell["made"] + watch.made()
    end = look_in_child(place, column, sweep=True)
    if isinstance(server, HubBeside):
        end.outcome = server.published()
    if not plain:
        return cell | {"before": [*before], "end": asdict(end)}
    pattern = Found(**plain["end"])
    promised = (pattern.rows.keys() & plain["before"]) | committed
    cell |= {
        "lost": len(promised - after.rows.keys()) + len(promised - end.rows.keys()),
        "again": max(0, made - plain["made"]),
        "unit": column.unit[0],
        "twice": after.twice + end.twice,
        "equal": end.rows == pattern.rows and end.outcome == pattern.outcome,
        "problems": end.problems,
        "files_left": max(0, end.vacuumed - pattern.vacuumed)
        + len(set(end.files) - set(pattern.files)),
        "files_left_after_vacuum": sorted(set(end.stay) - set(pattern.stay)),
    }
    return cell | {"verdict": verdict(cell, fault)}


def disturb(
    watch: "Watch", fault: Fault, *, fault_name: str, server: Bucket | HubBeside
) -> dict[str, Any]:
    """The command under the fault, and how it ends."""
    store = watch.place.root / "store"
    if fault.around == "read-only":
        store.mkdir(exist_ok=True)
        mount_read_only(store)
    if fault.around == "later":
        age_from_tomorrow(watch.place.root)
    if fault.around in ("503", "slow"):
        server.fail(fault.around)
    with watch.begun(fault, armed=True, terminal=fault_name == "terminal gone"):
        code, others, left = watch.end(), watch.others(), watch.left()
    if fault.around == "read-only":
        unmount(store)
    failed = server.forgive() if fault.around in ("503", "slow") else 0
    (watch.place.root / "ballast").unlink(missing_ok=True)
    return {
        "code": code,
        "others": others,
        "said": last_line(watch.said()),
        "traceback": "Traceback" in watch.said(),
        "failed_requests": failed,
        # Of a clock that was set back, what is there is already younger than now.
        "hit": bool(failed) or fault.around in ("read-only", "later") or "hit" in watch.events(),
        "made": watch.made(),
        "processes_left": left,
    }


def last_line(said: str) -> str:
    """The error, or the last that was said."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1]


def verdict(cell: dict[str, Any], fault: Fault) -> str:
    """`right`, or what is wrong."""
    if cell["code"] is None:
        return "HANGS"
    if not cell["hit"]:
        return "does not apply: makes no link" if fault.throughout else "NOT HIT"
    wrong = {
        f"{cell['lost']} rows LOST": cell["lost"],
        f"{cell['twice']} rows twice": cell["twice"],
        f"exit code {cell['code']}, not {fault.codes}": cell["code"] not in fault.codes,
        "a traceback": cell["traceback"],
        "no message": cell["code"] in (1, 2, 3) and not cell["said"].startswith("error: "),
        f"{len(cell['processes_left'])} processes left": cell["processes_left"],
        f"run again: exit code {cell['again_code']}": cell["again_code"] != 0,
        f"not whole: {cell['problems'][:1]}": cell["problems"],
        "not equal to a run without a fault": not cell["equal"],
        f"{len(cell['files_left_after_vacuum'])} files stay": cell["files_left_after_vacuum"],
    }
    return "; ".join(text for text, there in wrong.items() if there) or "right"


def in_child(work: Callable[[], object]) -> None:
    """Do work in a process of its own: one that read tables must not be forked from."""
    assert os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1]) == 0, f"{work} failed"


def look_in_child(place: Place, column: Column, *, sweep: bool = False) -> Found:
    """`look`, in a process of its own."""
    kept = beside(place.root) / "found.json"
    in_child(lambda: kept.write_text(json.dumps(asdict(look(place, column, sweep=sweep)))))
    found = Found(**json.loads(kept.read_text()))
    kept.unlink()
    return found
