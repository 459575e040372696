"""What of the snapshots leaves the house."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class WantedFeature:
    """Something that goes along of each text."""

    kind: str
    layer: int | None
    dtypes: tuple[str, ...]
    """What serves, the best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureChoice:
    """What goes along beside targets."""

    rows: tuple[WantedFeature, ...] | None = ()
    """Of each text; None: all that is stored."""
    matrices: tuple[str, ...] = ()
    """Names of matrices of the teacher; those that rows name go along anyway."""

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        rows = None
        if self.rows is not None:
            rows = [[one.kind, one.layer, list(one.dtypes)] for one in self.rows]
        return {"rows": rows, "matrices": list(self.matrices)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What of the snapshots leaves the house; by default all of it."""

    where: str | None = None
    """SQL condition over the columns of `generations`, as in `select.where`."""
    columns: tuple[str, ...] = ()
    """Names, or `table.name`; none: all. `key` always goes along; a table of which none is named
    stays at home."""
    min_k: int | None = None
    """Rows of soft targets with fewer entries stay at home; of those with more the others join the
    tail."""
    features: FeatureChoice | None = None
    """Of the teacher's features; None: all stay at home."""

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        chosen: dict[str, Any] = {"where": self.where, "columns": list(self.columns) or None}
        chosen["min_k"] = self.min_k
        return chosen | ({} if self.features is None else {"features": self.features.to_json()})
