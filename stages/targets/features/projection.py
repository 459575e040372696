"""Projection of states to fewer numbers, by an orthonormal matrix that the store keeps.

Letters: D numbers before, d after, d below D.

P [D, d] has orthonormal columns times sqrt(D / d), of a random direction: so the squared length of
a vector, and with it the squared error between two, stays what it was in the mean over matrices,

    E |x P|^2 = |x|^2

and a single one is off by about sqrt(2 / d (1 - d / D)). d alone sets that, whatever D is: an error
summed over many tokens survives a small d, while every cosine between two vectors is off by about
1 / sqrt(d). So relations need d of 128 at least (`RELATIONS_NEED` of the recipe). By how much the
cosines of a text are off is `projection_error`, which each row says.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ....storage.keys import content_id, content_key, row_seed
from ....storage.store.store import Store

PROJECTION = "projection"
"""What the record of such a matrix says that it is."""
_ROWS = 1024
"""Tokens whose cosines with all others are made at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A matrix of the store, where a model's vectors are made narrower by it."""

    id: str
    """What rows call it."""
    matrix: Tensor
    """P [D, d] float32."""

    def of(self, vectors: Tensor) -> Tensor:
        """[..., d] float32 of [..., D]."""
        return vectors.float() @ self.matrix.to(vectors.device)

    def error(self, vectors: Tensor) -> float:
        """What it costs the cosines between the T vectors [T, D] of a text.

        The equation is in `storage/tables/features.py`.
        """
        whole, narrow = _unit(vectors.float()), _unit(self.of(vectors))
        tokens, total = len(vectors), 0.0
        for start in range(0, tokens, _ROWS):
            rows = slice(start, start + _ROWS)
            off = (narrow[rows] @ narrow.T - whole[rows] @ whole.T).square()
            off.diagonal(start).zero_()  # of no pair
            total += float(off.sum(dtype=torch.float64))
        return math.sqrt(total / max(tokens * (tokens - 1), 1))


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1 each. Zeros stay zeros.

    They are divided by the largest number first, so that no square overflows.
    """
    largest = vectors.abs().amax(-1, keepdim=True)
    return normalize(vectors / largest.where(largest > 0, 1), dim=-1)


def orthonormal(width: int, to: int, *, seed: int) -> np.ndarray:
    """P [D, d] float32: Q of a seeded Gaussian, made in float64, times sqrt(D / d)."""
    drawn = np.random.default_rng(seed).standard_normal((width, to))
    q, r = np.linalg.qr(drawn)
    # With the diagonal of R positive Q is unique, and of every direction alike.
    found: np.ndarray = q * np.sign(np.diagonal(r)) * np.sqrt(width / to)
    return found.astype(np.float32)


def projection_matrix(width: int, to: int) -> np.ndarray:
    """P [D, d] float32 of this shape, as this machine makes it."""
    return orthonormal(width, to, seed=row_seed(content_key("matrix", **_said(width, to))))


def _said(width: int, to: int) -> dict[str, Any]:
    """What a matrix is: its record says it, and its name and seed are hashes of it."""
    return {"what": PROJECTION, "width": width, "to": to}


def kept_projection(store: Store, width: int, to: int) -> tuple[str, np.ndarray]:
    """The store's P [D, d] of this shape and what rows call it; made where there is none yet.

    It is read back where it was just made too: another process may have been first, and a machine
    with another linear algebra makes other last bits.
    """
    said = _said(width, to)
    name = content_id("matrix", **said)
    known = store.matrix_named(name)
    if known is None:
        matrix = projection_matrix(width, to)
    else:
        matrix = store.matrix(known.id)
    store.put_matrix(name, matrix, said)  # that of a source too: what names it stands beside it
    kept = store.matrix_named(name)
    assert kept is not None
    return kept.id, store.matrix(kept.id)
