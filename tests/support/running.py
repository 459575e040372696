"""Commands under way: started, looked at while they work, faults put into their stages."""

import os
import random
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loaded
import psutil
from forked import STAGE
from kit import ENVIRONMENT, command, stillroom
from loaded import Loaded

from stillroom.stages.workers import devices
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import TABLES

PATIENCE = 180.0
STARTED: list[subprocess.Popen[str] | Loaded] = []


def start(
    recipe: Path, *words: Any, before: Callable[[], None] | None = None, **environment: str
) -> Loaded:
    """`stillroom run`, in a process group of its own that is there at once (`loaded.py`).

    `before`: a function of a module that is done in its process first.
    """
    line = ["run", recipe, "--json", *words]
    process = loaded.start(line, recipe.parent, ENVIRONMENT | environment, before)
    STARTED.append(process)
    return process


def start_whole(recipe: Path, *words: Any) -> subprocess.Popen[str]:
    """The same as a shell starts it.

    Python loads all for seconds, and so does each stage.
    """
    process = subprocess.Popen(
        command("run", recipe, "--json", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def end_started() -> None:
    """Kill what a test that failed left behind, suspended stages too."""
    for process in STARTED:
        if process.poll() is None:
            for worker in ours(process):
                worker.kill()
            process.kill()
            process.wait()
    STARTED.clear()


def at_worker_start(folder: Path, code: str) -> str:
    """Code that every worker runs before its first own line.

    Returns:
        The PYTHONPATH that brings it about.
    """
    folder.mkdir()
    inside = textwrap.indent(textwrap.dedent(code), "    ")
    (folder / "sitecustomize.py").write_text(
        f"import os\nif 'STILLROOM_JOB_FD' in os.environ:\n{inside}"
    )
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def two_gpus() -> None:
    """Let this process think that it sees two GPUs, which are not there."""
    devices._counted = lambda named: 2  # type: ignore[assignment]


def until(condition: Callable[[], bool], what: str, *, patience: float = PATIENCE) -> None:
    """Look again and again; the wait ends with what is waited for, not with time."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience} s for {what}"
        time.sleep(0.01)


def alive(process: psutil.Process) -> bool:
    """A zombie is dead."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def ours(process: subprocess.Popen[str] | Loaded) -> list[psutil.Process]:
    """The stages of one runner (other tests may run beside this one)."""
    try:
        return [child for child in psutil.Process(process.pid).children() if _is_stage(child)]
    except psutil.NoSuchProcess:
        return []


def _is_stage(process: psutil.Process) -> bool:
    try:
        named = "stillroom.pipeline.run.worker" in process.cmdline() or process.name() == STAGE
        return named and alive(process)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def committed(recipe: Path, table: str) -> int:
    """Commits of a table."""
    folder = recipe.parent / "store" / "commits" / table
    return len(list(folder.glob("*.json"))) if folder.is_dir() else 0


def progress_of(recipe: Path, stage: str) -> Callable[[], bool]:
    """Whether a stage is somewhere in its middle."""
    if stage in ("generate", "score"):
        table = {"generate": "generations", "score": "soft_targets"}[stage]
        wanted = random.randint(1, 6)
        return lambda: committed(recipe, table) >= wanted
    if stage == "train":
        return lambda: bool(list((recipe.parent / "run").glob("train-*/checkpoints/step-*")))
    return (recipe.parent / "run" / "logs" / f"{stage}.log").exists


def kill_in_the_middle(recipe: Path, stage: str) -> None:
    """Run until a stage is at work, kill -9 the runner, and see the stage die with it.

    Then end the stage.
    """
    runner, there = start(recipe), progress_of(recipe, stage)
    until(lambda: there() or runner.poll() is not None, stage)
    worker = ours(runner)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.communicate()
    until(lambda: not any(alive(w) for w in worker), "its death")
    stillroom("run", recipe, "--until", stage)


def contents(store: Path) -> Iterator[tuple[str, dict[bytes, dict[str, object]]]]:
    """Every row of every table by its key; a key that is there twice is an error."""
    opened = Store.open(store)
    for table in TABLES:
        places: dict[str, list[int]] = {}
        for row in opened.index(table, ["key"]).to_pylist():
            places.setdefault(row["shard"], []).append(row["row"])
        rows = list(opened.rows(table, places))
        assert len({r["key"] for r in rows}) == len(rows)
        plain = {
            r["key"]: {k: v.tobytes() if hasattr(v, "tobytes") else v for k, v in r.items()}
            for r in rows
        }
        yield table, plain
