"""Claims: which part of a stage's work a worker takes next, so that workers of one store share it.

A block is a slice of the planned requests, the same for every worker. Before it works on a block a
worker puts a claim, `claims/<stage>/<work id>/<block>.<n>.json`, where n counts the claims that the
block had; of all blocks it takes one with the fewest. So blocks that nobody has claimed go first,
then those with one claim, whose worker vanished or is busy with it still, and so on; a worker takes
no block twice.

Claims are advice. That each row is in the store once is the commit log's doing, whatever workers
do. So a claim is never withdrawn, and nobody asks how old it is: no lease, no heartbeat, no clock.
Work done twice is wasted at worst, and whoever commits first wins (backup tasks, as in MapReduce,
Dean and Ghemawat 2004).
"""

import os
import random
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ...storage.files.base import Files
from ...storage.keys import canonical_json, content_id

T = TypeVar("T")
LOOK_SHARE = 100
"""So many times as long as a look takes lie between two: a hundredth of the time at most."""
_CLAIM = re.compile(r"(?P<block>[0-9]{8})\.(?P<number>[0-9]{1,9})\.json")


class Claims:
    """One worker's view of who works on what."""

    def __init__(self, files: Files, stage: str, **work: Any) -> None:
        """`work` is all that determines the planned requests and their order: others with the same work share it."""
        self._files = files
        self._folder = f"claims/{stage}/{content_id('work', stage=stage, **work)}"
        self._worker = uuid.uuid4().hex
        self._random = random.Random(self._worker)
        self._next_look = 0.0

    def blocks(
        self,
        pending: Iterable[int],
        *,
        look: Callable[[bool], None],
        left: Callable[[int], list[T]],
    ) -> Iterator[tuple[int, list[T]]]:
        """Claim one block after the other, until none has anything left; how many had it before, and what is left.

        Each block is chosen when the next is asked for. One that others had comes in an order of
        its own, so that two workers on the same block meet somewhere instead of doing every row
        twice.

        Args:
            pending: The blocks that have work.
            look: Called before each choice, to read what others committed; told whether all that is
                left is claimed.
            left: The requests of a block that nobody has committed.
        """
        open_blocks = dict.fromkeys(pending)
        claims = Counter[int]()
        while open_blocks:
            if time.monotonic() >= self._next_look:
                claims = self._counts()
            if claims[next(iter(open_blocks))] or not claims:
                open_blocks = self._turned(open_blocks, claims)
            in_order = sorted(open_blocks, key=lambda block: claims[block])
            look(claims[in_order[0]] > 0)
            for block in in_order:
                requests = left(block)
                if not requests:
                    del open_blocks[block]
                    continue
                had = claims[block]
                if self._claim(block, had):
                    del open_blocks[block]
                    if had:
                        self._random.shuffle(requests)
                    yield had, requests
                if had or block in open_blocks:  # the others have come this far
                    self._next_look = 0.0
                break

    def _turned(self, pending: Iterable[int], claims: Counter[int]) -> dict[int, None]:
        """Blocks in their order from any one of those with the fewest claims, so that workers spread.

        Else two of them that meet would go on side by side, and each claim of one would be tried by the
        other.
        """
        blocks = sorted(pending)
        fewest = min((claims[block] for block in blocks), default=0)
        free = [number for number, block in enumerate(blocks) if claims[block] == fewest]
        start = self._random.choice(free) if free else 0
        return dict.fromkeys(blocks[start:] + blocks[:start])

    def _counts(self) -> Counter[int]:
        """How many claims each block has; the next look is due when this one has taken little of the time."""
        began, counts = time.monotonic(), Counter[int]()
        for name in self._files.names(
            self._folder
        ):  # old claims may have been vacuumed: the highest number counts
            if found := _CLAIM.fullmatch(name):
                block, number = int(found["block"]), int(found["number"])
                counts[block] = max(counts[block], number + 1)
        now = time.monotonic()
        self._next_look = now + LOOK_SHARE * (now - began)
        return counts

    def _claim(self, block: int, number: int) -> bool:
        who = {"worker": self._worker, "host": socket.gethostname(), "process": os.getpid()}
        return self._files.put_if_absent(
            f"{self._folder}/{block:08d}.{number}.json", canonical_json(who)
        )
