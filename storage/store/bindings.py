"""Bindings: the ids that a recipe's names stood for. The newest record counts.

A recipe names a model and a source; what lies under these names may change. `bindings/<names>/`
holds what they stood for, counted up from 00000000.json.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from ..bounds import integer, string, understood
from ..errors import IntegrityError
from ..files.base import Files
from ..keys import seal, unseal

ENGINES = "engines"
"""Folder of what runs each teacher (`bind_engine`)."""
_NUMBERED = re.compile(r"[0-9]{8}\.json")
_LAST = 10**8 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """The ids behind a recipe."""

    teacher_id: str
    author_id: str
    data_id: str
    vocab_size: int
    """Of the teacher; where texts are classified, how many classes it has."""
    context_tokens: int
    author_context_tokens: int
    day: str | None = None
    """The day that a chat template which reads the clock is told, as 2026-11-29. None: it reads
    none."""
    imported: bool = False
    """Whether the rows came with `stillroom import`: nobody can make reference targets of held-out
    rows."""


def write_binding(files: Files, folder: str, binding: Binding) -> None:
    """Keep a binding in a folder of a store, as its newest."""
    record = seal(asdict(binding))
    while newest_binding(files, folder) != binding:
        if files.put_if_absent(_next(files, folder), record):
            return
        # Another writer took the number, perhaps for the same binding.


def _next(files: Files, folder: str) -> str:
    newest = _newest(files, folder)  # not how many there are: one may have been lost
    last = -1 if newest is None else int(PurePosixPath(newest).stem)
    if last == _LAST:
        raise IntegrityError(
            f"{newest}: the last number that there is, so nothing can follow. It was not counted "
            "up to: delete this file."
        )
    return f"{folder}/{last + 1:08d}.json"


def bound_engine(files: Files, teacher_id: str) -> str | None:
    """What runs a teacher for all that share a store, as the first worker decided.

    None: nobody has decided yet.
    """
    name = _engine_file(teacher_id)
    try:
        record = unseal(files.read(name), name)
    except FileNotFoundError:
        return None
    with understood(name, "engine"):
        return string(record["engine"])


def bind_engine(files: Files, teacher_id: str, engine: str) -> str:
    """Decide what runs a teacher; returns what the first worker decided."""
    files.put_if_absent(_engine_file(teacher_id), seal({"engine": engine}))
    return bound_engine(files, teacher_id) or engine


def _engine_file(teacher_id: str) -> str:
    return f"{ENGINES}/{teacher_id}.json"


def newest_binding(files: Files, folder: str) -> Binding | None:
    """What was written last into a folder, None if nothing was."""
    name = _newest(files, folder)
    return None if name is None else _read(files, name)


def all_bindings(files: Files) -> dict[str, Binding]:
    """The newest binding of each recipe's names, by the record that holds it."""
    written = [name for name, *_ in files.walk("bindings") if name.endswith(".json")]
    folders = sorted({name.rpartition("/")[0] for name in written})
    newest = [name for folder in folders if (name := _newest(files, folder)) is not None]
    return {name: _read(files, name) for name in newest}


def _read(files: Files, name: str) -> Binding:
    record = unseal(files.read(name), name)
    with understood(name, "binding"):
        _check(record)
        return Binding(**record)


def _check(record: dict[str, Any]) -> None:
    for field in ("teacher_id", "author_id", "data_id"):
        string(record[field])
    for field in ("vocab_size", "context_tokens", "author_context_tokens"):
        integer(record[field])
    if record.get("day") is not None:
        string(record["day"])
    if not isinstance(record.get("imported", False), bool):
        raise ValueError("imported is neither true nor false")


def _newest(files: Files, folder: str) -> str | None:
    """The record with the highest number."""
    names = [name for name in files.names(folder) if _NUMBERED.fullmatch(name)]
    return f"{folder}/{names[-1]}" if names else None
