"""Starting one stage in a process group of its own, and seeing the whole group end before going on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import Any

import psutil

from ...storage.errors import StillroomError, Stopped
from ...storage.store.stopping import stop_signals
from .screen import Screen
from .worker import JOB_FD

# OpenMP threads wait for one another by spinning. On a machine whose cores are shared that burns
# what the other thread needs: small models then train several times slower. A thousand turns keep
# the speed where the core is free.
SPIN = "1000"
GRACE_SECONDS = 30.0  # after the first signal a stage has this long to commit and leave


class StageDied(StillroomError):
    """A stage's process died, or the engine in it."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what} {advice}")
        self.what = what


class StageProcess:
    """A stage's process group, started with a message and ended with an answer."""

    def __init__(self, message: dict[str, Any], screen: Screen) -> None:
        """`screen` shows what the stage tells meanwhile."""
        self._message, self._screen = message, screen
        self._signals = 0
        self._deadline = float("inf")
        ours, theirs = socket.socketpair()
        self._line = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stillroom.pipeline.run.worker"],
                env={"GOMP_SPINCOUNT": SPIN} | os.environ | {JOB_FD: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.group = self._process.pid

    def finish(self) -> dict[str, Any]:
        """Wait for the answer and for the group's end.

        Raises:
            Stopped: a signal came; also where the stage was done before it could stop, so that no
                other one starts.
            StageDied: there is no answer, or the answer is that the engine died.
            StillroomError: the stage failed.
        """
        before = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        try:
            answer = self._talk()
        finally:
            end_group(self.group)
            self._process.wait()
            self._line.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._checked(answer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self._signals:
            return  # where a terminal ends, shell and kernel may both say so
        self._signals += 1
        if self._signals == 1:
            self._deadline = time.monotonic() + GRACE_SECONDS
            self._process.send_signal(signal.SIGTERM)

    def _talk(self) -> dict[str, Any] | None:
        """Hand over the job; the answer, or None where there is none."""
        try:
            self._line.sendall(json.dumps(self._message).encode() + b"\n")
            return self._wait()
        except ConnectionError:  # it died before it read its job
            return None

    def _wait(self) -> dict[str, Any] | None:
        self._line.settimeout(0.2)
        received, died = b"", False
        while self._signals < 2 and time.monotonic() < self._deadline:
            self._screen.tick()
            try:
                chunk = self._line.recv(1 << 20)
            except TimeoutError:
                # Children that it forked may hold the socket open, so its death need not end the
                # line. Nothing came after it was seen dead: all that it sent is read.
                if died:
                    break
                died = self._process.poll() is not None
                continue
            if not chunk:
                break
            *lines, received = (received + chunk).split(b"\n")
            for said in map(json.loads, lines):
                if "event" not in said:
                    return dict(said)
                self._screen.hear(said)
        return None

    def _checked(self, answer: dict[str, Any] | None) -> dict[str, Any]:
        if self._signals:
            raise Stopped()
        if answer is None:
            raise StageDied(
                f"{self._message['name']}: its process died (exit status "
                f"{self._process.returncode}; -9 is often the system running out of memory).",
                (
                    f"Finished rows are kept; see {self._message['log']}. Run the same command to go "
                    "on."
                ),
            )
        if answer.get("died"):
            raise StageDied(answer["error"], f"Finished rows are kept; see {self._message['log']}.")
        if "error" in answer:
            where = (
                f"\nThe log has more: {self._message['log']}" if answer.get("unexpected") else ""
            )
            error = StillroomError(answer["error"] + where)
            error.exit_code = answer["exit_code"]
            raise error
        return answer


def end_group(group: int) -> None:
    """Kill what is left of a process group and wait until nothing of it lives.

    Raises:
        StillroomError: something of it does not die.
    """
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + GRACE_SECONDS
    while members := group_members(group):
        if time.monotonic() > deadline:
            raise StillroomError(
                f"processes {members} of a finished stage do not die. End them, then run again."
            )
        time.sleep(0.02)


def group_members(group: int) -> list[int]:
    """Living processes of a group; a zombie has given its memory back and does not count."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members
