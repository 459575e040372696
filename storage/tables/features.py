"""Features as they are stored: states [P, D] rounded to int8 with a scale per vector, to float16, or as they are.

    int8       s_p = max_d |x_pd| / 127      q_pd = round(x_pd / s_p)      x_pd ~ s_p q_pd, off by s_p / 2 at most
    float16    q_pd = float16(x_pd)          off by |x_pd| 2^-11 at most; nothing above 65,504 can be stored
    float32    q_pd = x_pd

The error of a row is that of all its numbers together: sqrt(sum (x' - x)^2 / sum x^2), with x' what is
read back. int8 with one scale misses most where a few channels are far larger than the others.

Letters: P positions, D numbers of a state.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..errors import IntegrityError

DTYPES: dict[str, np.dtype[Any]] = {
    "int8": np.dtype("i1"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""How a number is stored, by the column `dtype`."""
SCALED = "int8"
"""The one whose vectors have a scale."""
POOLED = ("pooled_cls", "pooled_mean", "pooled_last")
"""Kinds of which a row has one vector, of the whole text; of others it has one a token."""
HEADED = ("queries", "keys", "values")
"""Kinds that are what attention multiplies, after rotation and after any norm of their own."""
_MOST = 127


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What is alike in all rows of one feature of a teacher; columns of these names."""

    width: int
    """D, numbers of a vector."""
    heads: int | None = None
    """Of queries, keys and values: D / heads numbers each, one head after another."""
    score_scale: float | None = None
    """Of queries: what q . k is multiplied by."""
    causal: bool | None = None
    """Of queries: whether a token sees nothing behind itself."""
    window: int | None = None
    """Of queries: a token sees those less than this far away; None: however far."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Layout":
        """Of a row of `features`."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rounded:
    """States as they are stored."""

    values: np.ndarray
    """[P, D] of a dtype of `DTYPES`."""
    scale: np.ndarray | None
    """[P] float32 what the numbers of a vector are multiplied by; None: 1."""

    @classmethod
    def of(cls, states: np.ndarray, dtype: str) -> "Rounded":
        """Of states [P, D] float32.

        Raises:
            FloatingPointError: a number is not finite, or beyond what float16 holds.
        """
        if not np.isfinite(states).all():
            raise FloatingPointError("a state of the teacher is not finite")
        if dtype == SCALED:
            scale = np.abs(states).max(axis=1) / np.float32(_MOST)
            steps = states / np.where(scale > 0, scale, 1)[:, None]
            return cls(values=np.rint(steps).astype(np.int8), scale=scale.astype(np.float32))
        with np.errstate(over="ignore"):
            values = states.astype(DTYPES[dtype])
        if not np.isfinite(values).all():
            raise FloatingPointError(
                f"a state of the teacher is {np.abs(states).max():.3g}, beyond what {dtype} holds "
                "(bits: 16). 8 or 32 bits hold it"
            )
        return cls(values=values, scale=None)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Rounded":
        """Of a row of `features`; not copied.

        Raises:
            IntegrityError: its columns contradict one another.
        """
        if row["dtype"] not in DTYPES:
            raise IntegrityError(
                f"features row: dtype {row['dtype']!r}, expected one of {', '.join(DTYPES)}."
            )
        dtype, shape = DTYPES[row["dtype"]], (row["vectors"], row["width"])
        expected = shape[0] * shape[1] * dtype.itemsize
        if min(shape) < 1 or len(row["values"]) != expected:
            raise IntegrityError(
                f"features row: {len(row['values'])} bytes, expected {expected}: {shape[0]} vectors "
                f"of {shape[1]} numbers ({row['dtype']})."
            )
        scale = row.get("scale")
        found = None if scale is None else len(scale)
        if found != (shape[0] if row["dtype"] == SCALED else None):
            raise IntegrityError(
                f"features row: {row['dtype']} with {'no' if found is None else found} scales for "
                f"{shape[0]} vectors; int8 has one for each, others none."
            )
        return cls(values=np.frombuffer(row["values"], dtype).reshape(shape), scale=scale)

    def restored(self) -> np.ndarray:
        """[P, D] float32."""
        states = self.values.astype(np.float32)
        return states if self.scale is None else states * self.scale[:, None]

    def error(self, states: np.ndarray) -> float:
        """How far off all numbers together are from the states that were rounded, relative."""
        missed = np.square(self.restored() - states, dtype=np.float64).sum()
        whole = np.square(states, dtype=np.float64).sum()
        return float(np.sqrt(missed / whole)) if whole > 0 else 0.0


def of_text(kind: str) -> bool:
    """Whether a row of this kind has one vector, of the whole text; else one a token."""
    return kind in POOLED


def check_features(row: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """IntegrityError if a row of `features` contradicts itself or the description of its shard."""
    if row["teacher_id"] != about["teacher_id"]:
        raise IntegrityError(
            f"features row: teacher {row['teacher_id']} in a shard of {about['teacher_id']}."
        )
    Rounded.from_row(row)
    if of_text(row["kind"]) and row["vectors"] != 1:
        raise IntegrityError(
            f"features row: {row['vectors']} vectors of kind {row['kind']}; a text has one."
        )
    _check_layout(row)
    positions = row.get("positions")
    if positions is not None and (
        len(positions) != row["vectors"] or positions[0] < 0 or (np.diff(positions) < 1).any()
    ):
        raise IntegrityError(
            f"features row: {len(positions)} positions for {row['vectors']} vectors; there is one "
            "for each, and they ascend."
        )


def _check_layout(row: Mapping[str, Any]) -> None:
    layout, kind = Layout.from_row(row), row["kind"]
    if (layout.heads is not None) != (kind in HEADED):
        raise IntegrityError(
            f"features row: {kind} with heads {layout.heads}; {', '.join(HEADED)} have some, and "
            "nothing else has."
        )
    if layout.heads is not None and (layout.heads < 1 or layout.width % layout.heads):
        raise IntegrityError(
            f"features row: {layout.width} numbers of {layout.heads} heads; each has as many."
        )
    said = layout.score_scale is not None, layout.causal is not None
    if said != (kind == "queries",) * 2 or (layout.window is not None and kind != "queries"):
        raise IntegrityError(
            f"features row: {kind} with score_scale {layout.score_scale}, causal {layout.causal} and "
            f"window {layout.window}; queries have the first two, and nothing else has any."
        )


def doubtful_features(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A column, and what is wrong with its numbers, of a row whose shape holds."""
    stored = Rounded.from_row(row)
    score_scale, window = row["score_scale"], row["window"]
    if score_scale is not None and not 0 < score_scale < np.inf:
        yield "score_scale", f"it is {score_scale}, not a finite number above 0"
    if window is not None and window < 1:
        yield "window", f"it is {window}: a token sees itself at least"
    if stored.scale is None:
        if not np.isfinite(stored.values).all():
            yield "values", "a number is not finite"
        return
    if not (np.isfinite(stored.scale) & (stored.scale >= 0)).all():
        yield "scale", "a scale is not finite, or below 0"
        return
    # The largest number of a vector is 127 scales by definition; of zeros the scale is 0.
    largest = np.abs(stored.values.astype(np.int16)).max(axis=1)
    expected = np.where(stored.scale > 0, _MOST, 0)
    if wrong := int((largest != expected).sum()):
        yield (
            "values",
            f"the largest number of {wrong} vectors is not {_MOST}, by which they are scaled",
        )


def feature_statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a shard says of its features, by kind, layer and dtype: rows, vectors, error of rounding (mean and most)."""
    found: dict[str, Any] = {}
    for row in rows:
        layer = "" if row["layer"] is None else f" {row['layer']}"
        one = found.setdefault(
            f"{row['kind']}{layer} {row['dtype']}",
            {"rows": 0, "vectors": 0, "rounding_error": {"mean": 0.0, "most": 0.0}},
        )
        one["rows"] += 1
        one["vectors"] += row["vectors"]
        error = one["rounding_error"]
        error["mean"] += row["rounding_error"] * row["vectors"]
        error["most"] = max(error["most"], float(row["rounding_error"]))
    for one in found.values():
        one["rounding_error"]["mean"] /= one["vectors"]
    return found
