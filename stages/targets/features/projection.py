"""Projection of states to fewer numbers, by an orthonormal matrix that the store keeps.

Letters: D numbers before, d after, d below D.

P [D, d] has orthonormal columns times sqrt(D / d), of a random direction: so the squared length of a
vector, and with it the squared error between two, stays what it was in the mean over matrices,

    E |x P|^2 = |x|^2

and a single one is off by about sqrt(2 / d (1 - d / D)). d alone sets that, whatever D is: an error
summed over many tokens survives a small d, while every cosine between two vectors is off by about
1 / sqrt(d). So relations need d of 128 at least.
"""

from typing import Any

import numpy as np

from ....storage.keys import content_id, content_key, row_seed
from ....storage.store.store import Store

RELATIONS_NEED = 128
"""Numbers of a projected vector, at least, where its relations to others are learnt."""


def orthonormal(width: int, to: int, *, seed: int) -> np.ndarray:
    """P [D, d] float32: Q of a seeded Gaussian, made in float64, times sqrt(D / d)."""
    drawn = np.random.default_rng(seed).standard_normal((width, to))
    q, r = np.linalg.qr(drawn)
    # With the diagonal of R positive Q is unique, and of every direction alike.
    found: np.ndarray = q * np.sign(np.diagonal(r)) * np.sqrt(width / to)
    return found.astype(np.float32)


def kept_projection(store: Store, width: int, to: int) -> tuple[str, np.ndarray]:
    """The store's P [D, d] of this shape and what rows call it; made where there is none yet.

    It is read back where it was just made too: another process may have been first, and a machine
    with another linear algebra makes other last bits.
    """
    said: dict[str, Any] = {"what": "projection", "width": width, "to": to}
    name = content_id("matrix", **said)
    known = store.matrix_named(name)
    if known is None:
        matrix = orthonormal(width, to, seed=row_seed(content_key("matrix", **said)))
    else:
        matrix = store.matrix(known.id)
    store.put_matrix(name, matrix, said)  # that of a source too: what names it stands beside it
    kept = store.matrix_named(name)
    assert kept is not None
    return kept.id, store.matrix(kept.id)
