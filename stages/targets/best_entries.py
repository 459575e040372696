"""How many of the best entries a kind keeps at each position, by the kind's name.

A kind that is not here keeps k.

Each function takes `mass` [n, K], the mass that the best 1, 2, ... K entries hold together, an
array or a tensor of float64, and returns [n] numbers from 1 to K. It makes targets from logits,
cuts stored targets that have more, and measures what is kept: so it asks for nothing but `mass`.
"""

from collections.abc import Callable
from typing import Any

from .spec import Kept


def topp(mass: Any, kept: Kept) -> Any:
    """The fewest that hold a mass of p, between k_min and k."""
    assert kept.p is not None
    assert kept.k_min is not None
    most = mass.shape[-1]
    needed = (mass < kept.p).sum(-1) + 1
    return needed.clip(min(kept.k_min, most), most)


ENTRIES: dict[str, Callable[[Any, Kept], Any]] = {
    "topp": topp,
}
