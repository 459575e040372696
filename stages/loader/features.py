"""The teacher's features of a training's samples.

They are found by the sample's number, and read when a pass needs them.

The file `features/<id>/` in the student's folder says where each is
(`storage/snapshots/companions.py`). Its name is the hash of the two snapshots and of what is
wanted, so a training that goes on reads the same rows as before.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...storage.errors import IntegrityError
from ...storage.files.base import FilesOnDisk, file_sha256
from ...storage.keys import content_id
from ...storage.snapshots.companions import Companions, companion_places
from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.store import Store
from ...storage.tables.features import Layout, Rounded, of_text
from ...storage.tables.row_builders import text_key
from ..recipe.features import Feature, Name

_FOLDER = "features"


class FeatureSource:
    """The features of the samples of one snapshot."""

    def __init__(self, companions: Companions, wanted: Sequence[Feature]) -> None:
        self._companions = companions
        self._names: list[Name] = [(one.kind, one.layer) for one in wanted]
        self._one_reads = threading.Lock()
        self._layouts = self.layouts()

    def states(self, number: int, token_ids: np.ndarray) -> dict[Name, np.ndarray]:
        """[T, D] float32 of each feature of a sample, by its number in the snapshot.

        Of pooled states it is [1, D].

        Raises:
            IntegrityError: what was found is of another text, or has not a state for each token.
        """
        with self._one_reads:
            rows = self._companions.rows(number)
        text, found = text_key(token_ids), {}
        for name, row in zip(self._names, rows, strict=True):
            if row["text_key"] != text or (row["kind"], row["layer"]) != name:
                raise IntegrityError(
                    f"features: {name[0]} of layer {name[1]} of sample {number} are of another "
                    "text or layer. Delete the folder `features` of the student, and run again."
                )
            if row["vectors"] != (1 if of_text(name[0]) else len(token_ids)):
                raise IntegrityError(
                    f"features: {name[0]} of layer {name[1]} of sample {number} has "
                    f"{row['vectors']} vectors for {len(token_ids)} tokens. Run `stillroom verify`."
                )
            if Layout.from_row(row) != self._layouts[name]:
                raise IntegrityError(
                    f"features: {name[0]} of layer {name[1]} of sample {number} are laid out as "
                    f"{Layout.from_row(row)}, those of the first sample as {self._layouts[name]}. "
                    "Run `stillroom verify --deep`."
                )
            found[name] = Rounded.from_row(row).restored()
        return found

    def layouts(self) -> dict[Name, Layout]:
        """What is alike in all rows of each feature."""
        with self._one_reads:
            rows = self._companions.rows(0)
        return {n: Layout.from_row(row) for n, row in zip(self._names, rows, strict=True)}


def open_features(
    store: Store,
    samples: Snapshot,
    features: Snapshot,
    *,
    wanted: Sequence[Feature],
    files: FilesOnDisk,
) -> FeatureSource:
    """Find the features of a snapshot's samples, or take what was found before.

    Args:
        store: Of both snapshots.
        samples: What is trained on, or validated.
        features: The snapshot of features that the plan chose.
        wanted: Those that the loss compares with.
        files: The student's folder.

    Raises:
        UsageError: a sample has none.
    """
    names = [(one.kind, one.layer) for one in wanted]
    asked = content_id("companions", samples=samples.id, features=features.id, wanted=names)

    def make() -> np.ndarray:
        return companion_places(store, samples, features, names)

    places = kept_places(files, f"{_FOLDER}/{asked}", make)
    return FeatureSource(Companions(store, features, places), wanted)


def kept_places(files: FilesOnDisk, folder: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Where rows beside samples are: made once into a folder of the student's, and mapped."""
    path = _known(files.path(folder))
    if path is None:
        places = make()

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, places)

        path = files.path(files.put_content(folder, write, suffix=".npy").name)
    found: np.ndarray = np.load(path, mmap_mode="r")
    return found


def _known(folder: Path) -> Path | None:
    """The file in a folder whose bytes are those that its name says."""
    found = (path for path in sorted(folder.glob("*/*.npy")) if file_sha256(path)[:32] == path.stem)
    return next(found, None)
