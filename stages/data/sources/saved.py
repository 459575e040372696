"""Records that the library `datasets` reads: folders that it saved, and the Hub."""

from collections.abc import Iterator
from typing import Any

from ....storage.errors import UsageError
from .class_names import classes_of
from .readers import Record, of_a_table


def read_datasets(
    name: str, split: str, *, field: str, saved: bool, asked: bool
) -> Iterator[Record]:
    """Every record of a split.

    Args:
        name: A folder that `datasets` saved, or a dataset of the Hub.
        split: Its split.
        field: The field of the recipe that names it.
        saved: Whether it is a folder.
        asked: Whether the recipe names the split; else a folder without splits is read as it is.

    Raises:
        UsageError: `datasets` cannot read it, or it has no such split.
    """
    try:
        loaded = _saved(name, split, asked=asked) if saved else _streamed(name, split)
        for number, record in enumerate(_undecoded(loaded), 1):
            yield f"{name}:{number}", of_a_table(record)
    except Exception as error:
        raise UsageError(
            f"{field}: `datasets` cannot read {name}, split {split!r}: {error}"
        ) from error


def classes_on_the_hub(name: str, split: str, column: str) -> tuple[str, ...]:
    """Names that a dataset of the Hub gives the classes of a column.

    (): it gives none, or there is no answer, which reading reports.
    """
    try:
        features = _streamed(name, split).features
    except Exception:
        return ()
    return classes_of(features.to_dict(), column) if features else ()


def _undecoded(loaded: Any) -> Any:
    """The same with the bytes of images: decoding them is not the library's work here."""
    import datasets

    for name, kind in (loaded.features or {}).items():
        if isinstance(kind, datasets.Image):
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
    return loaded


def _streamed(name: str, split: str) -> Any:
    import datasets

    return datasets.load_dataset(name, split=split, streaming=True, trust_remote_code=False)


def _saved(name: str, split: str, *, asked: bool) -> Any:
    import datasets

    loaded = datasets.load_from_disk(name)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise LookupError(f"it was saved with {', '.join(loaded)}")
        return loaded[split]
    known = str(loaded.split or "train")
    if asked and split != known:
        raise LookupError(f"it was saved as the one split {known}")
    return loaded
