"""The matrices that make a teacher's vectors narrower: in the store before any row names them."""

from collections.abc import Iterable
from typing import Any

import torch

from ...storage.store.store import Store
from ...storage.tables.features import projected_to, what_and_how
from ..ledger.features import check_narrower
from ..recipe.features import Feature, Name
from ..targets.features.capture import Projections, needs_of
from ..targets.features.projection import Projection, kept_projection
from ..targets.features.shown import glimpse


def keep_projections(store: Store, model: Any, features: Iterable[Feature]) -> Projections:
    """Read the matrices of what is projected from the store, and put those into it that it has not.

    Raises:
        UsageError: the vectors are not wider than what they are to become.
    """
    asked = [one for one in features if projected_to(one.kind)]
    found: dict[Name, Projection] = {}
    if not asked:
        return found
    shown = glimpse(model, needs_of(asked))
    for one in asked:
        _, heads, _, each = getattr(shown.attention(one.layer), what_and_how(one.kind)[0]).shape
        to = projected_to(one.kind) or 0
        check_narrower(one, heads * each)
        matrix_id, matrix = kept_projection(store, heads * each, to)
        there = torch.from_numpy(matrix.copy()).to(model.device)
        found[one.kind, one.layer] = Projection(matrix_id, there)
    return found
