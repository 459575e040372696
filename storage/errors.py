"""Every error that Stillroom raises on purpose, and the exit code each one ends a command with.

StillroomError            1   a failure that is not the user's mistake: disk full, out of memory
├── UsageError            2   a bad recipe, bad input or bad usage
│   └── NotLoaded             a model that this library cannot load
├── IntegrityError        3   what is on disk is not what was committed
└── Stopped             130   asked to stop by a signal; finished rows are committed
    └── Noticed          75   by a scheduler that gives notice: it is asked to start the job again

A message says what is wrong, what was found, what was expected, and what to do.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from .credentials import shown


class StillroomError(Exception):
    """A failure with a message for the user.

    It is shown without a traceback and without secrets.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(shown(message))


class UsageError(StillroomError):
    """The recipe, the input or the command is wrong."""

    exit_code = 2


class NotLoaded(UsageError):
    """A model that a library cannot load; another one may."""


class NotTogether(UsageError):
    """Several ranks cannot do it together; one process can."""


class IntegrityError(StillroomError):
    """Data on disk does not match its record, its schema or its checksum."""

    exit_code = 3


class Stopped(StillroomError):
    """A signal asked the run to stop."""

    exit_code = 130

    def __init__(
        self,
        message: str = "stopped by a signal; what is finished is kept. Run the same command again.",
    ) -> None:
        super().__init__(message)


class Noticed(Stopped):
    """A scheduler needs the machine; the exit code (EX_TEMPFAIL) asks it to start the job again."""

    exit_code = 75

    def __init__(self) -> None:
        super().__init__(
            "stopped by the scheduler's notice (SIGTERM); what is finished is kept. Exit code 75 "
            "asks it to start the same command again."
        )


class ProcessDied(StillroomError):
    """Nothing more can be done in this process; another one may go on."""


class EngineDied(ProcessDied):
    """The engine can do nothing more in this process."""


class RowError(Exception):
    """This row cannot be done; the others can. `reason` is the code that goes to `rejects`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def answered(what: str, action: str, kind: type[UsageError] = UsageError) -> Iterator[None]:
    """Whatever a library raises in this block, as a UsageError of one line.

    The line says what went wrong, its cause and what to do.

    Libraries that load models have no common type for what is wrong with one. What is no fault of
    the model goes on as it is: our own errors, a signal, memory that ran out.
    """
    try:
        yield
    except (StillroomError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which nothing here imports
            raise
        raise kind(f"{what} ({in_short(error).rstrip(' .')}). {action}") from error


def name_too_long(error: OSError, name: object) -> UsageError | None:
    """What to say of a name that is longer than the file system takes. None: another error."""
    if error.errno != errno.ENAMETOOLONG:
        return None
    said = str(error.filename or name)
    begin = said if len(said) <= 80 else f"{said[:80]} ..."
    return UsageError(
        f"{begin}: a path of {len(said):,} characters, which the file system does not take. A name "
        "has 255 bytes at most. Name another file or folder."
    )


def in_short(error: Exception) -> str:
    """What an error of a library says, in one line."""
    said = " ".join(str(error).split())
    said = said if len(said) <= 300 else f"{said[:300]} ..."
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
