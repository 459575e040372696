"""A copy of the product with an example applied to it: what somebody changes who adds an engine, say.

An example's folder mirrors the product's. A file is copied to its place. A file `NAME.insert` adds
lines to NAME, in parts between lines of `====`: a part's first line stands in NAME once, and the
others come after it.
"""

import filecmp
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit import ENVIRONMENT, command

ROOT = Path(__file__).parents[2]
EXAMPLES = Path(__file__).parent / "examples"
COMMANDS = Path(__file__).parent / "commands.py"
FLOORS = ("storage", "stages", "pipeline")


def extended(folder: Path, example: str) -> Path:
    """A folder to import `stillroom` from: the product's copy, with the example's changes."""
    product = folder / "stillroom"
    caches = shutil.ignore_patterns("__pycache__")
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, product / floor, ignore=caches)
    for file in ROOT.glob("__*__.py"):
        shutil.copy(file, product)
    for file in sorted((EXAMPLES / example).rglob("*.*")):
        place = product / file.relative_to(EXAMPLES / example)
        if file.suffix == ".insert":
            _insert(place.with_suffix(""), file.read_text())
        elif file.suffix == ".py":
            shutil.copy(file, place)
    return folder


def _insert(file: Path, parts: str) -> None:
    text = file.read_text()
    for part in parts.split("====\n"):
        anchor = part[: part.index("\n") + 1]
        assert text.count(anchor) == 1, f"{file}: {anchor!r} should stand there once"
        text = text.replace(anchor, part)
    file.write_text(text)


def changed_files(folder: Path) -> list[str]:
    """The product's files that differ from this checkout's, or are new."""
    product = folder / "stillroom"
    files = [path for path in product.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = [path.relative_to(product) for path in files]
    return sorted(
        name.as_posix()
        for name in names
        if not (ROOT / name).exists() or not filecmp.cmp(product / name, ROOT / name, shallow=False)
    )


def stillroom_in(folder: Path, *lines: Sequence[Any]) -> list[str]:
    """Run command lines of the extended product to their end, in one process; what each printed."""
    done = subprocess.run(
        [sys.executable, COMMANDS],
        input=json.dumps([[str(word) for word in line] for line in lines]),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(folder)},
        cwd=folder,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    printed: list[str] = json.loads(done.stdout.splitlines()[-1])
    return printed


def refused_in(folder: Path, *words: Any) -> str:
    """What a command line of the extended product says that ends with exit code 2."""
    done = subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(folder)},
    )
    assert done.returncode == 2, f"{done.stdout}\n{done.stderr}"
    return done.stderr


def last_line(printed: str) -> dict[str, Any]:
    """The object that `--json` puts there."""
    found: dict[str, Any] = json.loads(printed.rstrip("\n").split("\n")[-1])
    return found
