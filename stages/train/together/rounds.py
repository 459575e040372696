"""Passes in step: where weights are sharded, every rank must take part in each pass of any of them."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from ...workers.ranks import Ranks

T = TypeVar("T")


def rounds(passes: Iterable[T], ranks: Ranks) -> Iterator[tuple[T | None, bool]]:
    """The passes of this rank, None where it has no more and another has; and whether it is the last of all.

    There is one round at least.
    """
    left = iter(passes)
    batch = next(left, None)
    more = True
    while more:
        following = None if batch is None else next(left, None)
        more = ranks.any(following is not None)
        yield batch, not more
        batch = following
