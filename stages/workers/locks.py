"""Locks of the operating system: each ends with the process that holds it, however it ends.

Nothing in a store rests on them. They keep the processes that share one run folder out of one
another's way.
"""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ...storage.files.base import explained
from .ranks import Ranks

_LOOK_SECONDS = 0.2


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock an open file without waiting.

    It is True if the lock is ours, False if another process has it, None if the file knows none.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a filesystem that knows no locks
        return None
    return True


@contextmanager
def worker_number(folder: Path) -> Iterator[int]:
    """The smallest number from 1 that no other living process has taken in this folder.

    It is held until the block ends.
    """
    for number in count(1):
        descriptor = _open(folder / f".worker-{number}")
        if try_lock(descriptor) is not False:
            break
        os.close(descriptor)
    try:
        yield number
    finally:
        os.close(descriptor)


def workers_at_work(folder: Path) -> int:
    """How many living processes have taken a number in this folder."""
    taken = 0
    for path in folder.glob(".worker-*"):
        descriptor = os.open(path, os.O_RDONLY)
        taken += try_lock(descriptor, shared=True) is False
        os.close(descriptor)
    return taken


@contextmanager
def only_one(
    path: Path, *, waiting: Callable[[str], None], look: Callable[[], None]
) -> Iterator[None]:
    """Wait until no other process is inside this block with this path.

    Args:
        path: A file for the lock; it holds who has it.
        waiting: Told once who that is, before a wait.
        look: Called again and again while waiting; what it raises ends the wait.
    """
    descriptor = _open(path)
    try:
        said = False
        while try_lock(descriptor) is False:
            if not said:
                waiting(path.read_text() or "another process")
                said = True
            look()
            time.sleep(_LOOK_SECONDS)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def one_group(
    path: Path, ranks: Ranks, *, waiting: Callable[[str], None], look: Callable[[], None]
) -> Iterator[None]:
    """`only_one` for all ranks of a group: the first takes the lock for them.

    `look` is called by all ranks at the same times while they wait, which they do for as long as it
    takes.
    """
    if ranks.first:

        def together() -> None:
            ranks.told(False)
            look()

        with only_one(path, waiting=waiting, look=together):
            ranks.told(True)
            yield
    else:
        while not ranks.told(None):
            look()
        yield


def _open(path: Path) -> int:
    with explained("cannot write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
