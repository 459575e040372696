"""A set of row keys that takes 16 bytes a key: what a writer must know of a table of many million rows."""

import numpy as np

from .keys import KEY_BYTES

_MERGE = 1 << 16


class KeySet:
    """Keys of 16 bytes; grows only."""

    def __init__(self, joined: bytes = b"") -> None:
        """`joined`: keys one after the other."""
        self._high, self._low = _halves(joined)
        self._new: set[bytes] = set()

    def update(self, joined: bytes) -> None:
        """Add keys given one after the other."""
        self._new.update(joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES))
        if len(self._new) > max(_MERGE, len(self._high) // 8):
            old = np.stack([self._high, self._low], axis=1).tobytes()
            self._high, self._low = _halves(old + b"".join(self._new))
            self._new.clear()

    def __contains__(self, key: bytes) -> bool:
        if key in self._new or not len(self._high):
            return key in self._new
        high, low = np.frombuffer(key, np.uint64)
        first, last = (int(self._high.searchsorted(high, side=side)) for side in ("left", "right"))
        return bool((self._low[first:last] == low).any())


def _halves(joined: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of each key as integers, ordered by the first."""
    halves = np.frombuffer(joined, np.uint64).reshape(-1, 2)
    order = np.argsort(halves[:, 0], kind="stable")
    return halves[order, 0], halves[order, 1]
