"""The split that a file's path names, in the words that the Hub knows."""

import re
from collections.abc import Iterable
from pathlib import PurePath

from ....storage.errors import UsageError

# As `datasets` reads a folder: whole words of a file's or a folder's name.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
ALL = "all"
"""In place of a split: every file, whatever its path names."""
_LETTERS = re.compile(r"[^\W\d_]+")


def split_of(path: PurePath, *, field: str) -> str | None:
    """train, validation, test, or None where a path names none of them.

    Raises:
        UsageError: it names two.
    """
    words = _LETTERS.findall(str(path).lower())
    named = sorted({_SPLITS[word] for word in words if word in _SPLITS})
    if len(named) > 1:
        raise UsageError(
            f"{field}: {path} names the splits {' and '.join(named)}. Rename it, name the files "
            f"to read by a glob, or read all with the split {ALL!r}."
        )
    return named[0] if named else None


def split_of_image(path: PurePath) -> str | None:
    """The split that the first folder of an image's path names.

    Other words in the path may be those of a class.
    """
    return _SPLITS.get(path.parts[0].lower()) if len(path.parts) > 1 else None


def refuse_either(paths: Iterable[PurePath], *, field: str) -> None:
    """Refuse images in a folder named like a split, beside others in folders of classes.

    Raises:
        UsageError: some are.
    """
    folders = sorted({path.parts[0] for path in paths if len(path.parts) == 2})
    splits = [folder for folder in folders if folder.lower() in _SPLITS]
    if splits and len(splits) < len(folders):
        other = next(folder for folder in folders if folder not in splits)
        raise UsageError(
            f"{field}: the folder {splits[0]} may be a split, or a class of images as {other} "
            "beside it. Put the folders of all classes into one that is called train."
        )


def known_split(name: str, *, field: str) -> str:
    """The split of local files that the recipe asks for.

    Raises:
        UsageError: it is a part of one, or no name that a file can carry.
    """
    if "[" in name:
        raise UsageError(
            f"{field}: {name!r} is a part of a split, which local files are not cut into. Name the "
            f"split alone, and how many of its records in {field.partition('.')[0]}.limit."
        )
    if name.lower() not in _SPLITS:
        raise UsageError(
            f"{field}: {name!r} is no split that local files can name: expected train, validation, "
            f"test or {ALL}. Name the files themselves, by a glob."
        )
    return _SPLITS[name.lower()]
