"""The order in which samples were asked for, laid over rows as they were committed.

Workers commit what they finish, when they finish it. So which shard has a row, and where, depends
on how many there were and on their speed; what was asked for does not. The order is cut into groups
that are read together, by what the samples take and nothing else.
"""

import numpy as np

from ..tables.shard import ROW_GROUP_BYTES
from .order import Order
from .snapshot import AskedOrder, Snapshot, with_order

GROUP_ROWS = 256
"""Samples of a group, at most."""
MOST_READS = 8
"""How often a row group is read in an epoch, on average. Where rows lie more scattered, the order
is that of their commits."""


def in_asked_order(snapshot: Snapshot, samples: np.ndarray, sizes: np.ndarray) -> Snapshot:
    """The snapshot with its order, unless reading in it would cost too much.

    Args:
        snapshot: N samples, without an order.
        samples: [N] in the order in which they were asked for, each by its number in the snapshot.
        sizes: [N] about how many bytes each of these takes, decoded.
    """
    groups = _cut(sizes)
    order = Order(snapshot)
    row_groups = order.group_of(samples).astype(np.int64)
    of = np.repeat(np.arange(len(groups)), groups)
    reads = len(np.unique(of * len(order.shards) + row_groups))
    if reads > MOST_READS * len(order.shards):
        return snapshot
    return with_order(snapshot, AskedOrder(samples.astype(np.int32), groups))


def _cut(sizes: np.ndarray) -> np.ndarray:
    """[G] samples of each group: as many as are small enough together, one at least."""
    before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # bytes of all before each
    edges = [0]
    while (first := edges[-1]) < len(sizes):
        fitting = int(np.searchsorted(before, before[first] + ROW_GROUP_BYTES, side="right")) - 1
        edges.append(max(first + 1, min(fitting, first + GROUP_ROWS)))
    return np.diff(edges).astype(np.int32)
