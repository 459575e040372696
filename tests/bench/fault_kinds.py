"""The faults of the matrix, each where it strikes.

That is in the process that has come to a moment, or from the start on.

Signals, the terminal's end, a full disk and a read-only one are the system's own. An I/O error, a
disk without hard links and a clock that was set back are what the calls of this process say.
Answers of S3 and of the Hub are the servers' (`support/s3_server.py`, `support/hub.py`).
"""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from full_disk import fill

DAY = 86_400
LONG_ENOUGH = 1.0
"""Seconds in which a signal is heard; the process that sent it does nothing meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Struck:
    """What a fault knows of the process that it strikes."""

    root: Path
    """Where everything of a cell lies."""
    runner: int
    """The command's process; this one, where it has no stages."""
    events: int
    """Where to say what happens; lasts whatever becomes of this process."""

    def say(self, *words: object) -> None:
        """One event."""
        os.write(self.events, f"{' '.join(map(str, words))}\n".encode())


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One row of the matrix."""

    codes: tuple[int, ...]
    """How a command may end under it."""
    strike: Callable[[Struck], None] | None = None
    """Done at the moment."""
    throughout: Callable[[Struck], None] | None = None
    """Done in the command's process before it begins; it says `hit` when it was in somebody's
    way."""
    around: str = ""
    """`read-only`, `later`, `503` or `slow`: what holds for disk, clock or server while the command
    runs."""
    disk: bool = False
    """Whether it strikes who writes files on this machine."""
    needs_stage: bool = False
    """Whether it is for commands that have processes of stages."""


def on_call(place: str, do: Callable[[], None], *, after: bool = False) -> None:
    """From now on do something at each call of `module:name.attribute` of the product."""
    module, _, names = place.partition(":")
    owner: Any = import_module(f"stillroom.{module}" if not module.startswith("hug") else module)
    *path, name = names.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    @wraps(function)
    def called(*arguments: Any, **keywords: Any) -> Any:
        if not after:
            do()
        result = function(*arguments, **keywords)
        if after and result is not False:
            do()
        return result

    setattr(owner, name, called)


def _kill_runner(struck: Struck) -> None:
    os.kill(struck.runner, signal.SIGKILL)
    time.sleep(10 * LONG_ENOUGH)  # a stage dies with its runner


def _kill_worker(struck: Struck) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _signalled(number: signal.Signals) -> Callable[[Struck], None]:
    def strike(struck: Struck) -> None:
        os.kill(struck.runner, number)
        time.sleep(LONG_ENOUGH)

    return strike


def _lose_terminal(struck: Struck) -> None:
    with suppress(
        psutil.NoSuchProcess
    ):  # who holds it reads that this is the moment, and lets it go
        for _ in range(100):
            if psutil.Process(struck.runner).terminal() is None:
                break
            time.sleep(LONG_ENOUGH / 10)
    time.sleep(LONG_ENOUGH)


def _fill_disk(struck: Struck) -> None:
    fill(struck.root / "ballast")


def _failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def _break_disk(struck: Struck) -> None:
    os.fsync = _failing(errno.EIO)
    Path.read_bytes = _failing(errno.EIO)  # type: ignore[method-assign]


def _no_links(struck: Struck) -> None:
    def link(*_: Any, **__: Any) -> None:
        struck.say("hit")
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = link


def _set_clock_back(struck: Struck) -> None:
    now, now_ns, broken_down = time.time, time.time_ns, time.gmtime
    time.time = lambda: now() - DAY
    time.time_ns = lambda: now_ns() - DAY * 10**9
    time.gmtime = lambda seconds=None: broken_down(time.time() if seconds is None else seconds)


FAULTS = {
    "kill -9": Fault(codes=(-9,), strike=_kill_runner),
    "kill -9 of a stage": Fault(codes=(0, 1), strike=_kill_worker, needs_stage=True),
    "TERM": Fault(codes=(130,), strike=_signalled(signal.SIGTERM)),
    "HUP": Fault(codes=(130,), strike=_signalled(signal.SIGHUP)),
    "terminal gone": Fault(codes=(130,), strike=_lose_terminal),
    "disk full": Fault(codes=(0, 1), strike=_fill_disk, disk=True),
    "EIO": Fault(codes=(0, 1), strike=_break_disk, disk=True),
    "read-only store": Fault(codes=(0, 1), around="read-only"),
    "clock back a day": Fault(codes=(0,), strike=_set_clock_back, around="later"),
    "no hard links": Fault(codes=(0, 1), throughout=_no_links),
    "S3 says 503": Fault(codes=(1,), around="503"),
    "S3 is slow": Fault(codes=(0,), around="slow"),
}


def mount_read_only(folder: Path) -> None:
    """Make a folder read-only in this mount namespace."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)


def unmount(folder: Path) -> None:
    """The one on top."""
    subprocess.run(["umount", folder], check=True)


def age_from_tomorrow(root: Path) -> None:
    """What was written before the clock was set back is a day in the future."""
    for path in root.rglob("*"):
        then = path.lstat().st_mtime + DAY
        os.utime(path, (then, then), follow_symlinks=False)
