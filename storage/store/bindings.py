"""Bindings: the ids that a recipe's names stood for, kept in the store by number; the newest counts."""

from dataclasses import asdict, dataclass
from typing import Any

from ..files.base import Files
from ..keys import seal, unseal
from .store import Store


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
    imported: bool = False
    """Whether the rows came with `stillroom import`: nobody can make reference targets of held-out
    rows."""


def write_binding(files: Files, folder: str, binding: Binding) -> None:
    """Keep a binding in a folder of a store."""
    record = seal(asdict(binding))
    while newest_binding(files, folder) != binding and not files.put_if_absent(
        _next(files, folder), record
    ):
        pass  # another writer took the number


def _next(files: Files, folder: str) -> str:
    newest = files.names(folder)[-1:]  # not how many there are: one may have been lost
    number = int(newest[0].removesuffix(".json")) + 1 if newest else 0
    return f"{folder}/{number:08d}.json"


def newest_binding(files: Files, folder: str) -> Binding | None:
    """What was written last into a folder, None if nothing was."""
    names = files.names(folder)
    if not names:
        return None
    name = f"{folder}/{names[-1]}"
    return Binding(**unseal(files.read(name), name))


def bindings_of(store: Store, data_ids: set[Any]) -> list[str]:
    """The records that bind names to these data, by which the recipes that made them know a published folder."""
    folders = {
        name.rpartition("/")[0]
        for name, _, _ in store.files.walk("bindings")
        if name.endswith(".json")
    }
    newest = {folder: newest_binding(store.files, folder) for folder in sorted(folders)}
    fits = [
        folder
        for folder, found in newest.items()
        if found is not None and found.data_id in data_ids
    ]
    return [f"{folder}/{store.files.names(folder)[-1]}" for folder in fits]


def all_bindings(files: Files) -> list[Binding]:
    """The newest binding of each recipe's names; equal ones once."""
    folders = {
        name.rpartition("/")[0] for name, _, _ in files.walk("bindings") if name.endswith(".json")
    }
    return list(
        dict.fromkeys(
            found
            for folder in sorted(folders)
            if (found := newest_binding(files, folder)) is not None
        )
    )
