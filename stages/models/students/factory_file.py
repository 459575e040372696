"""`student.factory`, a function in a local file that makes a student: which file, its hash. Nothing here runs it."""

import hashlib
from pathlib import Path

from ....storage.errors import UsageError
from ...recipe.sections import Recipe

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


def factory_id(factory: str) -> str:
    """Hash of the file's bytes; what it imports is not covered."""
    path, _ = factory_file(factory)
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
