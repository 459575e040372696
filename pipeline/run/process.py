"""One process of a stage, in a process group of its own.

It is started, heard, and ended to the last of its group.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil

from ...stages.workers.ranks import of_nobody
from ...storage.errors import NotTogether, StillroomError
from .worker import JOB_FD

# OpenMP threads wait for one another by spinning. On a machine whose cores are shared that burns
# what the other thread needs: small models then train several times slower. A thousand turns keep
# the speed where the core is free.
SPIN = "1000"
GRACE_SECONDS = 30.0  # after it was asked to stop a process has this long to commit and leave


class StageDied(StillroomError):
    """A stage's process died, or the engine in it."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what} {advice}")
        self.what = what


class LostOthers(StageDied):
    """A rank has nobody to meet any more: another one died, or hangs. That one is why."""


class StageProcess:
    """A process group of a stage, started with a message and ended with an answer."""

    def __init__(self, message: dict[str, Any], environment: Mapping[str, str]) -> None:
        """`environment`: what it is told beside the runner's own."""
        self._message = message
        self._received, self._died, self._closed = b"", False, False
        self._answer: dict[str, Any] | None = None
        self.ended = False
        """Whether nothing more will come of it."""
        self._line, theirs = socket.socketpair()
        # Whatever launched the runner, this process is the rank that `environment` says, or none.
        told = {"GOMP_SPINCOUNT": SPIN} | of_nobody(os.environ) | dict(environment)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stillroom.pipeline.run.worker"],
                env=told | {JOB_FD: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.group = self._process.pid
        try:
            self._line.sendall(json.dumps(message).encode() + b"\n")
        except ConnectionError:  # it died before it read its job
            self.ended = True

    def listen(self, seconds: float) -> list[dict[str, Any]]:
        """Give the events that the process tells now, after waiting so long for one.

        Its answer and its death are noted.
        """
        self._line.settimeout(seconds)
        try:
            chunk = self._line.recv(1 << 20)
        except TimeoutError:
            # Children that it forked may hold the socket open, so its death need not end the line.
            # Nothing came after it was seen dead: all that it sent is read.
            self.ended, self._died = self._died, self._process.poll() is not None
            return []
        except ConnectionError:
            chunk = b""
        self.ended = not chunk
        *lines, self._received = (self._received + chunk).split(b"\n")
        said = [dict(json.loads(line)) for line in lines]
        self._answer = next((one for one in said if "event" not in one), None)
        self.ended = self.ended or self._answer is not None
        return [one for one in said if "event" in one]

    def interrupt(self) -> None:
        """Ask it to commit and leave."""
        self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End what is left of its group.

        Raises:
            StillroomError: something of it does not die.
        """
        if not self._closed:
            end_group(self.group)
            self._process.wait()
            self._line.close()
        self._closed = True

    def result(self) -> dict[str, Any]:
        """Its answer, once it is closed.

        Raises:
            StageDied: there is no answer, or the answer is that the engine died.
            NotTogether: several ranks cannot do it.
            StillroomError: the stage failed.
        """
        name, log, answer = self._message["name"], self._message["log"], self._answer
        if answer is None:
            who = self._message.get("who", "its process")
            raise StageDied(
                f"{name}: {who} died (exit status {self._process.returncode}; -9 is often the "
                "system running out of memory).",
                f"Finished rows are kept; see {log}. Run the same command to go on.",
            )
        if answer.get("died"):
            kind = LostOthers if answer.get("lost") else StageDied
            raise kind(answer["error"], f"Finished rows are kept; see {log}.")
        if answer.get("alone"):
            raise NotTogether(answer["error"])
        if "error" in answer:
            where = f"\nThe log has more: {log}" if answer.get("unexpected") else ""
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
