"""What runs on a node of a Ray cluster: one command in a process that ends with its actor.

Ray loads this module on every node, so it imports nothing of ours.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

# The kernel sends a process this signal when the thread that started it ends, however it ends: an
# actor that is killed leaves no worker behind on its GPUs.
# (1 is PR_SET_PDEATHSIG, which exec keeps.)
_TIED = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) and os.execvp(sys.argv[2], sys.argv[2:])"
)
SAID = 4000
"""Characters of its last words that are handed on."""


class RayWorker:
    """An actor holds a slot of the cluster while its command runs.

    Its `stop` is called meanwhile.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def there(self) -> bool:
        """Answers as soon as the actor has its slot."""
        return True

    def run(
        self, words: Sequence[str], folder: str, environment: Mapping[str, str]
    ) -> tuple[int, str]:
        """Give the exit code of `stillroom WORDS`, and its last words.

        The exit code is negative where a signal killed it.
        """
        command = [sys.executable, "-m", "stillroom", *words]
        if sys.platform == "linux":
            command = [sys.executable, "-c", _TIED, str(os.getpid()), *command]
        with self._lock:
            if self._stopped:
                return 130, ""
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        said, _ = self._process.communicate()
        return self._process.returncode, said[-SAID:].strip()

    def stop(self) -> None:
        """Ask the command to commit and leave."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
