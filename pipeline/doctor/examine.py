"""All that the doctor looks at, in order."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from ...stages.workers.devices import cores
from ...storage.errors import UsageError
from ...storage.words import counted
from ..printing.numbers import size
from . import installed, place
from .finding import Finding, ok
from .libraries import Libraries


def examine(store: str | None) -> Iterator[Finding]:
    """Of this machine, and of a store's place; what takes longest is started first and told last.

    Raises:
        UsageError: the store is a file.
    """
    if store is not None and Path(store).is_file():
        raise UsageError(
            f"doctor: {store} is a file, expected the folder or URL of a store. Of a recipe, name "
            "what its storage.dir says."
        )
    with Libraries() as libraries:
        yield from _examined(store, libraries)


def _examined(store: str | None, libraries: Libraries) -> Iterator[Finding]:
    yield from installed.look()
    yield ok(
        "machine",
        f"{counted(cores(), 'core')}, {size(psutil.virtual_memory().total)} memory",
    )
    if store is not None:
        yield from place.look(store)
    yield from libraries.look()
