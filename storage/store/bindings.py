"""Bindings: the ids that a recipe's names stood for, one record each time they changed; the newest counts.

A recipe names a model and a source; what lies under these names may change. `bindings/<names>/`
holds what they stood for, counted up from 00000000.json.
"""

from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from ..files.base import Files
from ..keys import seal, unseal


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
    """What a chat template that reads the clock is told, as 2026-11-29; None: it does not read it."""
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
    number = 0 if newest is None else int(PurePosixPath(newest).stem) + 1
    return f"{folder}/{number:08d}.json"


def newest_binding(files: Files, folder: str) -> Binding | None:
    """What was written last into a folder, None if nothing was."""
    name = _newest(files, folder)
    return None if name is None else Binding(**unseal(files.read(name), name))


def all_bindings(files: Files) -> dict[str, Binding]:
    """The newest binding of each recipe's names, by the record that holds it."""
    written = [name for name, *_ in files.walk("bindings") if name.endswith(".json")]
    folders = sorted({name.rpartition("/")[0] for name in written})
    newest = [name for folder in folders if (name := _newest(files, folder)) is not None]
    return {name: Binding(**unseal(files.read(name), name)) for name in newest}


def _newest(files: Files, folder: str) -> str | None:
    """The record with the highest number."""
    names = files.names(folder)
    return f"{folder}/{names[-1]}" if names else None
