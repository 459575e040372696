"""A copy of the product with an example applied to it.

The example is what somebody changes who adds an engine, say.

An example's folder mirrors the product's. A file is copied to its place. A file `NAME.insert` adds
lines to NAME, in parts between lines of `====`: a part's first line stands in NAME once, and the
others come after it.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from kit import ENVIRONMENT, command
from loaded import process_of

ROOT = Path(__file__).parents[2]
EXAMPLES = Path(__file__).parent / "examples"
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
    words = [[str(word) for word in line] for line in lines]
    process = process_of(_commands, folder, words, ENVIRONMENT | {"PYTHONPATH": str(folder)})
    process.join(timeout=300)
    said = (folder / "said").read_text()
    assert process.exitcode == 0, said
    printed: list[str] = json.loads(said)
    return printed


def _commands(folder: Path, lines: Sequence[Sequence[str]], environment: Mapping[str, str]) -> None:
    """Run command lines in a process that has loaded the libraries.

    The product and the helpers are read anew, those of the copy.
    """
    os.environ.clear()
    os.environ |= environment
    for name in [name for name, module in sys.modules.items() if _ours(name, module)]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        kit = import_module("kit")
        assert Path(import_module("stillroom").__file__ or "").is_relative_to(folder)
        said = json.dumps([kit.stillroom(*line).stdout for line in lines])
    except BaseException:
        (folder / "said").write_text(traceback.format_exc())
        raise
    (folder / "said").write_text(said)


def _ours(name: str, module: Any) -> bool:
    file = getattr(module, "__file__", None)
    helper = file is not None and Path(file).parent == Path(__file__).parent
    return helper or name.split(".")[0] == "stillroom"


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
