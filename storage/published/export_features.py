"""The features of the rows that an export takes, and the matrices that they name.

They stand in the order of those rows.

They leave whole: as they are stored, all columns. Of a text several rows of one layer may be
stored, rounded otherwise; the one goes along that has the fewest bits which still serve.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import IntegrityError
from ..files.base import explained, make_folder
from ..store.matrices import kept_matrix, matrix_file, names, read_matrix, record_file
from ..store.store import Store
from ..tables.features import DTYPES, ERRORS, feature_statistics
from ..tables.schema import SCHEMAS
from ..tables.shard import REPAIR
from .choice import FeatureChoice, WantedFeature

COLUMNS = SCHEMAS["features"].names
_BLOCK_BYTES = 64 << 20
"""Of rows that are read at a time."""
_ROW_BITS = 32
_INDEXED = ("text_key", "teacher_id", "kind", "layer", "dtype", "vectors", "width")


def feature_places(
    store: Store, texts: pa.Array, choice: FeatureChoice, *, teacher_id: str
) -> pa.Table:
    """Where the features of some texts are.

    They are in the order of the texts, and of each text by kind, layer and dtype.

    Args:
        store: Holds them.
        texts: [N] text keys.
        choice: Which.
        teacher_id: Whose.

    Returns:
        `place` (the number of the commit above 32 bits, row of its shard below), `bytes` (about).
    """
    parts = [pa.table({name: pa.array([], kind) for name, kind in _PLACES.items()})]
    for number, commit in enumerate(store.commits("features")):
        rows = store.shard("features", commit.shard.sha256).read_all(_INDEXED)
        at = pc.index_in(rows["text_key"], value_set=texts)
        mine = pc.and_(pc.is_valid(at), pc.equal(rows["teacher_id"], teacher_id))
        places = (number << _ROW_BITS) + np.arange(rows.num_rows)
        size = [DTYPES[name].itemsize for name in rows["dtype"].to_pylist()]
        found = {
            "sample": at.cast(pa.int64()),
            "place": pa.array(places),
            "bytes": pc.multiply(pc.multiply(rows["vectors"], rows["width"]).cast("int64"), size),
            **{name: rows[name] for name in ("kind", "layer", "dtype")},
        }
        parts.append(pa.table(found).cast(parts[0].schema).filter(mine))
    found = _best(pa.concat_tables(parts), choice.rows)
    order = [(name, "ascending") for name in ("sample", "kind", "layer", "dtype", "place")]
    return found.sort_by(order).select(["place", "bytes"])


_PLACES = {
    "sample": pa.int64(),
    "place": pa.int64(),
    "bytes": pa.int64(),
    "kind": pa.string(),
    "layer": pa.int32(),
    "dtype": pa.string(),
}


def _best(found: pa.Table, wanted: Sequence[WantedFeature] | None) -> pa.Table:
    """Of each text and wanted feature the row whose dtype comes first."""
    if wanted is None:
        return found
    parts = [found.slice(0, 0)]
    for one in wanted:
        same = (
            pc.is_null(found["layer"]) if one.layer is None else pc.equal(found["layer"], one.layer)
        )
        mine = found.filter(pc.and_(pc.equal(found["kind"], one.kind), same))
        left = mine
        for dtype in one.dtypes:
            chosen = left.filter(pc.equal(left["dtype"], dtype))
            parts.append(chosen)
            left = left.filter(
                pc.invert(pc.is_in(left["sample"], chosen["sample"].combine_chunks()))
            )
    return pa.concat_tables(parts)


def shards_of_places(store: Store, places: pa.Table) -> list[tuple[dict[str, Any], int]]:
    """What the shards at these places say of themselves, and how many rows they give."""
    commits = store.commits("features")
    numbers, counts = np.unique(places["place"].to_numpy() >> _ROW_BITS, return_counts=True)
    return [
        (store.shard("features", commits[number].shard.sha256).about, rows)
        for number, rows in zip(numbers.tolist(), counts.tolist(), strict=True)
    ]


def feature_rows(store: Store, places: pa.Table) -> Iterator[pa.Table]:
    """The rows at these places, in their order; page checksums are verified.

    Raises:
        IntegrityError: a shard is damaged.
    """
    commits = store.commits("features")
    where = places["place"].to_numpy()
    for number in np.unique(where >> _ROW_BITS).tolist():
        shard = commits[number].shard
        if store.files.sha256(shard.name) != shard.sha256:
            raise IntegrityError(
                f"{shard.name}: the file is damaged (its sha256 is another one). {REPAIR}"
            )
    blocks = np.cumsum(places["bytes"].to_numpy()) // _BLOCK_BYTES
    for block in np.split(where, np.flatnonzero(np.diff(blocks)) + 1):
        order = np.argsort(block, kind="stable")
        parts = []
        for number in np.unique(block >> _ROW_BITS).tolist():
            mine = block[order][block[order] >> _ROW_BITS == number]
            file = store.shard("features", commits[number].shard.sha256)
            parts.append(file.select(mine & ((1 << _ROW_BITS) - 1), COLUMNS))
        back = np.empty(len(block), np.int64)
        back[order] = np.arange(len(block))
        if parts:
            yield pa.concat_tables([part.replace_schema_metadata() for part in parts]).take(back)


class FeatureNumbers:
    """What is in them, for the card."""

    def __init__(self) -> None:
        self._vectors = 0
        self._kinds: dict[str, Any] = {}
        self.matrices: set[str] = set()
        """Ids of those that rows name."""

    def add(self, rows: pa.Table) -> None:
        """Count some rows."""
        self._vectors += pc.sum(rows["vectors"]).as_py() or 0
        if "projection" in rows.schema.names:
            self.matrices |= set(rows["projection"].unique().to_pylist()) - {None}
        said = ["kind", "layer", "dtype", "vectors", "width", *ERRORS]
        listed = rows.select(said).to_pylist()
        sizes = pc.binary_length(rows["values"]).to_pylist()
        for name, part in feature_statistics(listed).items():
            one = self._kinds.setdefault(name, {"rows": 0, "vectors": 0, "bytes": 0})
            one["rows"] += part["rows"]
            one["vectors"] += part["vectors"]
            for of in part.keys() & {*ERRORS}:
                error = one.setdefault(of, {"missed": 0.0, "most": 0.0})
                error["missed"] += part[of]["mean"] * part["vectors"]
                error["most"] = max(error["most"], part[of]["most"])
        for row, size in zip(listed, sizes, strict=True):
            layer = "" if row["layer"] is None else f" {row['layer']}"
            one = self._kinds[f"{row['kind']}{layer} {row['dtype']}"]
            one["bytes"] += size
            one["width"] = row["width"]

    def numbers(self) -> dict[str, Any]:
        """Rows, vectors, width, bytes, errors of rounding and projection.

        They are by kind, layer and dtype.
        """
        kinds = {}
        for name, one in sorted(self._kinds.items()):
            errors = {
                of: {"mean": one[of]["missed"] / max(one["vectors"], 1), "most": one[of]["most"]}
                for of in ERRORS
                if of in one
            }
            kinds[name] = one | errors
        vectors = {"total": self._vectors}
        return {"tokens": vectors, "scored_tokens": {"total": 0}, "kinds": kinds}


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenMatrices:
    """Matrices that go along; names are below the version's folder."""

    files: dict[Path, str]
    """Copy in the working folder -> name."""
    records: dict[str, bytes]
    """Name -> content of the records that name them."""
    about: dict[str, Any]
    """Name of a file -> what its record says of it."""


def take_matrices(
    store: Store, folder: Path, *, ids: set[str], wanted: Sequence[str]
) -> TakenMatrices:
    """Copy matrices into a working folder.

    Args:
        store: Has them.
        folder: Gets them.
        ids: Of matrices that rows name.
        wanted: Names of others.

    Raises:
        IntegrityError: one is damaged or missing.
    """
    taken = TakenMatrices(files={}, records={}, about={matrix_file(one): {} for one in ids})
    for name in names(store.files):
        kept = kept_matrix(store.files, name)
        if kept is not None and (name in wanted or kept.id in ids):
            taken.records[record_file(name)] = store.files.read(record_file(name))
            taken.about[kept.file] = dict(kept.about)
    for name in sorted(taken.about):
        read_matrix(store.files, Path(name).stem)  # its hash
        path = folder / name
        with explained("cannot write", path):
            make_folder(path.parent)
            shutil.copyfile(store.files.local(name), path)
        taken.files[path] = name
    return taken
