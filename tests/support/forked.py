"""Commands in processes forked from this one, which has loaded torch.

Each is there in milliseconds, and so are its stages.

What runs is the command line's own `main`, and the stage's own, in the processes, sessions and
groups that they would have had. Only their start differs: no interpreter is started. A runner that
has read tables has threads, and a fork of it could wait for them for ever; so what is to become its
stages is forked before it begins and waits until it is called.
"""

import fcntl
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import termios
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stillroom.pipeline.cli.main import main
from stillroom.pipeline.run import process, worker

SPARES = 8
"""Processes that a runner may start: one for each stage, and one more for each that starts again
after a death."""
STAGE = "stage"
"""What the system calls a process that has become a stage's."""


def fork(work: Callable[[], object]) -> int:
    """Do it in a process of its own, which ends with it; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@dataclass(kw_only=True)
class Command:
    """A command under way."""

    pid: int
    said: Path
    """What it prints."""
    terminal: int | None = None
    """Our end of its terminal."""
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative where a signal killed it."""
        self._drain()
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
            self._drain()
        return self.code

    def hang_up(self) -> None:
        """Its terminal is gone."""
        if self.terminal is not None:
            self._drain()
            os.close(self.terminal)
            self.terminal = None

    def _drain(self) -> None:
        with suppress(OSError):
            while self.terminal is not None and (text := os.read(self.terminal, 1 << 16)):
                with self.said.open("ab") as file:
                    file.write(text)


def start(
    words: Sequence[object],
    *,
    said: Path,
    environment: Mapping[str, str],
    before: Callable[[], None],
    terminal: bool = False,
) -> Command:
    """A command as a shell would start it.

    `before` is done in its process, and holds for its stages.
    """
    ours, theirs = os.openpty() if terminal else (None, None)

    def command() -> None:
        os.setsid()
        if theirs is None:
            stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        else:
            os.close(ours)
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
            stream = theirs
        os.dup2(os.open(os.devnull, os.O_RDONLY) if theirs is None else theirs, 0)
        for number in (1, 2):
            os.dup2(stream, number)
        os.close(stream)
        os.environ |= environment
        run(words, before=before)

    pid = fork(command)
    if theirs is not None and ours is not None:
        os.close(theirs)
        os.set_blocking(ours, False)
    return Command(pid=pid, said=said, terminal=ours)


def run(words: Sequence[object], *, before: Callable[[], None] = lambda: None) -> None:
    """The command in this process, which is its own; its stages in others, which wait already."""
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
    tempfile.tempdir = None
    before()
    process.subprocess = SimpleNamespace(Popen=Spares(), DEVNULL=None)  # type: ignore[assignment]
    sys.argv = ["stillroom", *map(str, words)]
    main()


class Spares:
    """A stand-in for `subprocess.Popen`.

    It hands the environment and the line to a process that waits.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, socket.socket]] = []
        for _ in range(SPARES):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            others = [ours, *(line for _, line in self._waiting)]
            pid = fork(lambda line=theirs, others=others: _wait(line, others))  # type: ignore[misc]
            theirs.close()
            self._waiting.append((pid, ours))

    def __call__(
        self, words: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int], **_: Any
    ) -> "StageOfFork":
        pid, line = self._waiting.pop()
        with line:
            socket.send_fds(line, [json.dumps(dict(env)).encode()], list(pass_fds))
        return StageOfFork(pid)


def _wait(line: socket.socket, others: Sequence[socket.socket]) -> None:
    """Become a stage's process; end if there is no runner any more that could call."""
    for other in others:
        other.close()
    os.setsid()
    called, descriptors, _, _ = socket.recv_fds(line, 1 << 18, 1)
    if not called:
        return
    line.close()
    os.environ.clear()
    os.environ |= json.loads(called) | {worker.JOB_FD: str(descriptors[0])}
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    Path("/proc/self/comm").write_text(STAGE)
    _run_site()
    worker.main()


def _run_site() -> None:
    """What Python runs in a process before its first own line (`running.at_worker_start`)."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if (code := Path(folder) / "sitecustomize.py").is_file():
            runpy.run_path(str(code))
            return


class StageOfFork:
    """As much of a `Popen` as the runner asks for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._look(os.WNOHANG)

    def wait(self) -> int | None:
        """Its exit code, when it has ended."""
        return self._look(0)

    def send_signal(self, number: signal.Signals) -> None:
        """A signal, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _look(self, how: int) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, how))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode
