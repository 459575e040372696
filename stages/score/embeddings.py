"""The teacher's token embeddings, kept once in the store: one matrix for all texts.

It is the weight of the input embeddings, a row an id, as the model has it: what is multiplied or
added to it afterwards (a scale, positions, types) is not part of it.
"""

from typing import Any

import numpy as np

from ...storage.errors import UsageError
from ...storage.store.store import Store
from ..ledger.features import embeddings_name, find_embeddings
from ..recipe.features import DTYPES, EMBEDDINGS

_ROWS = 4096
"""That are rounded at a time."""


def keep_embeddings(store: Store, model: Any, *, teacher_id: str, bits: int) -> None:
    """Put the embeddings of a teacher into the store, unless they are there.

    How far rounding misses is stored beside them.

    Raises:
        UsageError: the model shows no such matrix, or float16 does not hold a number of it.
    """
    if find_embeddings(store, teacher_id, bits) is not None:
        return
    from ..targets.features.shown import embeddings_of

    weight = embeddings_of(model)
    dtype = DTYPES[bits]
    rounded = np.empty(tuple(weight.shape), np.dtype(dtype))
    missed = whole = 0.0
    for first in range(0, len(weight), _ROWS):
        exact = weight[first : first + _ROWS].detach().float().cpu().numpy()
        with np.errstate(over="ignore"):
            part = rounded[first : first + _ROWS] = exact.astype(dtype)
        missed += float(np.square(part.astype(np.float64) - exact).sum())
        whole += float(np.square(exact, dtype=np.float64).sum())
    if not np.isfinite(missed):
        raise UsageError(
            f"score.features: an embedding of {model.config.name_or_path} is not finite, or beyond "
            "what float16 holds. Set bits: 32, or leave embeddings out."
        )
    about = {
        "what": EMBEDDINGS,
        "teacher_id": teacher_id,
        "dtype": dtype,
        "shape": list(rounded.shape),
        # sqrt(sum (x' - x)^2 / sum x^2) of all numbers
        "rounding_error": float(np.sqrt(missed / whole)) if whole > 0 else 0.0,
    }
    store.put_matrix(embeddings_name(teacher_id, dtype), rounded, about)
