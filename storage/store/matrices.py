"""Matrices that rows or a teacher are read with: each kept once, in a file named by its content.

    matrices/<name>.json                   what it is, and the file that has it: a sealed record
    matrices/<2 digits>/<32 digits>.npy    its numbers [R, C] as numpy writes them, by sha256

A name is a hash of what the matrix is: a teacher's embeddings, a projection of one shape and seed.
Whoever makes it first decides its numbers: it is read back from the store, never made again, as
another machine may round another way. Rows name a matrix by the 32 digits.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..bounds import hexdigest, integer, mapping, understood
from ..errors import IntegrityError
from ..files.base import Content, Files, file_sha256
from ..keys import seal, unseal
from ..tables.schema import RECORD_VERSION

FOLDER = "matrices"
NAMING = ["projection", "projected_from", "width"]
"""Columns of `features` that say which matrix a row is read with."""
DTYPES = ("float16", "float32")
"""What numbers are kept as."""
_AGAIN_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptMatrix:
    """The record of a matrix."""

    sha256: str
    bytes: int
    """Of its file."""
    about: Mapping[str, Any]
    """What it is."""

    @property
    def id(self) -> str:
        """What rows call it."""
        return self.sha256[:32]

    @property
    def file(self) -> str:
        """Where its numbers are."""
        return matrix_file(self.id)


def matrix_file(matrix_id: str) -> str:
    """Name of the file with a matrix's numbers."""
    return f"{FOLDER}/{matrix_id[:2]}/{matrix_id}.npy"


def record_file(name: str) -> str:
    """Name of the record of a matrix."""
    return f"{FOLDER}/{name}.json"


def keep_matrix(files: Files, name: str, matrix: np.ndarray, about: Mapping[str, Any]) -> None:
    """Keep a matrix [R, C] under a name, unless that has one: the first stays.

    As with shards nobody comes to rely on a file that was there before, which may be about to be
    vacuumed: it is written once more, with bytes behind the numbers that nobody reads.
    """
    if files.exists(record_file(name)):
        return
    content = _put(files, matrix)
    while not content.fresh:
        content = _put(files, matrix, again=os.urandom(_AGAIN_BYTES))
    record = {
        "format_version": RECORD_VERSION,
        "sha256": content.sha256,
        "bytes": content.bytes,
        "about": dict(about),
    }
    files.put_if_absent(record_file(name), seal(record))


def _put(files: Files, matrix: np.ndarray, again: bytes = b"") -> Content:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.ascontiguousarray(matrix), allow_pickle=False)
            file.write(again)

    return files.put_content(FOLDER, write, suffix=".npy")


def kept_matrix(files: Files, name: str) -> KeptMatrix | None:
    """The record of a name; None where there is none.

    Raises:
        IntegrityError: it was changed, or is none.
    """
    file = record_file(name)
    try:
        data = files.read(file)
    except FileNotFoundError:
        return None
    record = unseal(data, file)
    with understood(file, "record of a matrix"):
        return KeptMatrix(
            sha256=hexdigest(record["sha256"]),
            bytes=integer(record["bytes"]),
            about=mapping(record["about"]),
        )


def names(files: Files) -> Iterator[str]:
    """Names of all matrices that a place has."""
    for file in files.names(FOLDER):
        if file.endswith(".json"):
            yield file.removesuffix(".json")


def read_matrix(files: Files, matrix_id: str) -> np.ndarray:
    """The numbers [R, C] of a matrix, mapped, their file checked against its name.

    Raises:
        IntegrityError: the file is missing or damaged, or holds something else.
    """
    name = matrix_file(matrix_id)
    advice = "Run `stillroom verify`, then `repair`."
    try:
        path = files.local(name)
        if file_sha256(path)[:32] != matrix_id and files.cache is not files:
            files.cache.remove(name)  # perhaps only the copy on this machine is damaged
            path = files.local(name)
    except FileNotFoundError as error:
        raise IntegrityError(f"{files.root}/{name}: the matrix is missing. {advice}") from error
    if file_sha256(path)[:32] != matrix_id:
        raise IntegrityError(
            f"{files.root}/{name}: the matrix is damaged (its sha256 is another one). {advice}"
        )
    with understood(name, "matrix"):
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.ndim != 2 or found.dtype.name not in DTYPES:
            raise ValueError(f"{found.dtype} of shape {found.shape}")
    return found


@dataclass(frozen=True, slots=True, order=True)
class NamedMatrix:
    """A matrix as rows of features name it."""

    id: str
    shape: tuple[int, int]
    """What they say that it has: numbers before, and after."""


def named_matrices(rows: pa.Table) -> set[NamedMatrix]:
    """The matrices that rows of features name; of their columns `NAMING` are needed."""
    each = rows.filter(pc.is_valid(rows["projection"])).group_by(NAMING).aggregate([])
    return {
        NamedMatrix(one["projection"], (one["projected_from"], one["width"]))
        for one in each.to_pylist()
    }
