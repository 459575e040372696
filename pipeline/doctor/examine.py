"""All that the doctor looks at, in order."""

import os
from collections.abc import Iterator

import psutil

from ..numbers import size
from . import installed, place
from .finding import Finding, ok
from .libraries import Libraries


def examine(store: str | None) -> Iterator[Finding]:
    """What is found of this machine, and of a store's place.

    What takes longest is started first and told last.
    """
    with Libraries() as libraries:
        yield from _examined(store, libraries)


def _examined(store: str | None, libraries: Libraries) -> Iterator[Finding]:
    yield from installed.look()
    yield ok(
        "machine",
        f"{len(os.sched_getaffinity(0))} cores, {size(psutil.virtual_memory().total)} memory",
    )
    if store is not None:
        yield from place.look(store)
    yield from libraries.look()
