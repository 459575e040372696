"""The place that an address names: a folder of this machine, or an object store."""

from pathlib import Path

from .base import Files
from .local import LocalFiles


def open_files(root: Path | str) -> Files:
    """Files below a folder, or below a URL that fsspec knows (`s3://bucket/path`).

    Raises:
        UsageError: nothing installed can read such a URL.
    """
    address = str(root).removeprefix("file://")
    if "://" not in address:
        return LocalFiles(address)
    from .objects import ObjectFiles

    return ObjectFiles(address)
