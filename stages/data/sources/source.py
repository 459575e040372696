"""A source of records as the recipe names it.

There is one of what is trained on, and one of the held-out rows of the user's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ....storage.credentials import as_written
from ....storage.errors import UsageError
from ....storage.files.base import file_sha256
from ....storage.store.hashes import FileHashes
from ...ledger.routes import reads_source
from ...recipe.sections import Recipe
from .class_names import classes_in_files
from .files import Found, find_files
from .names import ending
from .readers import Record, read_file
from .saved import classes_on_the_hub, read_datasets


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file, glob, folder or Hub id, and one of its splits."""

    name: str
    field: str
    """The field of the recipe that names it."""
    split: str
    split_field: str
    asked: bool
    """Whether the recipe names the split; else files of no split are read as they are."""
    limit: int | None = None
    held_out: bool = False
    """Whether its rows judge, and are not trained on."""
    images: bool = False
    """Whether its records are images."""
    named: bool = False
    """Whether the recipe asks for the names of its files."""

    def files(self) -> Found | None:
        """Its files; None where it is a dataset of the Hub.

        Raises:
            UsageError: nothing is there, a file cannot be read, or none is of the split.
        """
        found = find_files(self.name, field=self.field, images=self.images)
        if found is None:
            return None
        if found.one and self.held_out and self.field == "data.source":
            raise UsageError(
                f"{self.split_field}: {self.name} is one file, which has no other split. Name the "
                "held-out rows in evaluate.source."
            )
        return found.of_split(self.split, field=self.split_field, asked=self.asked)

    def records(self) -> Iterator[Record]:
        """Every record, in order, unreadable ones included."""
        found = self.files()
        if found is None or found.saved:
            yield from read_datasets(
                self.name,
                self.split,
                field=self.field,
                saved=found is not None,
                asked=self.asked,
            )
            return
        for file in found.files:
            yield from read_file(file, found.name_of(file), field=self.field)

    def classes(self, column: str) -> list[tuple[str, ...]]:
        """Names that the source gives the classes of a column of ids, in their order, once each."""
        found = self.files()
        if found is None:
            named = [classes_on_the_hub(self.name, self.split, column)]
        else:
            named = [*classes_in_files(found.files, column)]
        return [names for names in dict.fromkeys(named) if names]

    def fingerprint(self, hashes: FileHashes) -> list[str]:
        """What the source holds now: kind and hash of every local file, or the Hub's commit."""
        found = self.files()
        if found is not None and found.images:
            # Of many small files: by their paths, which name their classes, and hashed each time.
            return [f"{found.name_of(f)} {file_sha256(f)}" for f in found.files]
        if found is not None:
            names = [f" {found.name_of(f)}" if self.named else "" for f in found.files]
            return [
                f"{ending(f)} {hashes.sha256(f)}{name}"
                for f, name in zip(found.files, names, strict=True)
            ]
        from huggingface_hub import HfApi

        try:
            return [self.name, self.split, str(HfApi().dataset_info(self.name).sha)]
        except Exception as error:
            raise UsageError(
                f"{self.field}: {self.name} is no local file and the Hub does not answer for it "
                f"({type(error).__name__}). Check the name and the network."
            ) from error


def training_source(recipe: Recipe) -> Source:
    """What is trained on."""
    data = recipe.data
    return Source(
        name=data.source,
        field="data.source",
        split=data.split,
        split_field="data.split",
        asked="split" in data.model_fields_set,
        limit=data.limit,
        images=data.records.image,
        named=reads_source(recipe),
    )


def held_out_source(recipe: Recipe) -> Source | None:
    """The rows that judge, where the recipe names them."""
    evaluate = recipe.evaluate
    if not evaluate.names_rows:
        return None
    return Source(
        name=evaluate.source or recipe.data.source,
        field="evaluate.source" if evaluate.source else "data.source",
        split=evaluate.split or "test",
        split_field="evaluate.split",
        asked=evaluate.split is not None,
        limit=evaluate.limit,
        held_out=True,
        images=recipe.data.records.image,
        named=reads_source(recipe),
    )


def sources_of(recipe: Recipe) -> list[Source]:
    """All of them: what judges comes first, since its prompts are not trained on."""
    held_out, train = held_out_source(recipe), training_source(recipe)
    return [train] if held_out is None else [held_out, train]


def all_records(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any] | str, bool]]:
    """Where a record stands, the record, and whether it is held out by name; of every source."""
    for source in sources_of(recipe):
        for where, record in islice(source.records(), source.limit):
            yield f"held out: {where}" if source.held_out else where, record, source.held_out


def left_out(recipe: Recipe) -> list[str]:
    """What folders and globs leave out, a sentence each.

    What another source reads is not left out.
    """
    found = [files for source in sources_of(recipe) if (files := source.files())]
    read = {file for files in found for file in files.files}
    said = {files.source: files.left_out_note(read) for files in found}
    return [note for note in said.values() if note]


def refuse_other_order(recipe: Recipe, classes: Sequence[str]) -> None:
    """Refuse labels that are ids in another order than the teacher's.

    Each would be taken for another class.

    Raises:
        UsageError: a source names the teacher's classes in an order of its own.
    """
    for source in sources_of(recipe):
        for ours in ("label", "labels"):
            column = recipe.data.columns.get(ours, ours)
            for names in source.classes(column):
                own, theirs = ([n.casefold() for n in some] for some in (names, classes))
                if own != theirs and sorted(own) == sorted(theirs):
                    raise UsageError(
                        f"{source.field}: column {column!r} of {as_written(source.name)} numbers "
                        f"its classes {', '.join(names)}, the teacher {', '.join(classes)}: the "
                        "same in another order. Put their names in place of the ids (`datasets`: "
                        "int2str), or use a teacher with this order."
                    )
