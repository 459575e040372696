"""In a mount namespace of its own, fill a small disk in the middle of every stage.

Then free it, and go on. `full_disk.py FOLDER TEACHER PROMPTS` mounts a tmpfs at FOLDER, where store
and run folder lie. Each stage's log shows that the stage has begun; then a ballast takes all that
is left, and the stage goes on. All commands are processes forked from this one, which loads torch
once. It prints one JSON object.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from forked import fork, start
from kit import last_json, stillroom, write_recipe
from loaded import AHEAD
from running import at_worker_start

STAGES = ("data", "generate", "score", "train", "evaluate")
PATIENCE = 200.0
WAITING = """
    import time
    from stillroom.pipeline.run import worker
    plain = worker.do
    def when_full(*job):
        while not os.path.exists({full!r}):
            time.sleep(0.005)
        return plain(*job)
    worker.do = when_full
"""


def main(folder: Path, teacher: Path, source: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", folder], check=True)
    for name in AHEAD:
        import_module(name)
    recipe = write_recipe(
        folder, teacher, source, data={"source": str(source), "format": "prompt", "holdout": 4}
    )
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[stage] = full_in(recipe, stage, beside=folder.parent / stage)
        finish(recipe, stage)
    found["results"] = last_json(stillroom("run", recipe, "--json"))["results"]
    found["verified"] = last_json(stillroom("verify", folder / "store", "--json"))["ok"]
    sys.stdout.write(json.dumps(found) + "\n")


def full_in(recipe: Path, stage: str, *, beside: Path) -> dict[str, object]:
    """Run; once the stage has begun take all space; what came of it."""
    full, said = beside / "full", beside / "said"
    site = at_worker_start(beside, WAITING.format(full=str(full)))
    log = recipe.parent / "run" / "logs" / f"{stage}.log"
    runner = start(
        ["run", recipe], said=said, environment={"PYTHONPATH": site}, before=lambda: None
    )
    deadline = time.monotonic() + PATIENCE
    while not log.exists() and runner.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    ballast = recipe.parent / "ballast"
    fill(ballast)
    full.touch()
    while runner.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    ballast.unlink()
    return {"code": runner.code, "said": said.read_text()}


def finish(recipe: Path, stage: str) -> None:
    """Do what the stage left undone, in a process of its own.

    One that read tables is not forked from.
    """
    pid = fork(lambda: stillroom("run", recipe, "--until", stage))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"{stage}: exit code {code}"


def fill(path: Path) -> None:
    """All that is left, to the last page."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
