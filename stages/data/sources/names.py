"""What a file is by its name: of a kind that is read, or no data, and why."""

import os
from pathlib import Path, PurePath

TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".txt", ".md")
"""Endings that one of `PACKED` may follow."""
PACKED = (".gz", ".zst", ".bz2", ".xz")
TABLES = (".parquet", ".arrow")
IN_FOLDERS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".txt", ".arrow")
"""What counts in a folder. A README.md beside the data is not data, so .md is named by a file or a
glob."""
IN_GLOBS = (*IN_FOLDERS, ".md")
IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
"""Data where records are images: each such file is one."""
_COPIES = ("~", ".bak", ".tmp", ".temp", ".swp", ".part", ".crdownload")
_ABOUT = {
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "labels.json",
    "manifest.json",
    "provenance.json",
    "state.json",
}
"""What tools write beside the data."""


def ending(file: PurePath) -> str:
    """`.jsonl`, `.csv.gz` ...; its last suffix where nothing here reads it."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[0] in TEXTS and suffixes[1] in PACKED:
        return "".join(suffixes)
    return suffixes[-1] if suffixes else ""


def unpacked(file: PurePath) -> str:
    """Its ending without that of the packing."""
    kind = ending(file)
    plain, packing = os.path.splitext(kind)
    return plain if packing in PACKED and plain else kind


def readable(file: PurePath) -> bool:
    """Whether there is a reader of records for its ending."""
    return unpacked(file) in (*TEXTS, *TABLES)


def is_image(file: PurePath) -> bool:
    """Whether it is one by its ending."""
    return ending(file) in IMAGES


def no_data(path: Path, root: Path, endings: tuple[str, ...]) -> str | None:
    """Why what lies below a folder is no data by its path; None where it is.

    Args:
        path: A file, or a folder whose files are not looked at.
        root: The folder.
        endings: Those that are data here.
    """
    name = path.name.lower()
    if path.is_dir():
        return "a folder that is not entered"
    if any(part.startswith((".", "__")) for part in path.relative_to(root).parts):
        return "hidden"
    if name.endswith(_COPIES) or name.startswith(("~$", "#")):
        return "a tool's copy"
    if name in _ABOUT or name.startswith("readme") or name.endswith(".lock"):
        return "about the data"
    return None if unpacked(path) in endings else "no data by its ending"
