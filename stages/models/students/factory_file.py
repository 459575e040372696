"""`student.factory`, a function in a local file that makes a student: which files that is.

Nothing here runs them.
"""

import ast
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from ....storage.errors import UsageError
from ....storage.keys import content_id
from ...recipe.sections import Recipe, Student

FIELD = "student.factory"
FACTORY = "factory.json"
"""In place of config.json in the folder of such a student."""


def factory_file(factory: str) -> tuple[Path, str]:
    """The file and the function of `path/to/file.py:function` or `module:function`.

    A module is a file below the folder of the command: `nets.small` is `nets/small.py`.

    Raises:
        UsageError: there is no such file.
    """
    named, _, function = factory.rpartition(":")
    name = named if named.endswith(".py") else f"{named.replace('.', '/')}.py"
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(
            f"{FIELD}: no file {path} (looked in {Path.cwd()}). Write file.py:function, or "
            "module:function of a module below this folder."
        )
    return path, function


def factory_files(student: Student) -> dict[str, str]:
    """Hashes of the files that a factory is, by their names from its folder.

    Its own comes first, then those beside it.

    These are what import statements name, of it and of what it imports so, and what `args` name.

    Raises:
        UsageError: there is no such file, or `args` hold the path of another folder.
    """
    path = factory_file(str(student.factory))[0].absolute()
    folder, named = path.parent, [path]
    found: dict[str, str] = {}
    while named:
        file = named.pop(0)
        name = file.relative_to(folder).as_posix()
        if name not in found:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
            named += [one for one in _imported(file, folder) if one.is_relative_to(folder)]
    for value in _texts(student.args):
        _refuse_absolute(value, path.name)
        beside = folder / value
        if os.path.isfile(beside):  # of a text that is no name it says no
            found[PurePath(value).as_posix()] = hashlib.sha256(beside.read_bytes()).hexdigest()
    return found


def factory_id(files: dict[str, str]) -> str:
    """Who a student is that these files make: of one file its hash."""
    only, *more = files.values()
    return content_id("factory", files=files) if more else only


def files_of_module(folder: Path, name: str) -> Iterator[Path]:
    """The files that Python runs for a module `a.b`, where it is one of this folder.

    The last part may be no module.
    """
    place = folder
    for part in name.split("."):
        place /= part
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                yield file
                break


def _imported(file: Path, folder: Path) -> Iterator[Path]:
    """Files that a file's import statements name, wherever these stand in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # who runs it says so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                yield from files_of_module(folder, one.name)
        elif isinstance(node, ast.ImportFrom):
            above = [folder, *file.parents]
            base = above[min(node.level, len(above) - 1)]
            for one in node.names:
                yield from files_of_module(
                    base, f"{node.module}.{one.name}" if node.module else one.name
                )


def _texts(value: Any) -> Iterator[str]:
    """All texts of an option, whatever they stand in."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for held in value.values():
            yield from _texts(held)
    elif isinstance(value, list):
        for held in value:
            yield from _texts(held)


def _refuse_absolute(value: str, file: str) -> None:
    """Refuse a path of this machine.

    It would stand in the student's folder and be looked for wherever that goes.

    Raises:
        UsageError: it is one.
    """
    path = PurePath(value)
    if value.startswith("~/") or (path.is_absolute() and len(path.parts) > 1):
        raise UsageError(
            f"student.args: {value!r} is a path of this machine, which would stand in the saved "
            f"student. Put the file beside {file}, write its name from there, and let {file} open "
            "it as Path(__file__).parent / name: its content is then part of who the student is."
        )


def refuse_code(recipe: Recipe, *, allowed: bool) -> None:
    """Refuse to run a recipe's code where the command line does not say so.

    Raises:
        UsageError: it is to be run.
    """
    factory = recipe.student.factory if recipe.student is not None else None
    if factory is None or allowed:
        return
    path, _ = factory_file(factory)
    raise UsageError(
        f"{FIELD}: {factory} is code ({path}), which would be run with all that you may do here. "
        "Read it, and add --allow-code to the command if it may."
    )
