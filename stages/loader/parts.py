"""Which samples of a step each rank takes.

It is a function of the step alone, so every rank knows it of all.
"""

import heapq
from collections.abc import Sequence

from ..workers.ranks import Ranks
from .samples import Sample


def part_of(samples: Sequence[Sample], ranks: Ranks, *, group: int | None = None) -> list[Sample]:
    """Those that this rank takes, in the step's order; about as many tokens as the others take.

    A rank may be left without any.

    Args:
        samples: The step's.
        ranks: Who shares them.
        group: Samples of a group, of losses between samples: as `whole_groups` counts them, and
            never split.
    """
    if ranks.count == 1:
        return list(samples)
    size = group or 1
    units = [samples[start : start + size] for start in range(0, len(samples), size)]
    tokens = [sum(map(len, unit)) for unit in units]
    taken, held = [], [(0, rank) for rank in range(ranks.count)]
    for index in sorted(range(len(units)), key=lambda index: -tokens[index]):
        so_far, rank = held[0]
        heapq.heapreplace(held, (so_far + tokens[index], rank))
        if rank == ranks.rank:
            taken.append(index)
    return [sample for index in sorted(taken) for sample in units[index]]
