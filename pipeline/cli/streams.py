"""The standard streams of a command.

A terminal that is gone, or a stream that was never there, stops nothing. No secret goes there.
"""

import errno
import io
import os
import sys
from typing import Any, TextIO

from ...storage.credentials import cleaned, shown, without_values

_GONE = (errno.EIO, errno.EPIPE)  # what a terminal that hung up, and a pipe that nobody reads, say


class _Stream(io.FileIO):
    """Lines that nobody can see any more are lost."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return memoryview(data).nbytes


def outlive_terminal() -> None:
    """Let this process go on where what it prints goes nowhere, and print nothing that is hidden.

    A file on standard output keeps its errors: there they mean that a result is lost.
    """
    for descriptor in (0, 1, 2):
        _fill(descriptor)
    # What is shown of a store's rows is theirs: of these only values that are hidden are left out.
    sys.stdout = cleaned(_lasting(sys.stdout, 1, only_terminal=True), without_values)
    sys.stderr = cleaned(_lasting(sys.stderr, 2, only_terminal=False), shown)


def _fill(descriptor: int) -> None:
    """A file that is opened later must not become a standard stream, into which libraries print."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _lasting(stream: TextIO | None, descriptor: int, *, only_terminal: bool) -> TextIO:
    if stream is None:  # it was closed when the process began
        return open(os.devnull, "w")
    replaced = stream is not sys.__stdout__ and stream is not sys.__stderr__  # as a test does
    if replaced or (only_terminal and not stream.isatty()):
        return stream
    raw = io.BufferedWriter(_Stream(descriptor, "w", closefd=False))
    return io.TextIOWrapper(
        raw, encoding=stream.encoding, errors=stream.errors, line_buffering=True
    )
