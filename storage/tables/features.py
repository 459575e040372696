"""Features as they are stored: states [P, D], rounded or as they are.

They are rounded to int8 with a scale per vector, or to float16.

    int8       s_p = max_d |x_pd| / 127    q_pd = round(x_pd / s_p)    x_pd ~ s_p q_pd,
                                                                       off by s_p / 2 at most
    float16    q_pd = float16(x_pd)        off by |x_pd| 2^-11 at most; nothing above 65,504
                                           can be stored
    float32    q_pd = x_pd

The error of a row is that of all its numbers together: sqrt(sum (x' - x)^2 / sum x^2), with x' what
is read back. int8 with one scale misses most where a few channels are far larger than the others.

Projected vectors are x P, P [D, d] a matrix that the store keeps. Then these are the states that
are rounded, and the kind says d (`values_256`). What projection itself costs is a number of its
own. It is of the cosines between the tokens of a text before any rounding, over all pairs of them:

    projection_error = sqrt(mean over i < j of (cos(x_i P, x_j P) - cos(x_i, x_j))^2)

It is 0 where a text has one token; the cosine of a vector of zeros with any other is 0. It is about
1 / sqrt(d).

Letters: P positions, D numbers of a state, d of a projected one.
"""

import re
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
PROJECTED = ("values",)
"""What may be stored in fewer numbers."""
NARROWED = ("projection", "projected_from", "projection_error")
"""Columns that rows of a projected kind have, and no others."""
ERRORS = ("rounding_error", "projection_error")
"""Columns that say how far off a row is. A shard says the mean and the most of those it has."""
_PROJECTED = re.compile(rf"(?:{'|'.join(PROJECTED)})_([1-9][0-9]{{0,8}})")
_MATRIX_ID = re.compile("[0-9a-f]{32}")
_MOST = 127
_COSINES_APART = 2
_TINY = np.finfo(np.float32).tiny


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
    projected_from: int | None = None
    """Of projected vectors: numbers that they had before; None: they are whole."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Layout":
        """Of a row of `features`."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Projected:
    """How the vectors of a row were made narrower; columns of these names."""

    projection: str
    """Id of the matrix."""
    projection_error: float
    """As above."""


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
            FloatingPointError: a number is not finite, or beyond what the dtype holds.
        """
        if not np.isfinite(states).all():
            raise FloatingPointError("a state of the teacher is not finite")
        if dtype == SCALED:
            scale = np.abs(states).max(axis=1) / np.float32(_MOST)
            if not _finite_at_most(scale):
                raise FloatingPointError(_beyond(states, dtype, "(bits: 8). 32 bits hold it"))
            # Smaller ones are rounded themselves, and 127 of them would be another number.
            scale[scale < _TINY] = 0
            steps = states / np.where(scale > 0, scale, 1)[:, None]
            return cls(values=np.rint(steps).astype(np.int8), scale=scale.astype(np.float32))
        with np.errstate(over="ignore"):
            values = states.astype(DTYPES[dtype])
        if not np.isfinite(values).all():
            raise FloatingPointError(_beyond(states, dtype, "(bits: 16). 8 or 32 bits hold it"))
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
                f"features row: {len(row['values'])} bytes, expected {expected}: {shape[0]} "
                f"vectors of {shape[1]} numbers ({row['dtype']})."
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

    def largest_error(self) -> float:
        """What `error` can be at most, whatever was rounded: missed / (|x'| - missed), and 1."""
        restored = self.restored().astype(np.float64)
        missed = np.zeros_like(restored)
        if self.scale is not None:  # half a step; what is below the smallest scale becomes 0
            steps = np.where(self.scale > 0, self.scale / 2, _MOST * _TINY)
            missed += steps.astype(np.float64)[:, None]
        elif self.values.dtype == DTYPES["float16"]:  # half of its last digit
            missed = np.abs(restored) * 2.0**-11 + 2.0**-25
        off, whole = float(np.linalg.norm(missed)), float(np.linalg.norm(restored))
        return 1.0 if whole <= off else min(1.0, off / (whole - off))


def _finite_at_most(scale: np.ndarray) -> bool:
    """Whether the largest number of each vector, 127 scales, is one."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(scale * np.float32(_MOST)).all())


def _beyond(states: np.ndarray, dtype: str, hint: str) -> str:
    return f"a state of the teacher is {np.abs(states).max():.3g}, beyond what {dtype} holds {hint}"


def of_text(kind: str) -> bool:
    """Whether a row of this kind has one vector, of the whole text; else one a token."""
    return kind in POOLED


def made_kind(what: str, how: str | int | None) -> str:
    """The name of a kind that was made of another one: `pooled_mean`, `values_256`.

    `how` is None for a kind itself.
    """
    return what if how is None else f"{what}_{how}"


def what_and_how(kind: str) -> tuple[str, str]:
    """What a kind was made of, and how (`mean`, `256`); empty: it is that itself."""
    what, _, how = kind.partition("_")
    return what, how


def projected_to(kind: str) -> int | None:
    """d, numbers of a vector of a projected kind; None: its vectors are whole."""
    found = _PROJECTED.fullmatch(kind)
    return int(found[1]) if found else None


def check_features(row: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """IntegrityError if a row of `features` contradicts itself or the description of its shard."""
    if row["teacher_id"] != about["teacher_id"]:
        raise IntegrityError(
            f"features row: teacher {row['teacher_id']} in a shard of {about['teacher_id']}."
        )
    if row["layer"] is not None and row["layer"] < 0:
        raise IntegrityError(f"features row: layer {row['layer']}; layers count from 0.")
    Rounded.from_row(row)
    if of_text(row["kind"]) and row["vectors"] != 1:
        raise IntegrityError(
            f"features row: {row['vectors']} vectors of kind {row['kind']}; a text has one."
        )
    _check_layout(row)
    _check_projection(row)
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
            f"features row: {kind} with score_scale {layout.score_scale}, causal {layout.causal} "
            f"and window {layout.window}; queries have the first two, and nothing else has any."
        )


def _check_projection(row: Mapping[str, Any]) -> None:
    kind, said = row["kind"], {name: row[name] for name in NARROWED}
    to = projected_to(kind)
    if [one is None for one in said.values()] != [to is None] * len(said):
        listed = ", ".join(f"{name} {one}" for name, one in said.items())
        raise IntegrityError(
            f"features row: {kind} with {listed}; projected kinds have all of these, and nothing "
            "else has any."
        )
    if to is None:
        return
    if not _MATRIX_ID.fullmatch(said["projection"]):
        raise IntegrityError(
            "features row: projection is not the name of a matrix (32 hex digits)."
        )
    if not row["width"] == to < said["projected_from"]:
        raise IntegrityError(
            f"features row: {kind} of {row['width']} numbers, made of {said['projected_from']}; "
            f"they have {to}, and had more before."
        )


def doubtful_features(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A column, and what is wrong with its numbers, of a row whose shape holds."""
    stored = Rounded.from_row(row)
    yield from _broken_layout(row)
    broken = next(_broken(stored), None)
    if broken is not None:
        yield broken
        return
    most = stored.largest_error() * 1.001 + 1e-6
    if not 0 <= row["rounding_error"] <= most:
        said = (
            f"says {row['rounding_error']:.3g}, rounding to {row['dtype']} misses {most:.3g} at "
            "most"
        )
        yield "rounding_error", said
    off = row["projection_error"]
    if off is not None and not 0 <= off <= _COSINES_APART:
        yield "projection_error", f"says {off:.3g}, two cosines are {_COSINES_APART} apart at most"
    if stored.scale is None:
        return
    # The largest number of a vector is 127 scales by definition; of zeros the scale is 0.
    largest = np.abs(stored.values.astype(np.int16)).max(axis=1)
    expected = np.where(stored.scale > 0, _MOST, 0)
    if wrong := int((largest != expected).sum()):
        yield (
            "values",
            f"the largest number of {wrong} vectors is not {_MOST}, by which they are scaled",
        )


def _broken_layout(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    score_scale, window = row["score_scale"], row["window"]
    if score_scale is not None and not 0 < score_scale < np.inf:
        yield "score_scale", f"it is {score_scale}, not a finite number above 0"
    if window is not None and window < 1:
        yield "window", f"it is {window}: a token sees itself at least"


def _broken(stored: Rounded) -> Iterator[tuple[str, str]]:
    if stored.scale is None:
        if not np.isfinite(stored.values).all():
            yield "values", "a number is not finite"
        return
    if not ((stored.scale >= 0).all() and _finite_at_most(stored.scale)):
        yield "scale", "a scale is below 0, or makes states that are not finite"


def feature_statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a shard says of its features, by kind, layer and dtype.

    These are rows, vectors, and mean and most of each of `ERRORS`.
    """
    found: dict[str, Any] = {}
    for row in rows:
        layer = "" if row["layer"] is None else f" {row['layer']}"
        name = f"{row['kind']}{layer} {row['dtype']}"
        one = found.setdefault(name, {"rows": 0, "vectors": 0})
        one["rows"] += 1
        one["vectors"] += row["vectors"]
        for of in ERRORS:
            if row[of] is not None:
                error = one.setdefault(of, {"mean": 0.0, "most": 0.0})
                error["mean"] += row[of] * row["vectors"]
                error["most"] = max(error["most"], float(row[of]))
    for one in found.values():
        for of in one.keys() & {*ERRORS}:
            one[of]["mean"] /= one["vectors"]
    return found
