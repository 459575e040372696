"""Claims: which part of a stage's work a worker takes next, so that workers of one store share it.

A block is a slice of the planned requests, the same for every worker. Before it works on a block a
worker puts a claim, `claims/<stage>/<work id>/<block>.<n>.json`, where n counts the claims that the
block had; it takes one with as few as any. So blocks that nobody has claimed go first, then those
with one claim, whose worker vanished or is busy with it still, and so on; a worker takes no block
twice.

Workers know nothing of one another, not even how many there are. Each goes through the work in an
order of its own, a thousand blocks at a time, begins anywhere among these, and looks at their
claims just before it puts its own: one request, as their names begin alike. So two workers meet
only where both choose the same block within the time of two requests. A thousand that are all
claimed are never looked at again for a free one.

At the end all blocks are claimed. The second on a block comes from its other end (`in_turn`), so
the two share what is left of it. More than two would make rows twice, so a worker that finds
nothing with fewer claims leaves it to those two for about as long as it takes for a block itself.
It looks whether they are done, and only then joins them. Where nobody has committed anything since
it began, the claims are of workers that are gone: then it waits for nobody.

Claims are advice. That each row is in the store once is the commit log's doing, whatever workers
do. So a claim is never withdrawn, and nobody asks how old it is: no lease, no heartbeat, and no
clock but to wait a while. Work done twice is wasted at worst, and whoever commits first wins
(backup tasks, as in MapReduce, Dean and Ghemawat 2004).
"""

import os
import random
import re
import socket
import time
import uuid
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ...storage.files.base import Files
from ...storage.keys import canonical_json, content_id

T = TypeVar("T")
TOGETHER = 1000
"""Blocks that are looked at together: an object store lists a thousand names in one request."""
CROWD = 2
"""Claims of a block that others are left alone with for a while."""
_BEGINNING = 5  # digits that their names share
_CLAIM = re.compile(r"(?P<block>[0-9]{8})\.(?P<number>[0-9]{1,9})\.json")


class Claims:
    """One worker's view of who works on what."""

    def __init__(self, files: Files, stage: str, **work: Any) -> None:
        """Take `work`, all that determines the planned requests and their order.

        Others with the same work share it.
        """
        self._files = files
        self._folder = f"claims/{stage}/{content_id('work', stage=stage, **work)}"
        self._worker = uuid.uuid4().hex
        self._random = random.Random(self._worker)
        self._claims = Counter[int]()  # of each block, as far as known: there are no fewer
        self._last = -1
        self._parts: dict[int, _Part] | None = None
        self._asked_again = False
        self._block_seconds = 0.0
        self._wait_until: float | None = None

    @property
    def wait(self) -> float | None:
        """Seconds for which others are left alone with all that is left; None: nothing is."""
        if not self._parts:
            return None
        return max(0.0, (self._wait_until or 0.0) - time.monotonic())

    def blocks(
        self,
        pending: Iterable[int],
        *,
        look: Callable[[bool], int],
        left: Callable[[int], list[T]],
        again: Callable[[set[int]], Iterable[int]] | None = None,
    ) -> Iterator[tuple[int, list[T]]]:
        """Claim one block after the other, until none has anything left.

        It gives how many had a block before, and what is left of it. Each block is chosen when the
        next is asked for. Where others are to be left alone with the rest, it ends too, and `wait`
        says for how long; then it is called again.

        Args:
            pending: The blocks that have work.
            look: Called before each choice, to read what others committed; told whether all that is
                left is claimed. It says how many commits they have made since this worker began: of
                none, the claims are of workers that are gone, and nobody is left alone.
            left: The requests of a block that nobody has committed.
            again: Asked once, when all that is left is claimed: which of the blocks that it is
                given have work still. To ask `left` of each takes long where there are many.
        """
        if self._parts is None:
            self._parts = self._in_parts(pending)
        while parts := self._parts:
            fewest = min(part.fewest for part in parts.values())
            if fewest and again is not None and not self._asked_again:
                others = set().union(*(part.open for part in parts.values()))
                self._parts = self._in_parts(others.intersection(again(others)))
                self._asked_again = True
                continue
            there = look(fewest > 0) > 0
            if fewest >= CROWD and there:
                if self._waits(left):
                    return
                # Some of it was done meanwhile, maybe all that had the fewest claims.
                fewest = min(part.fewest for part in parts.values())
            number = self._chosen([n for n, part in parts.items() if part.fewest == fewest])
            if requests := self._taken(number, fewest, left):
                began = time.monotonic()
                yield fewest, requests
                self._block_seconds = time.monotonic() - began

    def _taken(self, number: int, fewest: int, left: Callable[[int], list[T]]) -> list[T]:
        """What is left of a block that this worker claims now, if it has one.

        The block is one with so few claims.
        """
        assert self._parts is not None
        part, requests = self._parts[number], list[T]()
        self._see(number)
        for block in self._in_order(part.with_claims(fewest, self._claims)):
            requests = left(block)
            if not requests:
                part.open.discard(block)
                continue
            if self._claim(block, fewest):
                self._last, self._wait_until = block, None
                part.open.discard(block)
            else:  # another worker was a moment earlier
                self._claims[block], requests = fewest + 1, []
            break
        part.count(self._claims)
        if not part.open:
            del self._parts[number]
        return requests

    def _waits(self, left: Callable[[int], list[T]]) -> bool:
        """Whether others are left alone, for they are at all that is left.

        What they have done is left out.
        """
        assert self._parts is not None
        if self._wait_until is None:
            self._wait_until = time.monotonic() + self._block_seconds * self._random.uniform(
                0.5, 1.5
            )
        for number, part in list(self._parts.items()):
            for block in list(part.open):
                if left(block):
                    return time.monotonic() < self._wait_until
                part.open.discard(block)
            del self._parts[number]
        return True

    def _in_parts(self, pending: Iterable[int]) -> dict[int, "_Part"]:
        """Blocks that have work, by the beginning of their names.

        They are in an order of this worker's own.
        """
        parts: dict[int, _Part] = {}
        for block in pending:
            parts.setdefault(block // TOGETHER, _Part()).open.add(block)
        numbers = sorted(parts)
        self._random.shuffle(numbers)
        for part in parts.values():
            part.count(self._claims)
        return {number: parts[number] for number in numbers}

    def _chosen(self, numbers: list[int]) -> int:
        """Where it was last, if it can go on there; else the next of its order."""
        here = self._last // TOGETHER
        return here if here in numbers else numbers[0]

    def _in_order(self, blocks: list[int]) -> list[int]:
        """On from the last one, as long as nobody else is there; else from any."""
        start = bisect(blocks, self._last)
        if start == len(blocks) or blocks[start] != self._last + 1:
            start = self._random.randrange(len(blocks) or 1)
        return blocks[start:] + blocks[:start]

    def _see(self, number: int) -> None:
        """Look at the claims of blocks whose names begin alike."""
        for name in self._files.names(self._folder, f"{number:0{_BEGINNING}d}"):
            if found := _CLAIM.fullmatch(name):
                # Old claims may have been vacuumed: the highest number counts.
                block, claims = int(found["block"]), int(found["number"]) + 1
                self._claims[block] = max(self._claims[block], claims)

    def _claim(self, block: int, number: int) -> bool:
        who = {"worker": self._worker, "host": socket.gethostname(), "process": os.getpid()}
        return self._files.put_if_absent(
            f"{self._folder}/{block:08d}.{number}.json", canonical_json(who)
        )


class _Part:
    """Blocks whose names begin alike."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        """Those that may have work, and that this worker has not taken."""
        self.fewest = 0
        """Claims that one of them has at least, as far as known."""

    def with_claims(self, number: int, claims: Counter[int]) -> list[int]:
        """The open blocks that have so many claims, ascending."""
        return sorted(block for block in self.open if claims[block] == number)

    def count(self, claims: Counter[int]) -> None:
        """Say anew how few claims there are."""
        self.fewest = min((claims[block] for block in self.open), default=0)


def in_turn(claims: int, rows: list[T]) -> list[T]:
    """A block's rows, in the order in which a worker does them who finds so many claims on it.

    The first goes through them in their order, the second comes from the end, so that the two meet;
    whoever comes after them goes at random.
    """
    if claims > 1:
        return random.sample(rows, len(rows))
    return rows[::-1] if claims else rows
