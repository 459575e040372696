"""Passes in step: where weights are sharded, all ranks take part in each pass of any of them."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from ...workers.ranks import Ranks

T = TypeVar("T")


def rounds(passes: Iterable[T], ranks: Ranks) -> Iterator[tuple[T | None, bool]]:
    """The passes of this rank, and with each whether it is the last of all.

    A pass is None where this rank has no more and another one has. There is one round at least.
    """
    left = iter(passes)
    batch = next(left, None)
    more = True
    while more:
        following = None if batch is None else next(left, None)
        more = ranks.any(following is not None)
        yield batch, not more
        batch = following
