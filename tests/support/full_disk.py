"""In a mount namespace of its own: fills a small disk in the middle of every stage, frees it, and goes on.

`full_disk.py FOLDER TEACHER PROMPTS` mounts a tmpfs at FOLDER, where store and run folder lie. Each stage's log shows
that the stage has begun; then a ballast takes all that is left. What the stage left undone is done
in this process, which loads torch once. Prints one JSON object.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kit import ENVIRONMENT, command, last_json, stillroom, write_recipe

STAGES = ("data", "generate", "score", "train", "evaluate")
PATIENCE = 200.0


def main(folder: Path, teacher: Path, source: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", folder], check=True)
    recipe = write_recipe(
        folder, teacher, source, data={"source": str(source), "format": "prompt", "holdout": 4}
    )
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[stage] = full_in(recipe, stage)
        stillroom("run", recipe, "--until", stage)
    found["results"] = last_json(stillroom("run", recipe, "--json"))["results"]
    found["verified"] = last_json(stillroom("verify", folder / "store", "--json"))["ok"]
    sys.stdout.write(json.dumps(found) + "\n")


def full_in(recipe: Path, stage: str) -> dict[str, object]:
    """Run; once the stage has begun take all space; what came of it."""
    log = recipe.parent / "run" / "logs" / f"{stage}.log"
    runner = subprocess.Popen(
        command("run", recipe),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + PATIENCE
    while not log.exists() and runner.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    ballast = recipe.parent / "ballast"
    fill(ballast)
    said = "".join(runner.communicate(timeout=PATIENCE))
    ballast.unlink()
    return {"code": runner.returncode, "said": said}


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
