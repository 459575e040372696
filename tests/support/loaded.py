"""Commands under way, forked from a server that has loaded torch.

They are what `subprocess.Popen` is, without the start.

The server is a process of its own, so that no thread of a test is forked along; it starts with the
first command and ends with the tests. `forked.py` says what a command is there. Where how a process
starts is the subject, use `running.start_whole`.
"""

import multiprocessing
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

import forked
from kit import ENVIRONMENT

AHEAD = [
    *"__main__ loaded pyarrow.parquet duckdb torch huggingface_hub.hf_api".split(),
    *"transformers.models.llama.modeling_llama transformers.generation".split(),
    *(f"stillroom.stages.{name}.stage" for name in "data generate score train evaluate".split()),
    *"stillroom.stages.train.trainer stillroom.stages.models.students.saving".split(),
    *"stillroom.stages.engines.hf stillroom.pipeline.run.runner".split(),
    *"pandas torch.utils.tensorboard jinja2".split(),
    *"matplotlib.figure matplotlib.backends.backend_svg".split(),
]
"""What commands and stages import, read once."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(AHEAD)


@dataclass(kw_only=True, eq=False)
class Loaded:
    """A command under way, as far as tests ask a `Popen` for it."""

    process: ForkServerProcess
    said: tuple[Path, Path]
    """What it prints: output and errors."""

    @property
    def pid(self) -> int:
        """Of its process, which leads a group of its own."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative where a signal killed it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code, when it has ended."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("stillroom", timeout or 0.0, self.errors())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed, when it has ended."""
        self.wait(timeout)
        return self.said[0].read_text(), self.errors()

    def errors(self) -> str:
        """What it has said so far."""
        return self.said[1].read_text() if self.said[1].exists() else ""

    def send_signal(self, number: int) -> None:
        """A signal, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)


def process_of(work: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """A function of a module at work in a process that has loaded all."""
    with patch.dict(os.environ, ENVIRONMENT, clear=True):  # whichever test is the first
        forkserver.ensure_running()
    process = SERVER.Process(target=work, args=arguments)
    process.start()
    return process


def start(
    words: Sequence[object],
    folder: Path,
    environment: Mapping[str, str],
    before: Callable[[], None] | None = None,
) -> Loaded:
    """A command line in a session of its own, after `before`.

    What it prints is kept in the folder.
    """
    kept = Path(tempfile.mkdtemp(prefix="said-", dir=folder))
    said = (kept / "out", kept / "err")
    process = process_of(_begin, list(map(str, words)), dict(environment), said, before)
    return Loaded(process=process, said=said)


def _begin(
    words: Sequence[str],
    environment: Mapping[str, str],
    said: tuple[Path, Path],
    before: Callable[[], None] | None,
) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ |= environment
    forked.run(words, before=before or (lambda: None))
