"""How do claims and commits of 1 to 1,024 workers on one store behave, with an object store's latencies and failures?

    python tests/bench/scale.py [--tiny] [--workers 1,16,128] [--blocks 16] [--claims-only]

Simulated: each worker is a thread with the real `Claims` and the real `CommitLog`, on a store in memory
whose requests take time on one clock that no second passes on; one thread runs at a time, so a run
is the same each time. A block is 512 rows and takes a worker a minute, give or take a fifth; it
commits 256 rows at once, as by default every 30 seconds. Workers begin within a minute of one another. A
request that fails is sent again after a second. Not simulated are the rows themselves, their shards,
and looks between commits. `--claims-only` leaves out the log of commits, whose simulation grows with
the square of the workers: each then knows at once what the others did.

Asked are, for each number of workers: how many claims another worker took first; rows made twice;
commits whose number another took first; reads of commit records for each commit, which grow with the
workers, as each of them reads what the others did; and how much of the time workers worked.
"""

import heapq
import json
import random
import threading
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from stillroom.stages.workers import claims
from stillroom.stages.workers.claims import Claims
from stillroom.storage.files.base import Files
from stillroom.storage.keys import content_key
from stillroom.storage.store import commits
from stillroom.storage.store.commits import CommitLog
from stillroom.storage.tables.shard import ShardInfo, shard_folder

BLOCK_SECONDS, SPREAD, HALVES, ROWS = 60.0, 0.2, 2, 256
AGAIN_SECONDS = 1.0
PAGE = 1000
"""Names that one request lists."""


class World:
    """One clock for all; whoever's moment is next runs, and the others wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self._next: list[tuple[float, int, threading.Semaphore]] = []
        self._numbers = count()

    def sleep(self, me: threading.Semaphore, seconds: float) -> None:
        """Let the others go on for so long."""
        heapq.heappush(self._next, (self.now + seconds, next(self._numbers), me))
        self.wake()
        me.acquire()

    def wake(self) -> None:
        """Let the next one go on."""
        if self._next:
            self.now, _, one = heapq.heappop(self._next)
            one.release()

    def put(self, moment: float, one: threading.Semaphore) -> None:
        """Somebody begins at a moment."""
        heapq.heappush(self._next, (moment, next(self._numbers), one))


class Place:
    """What is stored, by folder and name."""

    def __init__(self) -> None:
        self.folders: dict[str, dict[Any, bytes]] = {}

    def folder(self, name: str) -> dict[Any, bytes]:
        """The names in a folder."""
        return self.folders.setdefault(name, {})


class Requests:
    """`Files` as far as claims and commits ask for it: every request of one worker takes its time."""

    root = "simulated"

    def __init__(self, place: Place, worker: "Worker", latency: float, failures: float) -> None:
        self._place, self._worker = place, worker
        self._latency, self._failures = latency, failures

    def _takes(self, kind: str, requests: int = 1, *, now: bool = True) -> None:
        """The time of so many requests; reads are added up and passed together with what comes next."""
        self._worker.counts[kind] += requests
        failed = sum(self._worker.random.random() < self._failures for _ in range(min(requests, 8)))
        spread = self._worker.random.uniform(0.5, 1.5)
        self._worker.late += self._latency * spread * requests + AGAIN_SECONDS * failed
        if now:
            self._worker.catch_up()

    def names(self, folder: str) -> list[str]:
        """As `Files.names`."""
        found = sorted(self._place.folder(folder))
        self._takes("list", 1 + len(found) // PAGE)
        return found

    def exists(self, name: str) -> bool:
        """As `Files.exists`."""
        self._takes("read", now=False)
        folder, _, file = name.rpartition("/")
        return file in self._place.folder(folder)

    def read(self, name: str) -> bytes:
        """As `Files.read`."""
        self._takes("read", now=False)
        folder, _, file = name.rpartition("/")
        if file not in self._place.folder(folder):
            raise FileNotFoundError(name)
        return self._place.folder(folder)[file]

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """As `Files.put_if_absent`."""
        self._takes("put")
        folder, _, file = name.rpartition("/")
        first = file not in self._place.folder(folder)
        if first:
            self._place.folder(folder)[file] = data
        self._worker.counts[f"{folder.partition('/')[0]} {'put' if first else 'refused'}"] += 1
        return first


class NoLog:
    """In place of a `CommitLog`: what one has done all know at once."""

    def __init__(self, place: Place) -> None:
        self.keys = place.folder("done")
        self._log = place.folder("commits/generations")

    def advance(self) -> None:
        """Nothing is to be read."""

    def append(self, fields: Any, shard: Any, keys: Sequence[bytes]) -> bool:
        """Always the next number."""
        self.keys |= dict.fromkeys(keys, b"")
        self._log[str(len(self._log))] = b""
        return True


class Worker:
    """Claims blocks and commits their rows, as `stages/workers/share.py` and the writer do."""

    def __init__(self, world: World, number: int, blocks: int) -> None:
        self.world, self.turn = world, threading.Semaphore(0)
        self.random = random.Random(number)
        self.counts: Counter[str] = Counter()
        self.late = self.worked = self.ended = 0.0
        self.failure: BaseException | None = None
        self._number, self._blocks = number, blocks

    def catch_up(self) -> None:
        """Pass the time that its requests took."""
        seconds, self.late = self.late, 0.0
        self.world.sleep(self.turn, seconds)

    def run(self, files: Requests, log: Any) -> None:
        """Its whole life."""
        self.turn.acquire()
        try:
            self._work(cast(Files, files), log)
        except BaseException as error:
            self.failure = error
        self.ended = self.world.now
        self.world.wake()

    def _work(self, files: Files, log: Any) -> None:
        mine = Claims(files, "generate", work="simulated")
        mine._random = self.random
        mine._worker = str(self._number)

        def left(block: int) -> list[bytes]:
            return [key for key in keys_of(block) if key not in log.keys]

        blocks = mine.blocks(range(self._blocks), look=lambda _: log.advance(), left=left)
        for had, requests in blocks:
            self.counts["claims again"] += had > 0
            for key in requests:
                if key not in log.keys:
                    self._make(log, key)

    def _make(self, log: Any, key: bytes) -> None:
        seconds = BLOCK_SECONDS / HALVES * self.random.uniform(1 - SPREAD, 1 + SPREAD)
        self.worked += seconds
        self.late += seconds
        self.catch_up()
        self.counts["made"] += 1
        log.advance()
        while key not in log.keys:
            if log.append(FIELDS | {"writer": str(self._number)}, shard_of(key), [key]) is not None:
                return
        self.counts["made in vain"] += 1


FIELDS: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "stage": "generate", "versions": {}}


def keys_of(block: int) -> list[bytes]:
    """One key stands for the 256 rows of a commit."""
    return [content_key("simulated", block=block, half=half) for half in range(HALVES)]


def shard_of(key: bytes) -> ShardInfo:
    """A shard that nobody reads."""
    sha256 = key.hex() * 2
    name = f"{shard_folder('generations')}/{sha256[:2]}/{sha256[:32]}.parquet"
    return ShardInfo(name, sha256, 1, 1, (1,))


def simulate(
    workers: int, *, blocks: int, latency: float, failures: float, log: bool
) -> dict[str, Any]:
    """All workers on one store, until every block is done."""
    world, place = World(), Place()
    crew = [Worker(world, number, blocks * workers) for number in range(workers)]
    threads = []
    for worker in crew:
        files = Requests(place, worker, latency, failures)
        known = (
            CommitLog(cast(Files, files), "generations", track_keys=True) if log else NoLog(place)
        )
        threads.append(threading.Thread(target=worker.run, args=[files, known], daemon=True))
        threads[-1].start()
        world.put(worker.random.uniform(0, BLOCK_SECONDS), worker.turn)
    with on_the_clock(world):
        world.wake()
        for thread in threads:
            thread.join()
    for worker in crew:
        if worker.failure is not None:
            raise worker.failure
    return measured(crew, place, blocks=blocks * workers)


def measured(crew: Sequence[Worker], place: Place, *, blocks: int) -> dict[str, Any]:
    """What they did, and what it took."""
    total: Counter[str] = Counter()
    for worker in crew:
        total += worker.counts
    done = len(place.folder("commits/generations"))
    if done != blocks * HALVES:
        raise SystemExit(
            f"{done} commits of {blocks * HALVES} pieces of work: lost, or there twice"
        )
    lasted = max(worker.ended for worker in crew)
    tried = total["claims put"] + total["claims refused"]
    requests = total["list"] + total["read"] + total["put"]
    return {
        "workers": len(crew),
        "claims_refused_percent": round(100 * total["claims refused"] / tried, 2),
        "made_twice_percent": round(100 * (total["made"] - done) / done, 2),
        "commits_refused_per_commit": round(total["commits refused"] / done, 2),
        "reads_per_commit": round(total["read"] / done, 1),
        "requests_per_second": round(requests / lasted, 1),
        "at_work_percent": round(100 * sum(w.worked for w in crew) / (lasted * len(crew)), 1),
        "minutes": round(lasted / 60, 1),
    }


def on_the_clock(world: World) -> Any:
    """Claims look at the clock of the simulation."""
    return mock.patch.object(claims, "time", SimpleNamespace(monotonic=lambda: world.now))


def remembered() -> Any:
    """A record is parsed once for all workers: what it takes to parse it is not what is asked."""
    read = commits._read_record
    known: dict[str, Any] = {}

    def once(data: bytes, table: Any, seq: int) -> Any:
        if seq not in known:
            known[seq] = read(data, table, seq)
        return known[seq]

    return mock.patch.object(commits, "_read_record", once)


def numbers(text: str) -> list[int]:
    """`1,16` -> [1, 16]."""
    return [int(part) for part in text.split(",")]


def results(arguments: Any) -> Iterator[dict[str, Any]]:
    """A row for each number of workers."""
    for workers in arguments.workers:
        began = time.perf_counter()
        with remembered():
            found = simulate(
                workers,
                blocks=arguments.blocks,
                latency=arguments.latency,
                failures=arguments.failures,
                log=not arguments.claims_only,
            )
        yield found | {"seconds_to_simulate": round(time.perf_counter() - began, 1)}


def main() -> None:
    """Parse the command line, simulate, print."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few workers; shows nothing")
    parser.add_argument("--workers", type=numbers, default=[1, 16, 128])
    parser.add_argument("--blocks", type=int, default=16, help="for each worker")
    parser.add_argument("--claims-only", action="store_true", help="without the log of commits")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of a request")
    parser.add_argument("--failures", type=float, default=0.005, help="share of requests")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.workers = [1, 8]
    found = []
    for row in results(arguments):
        if not found:
            print(f"| {' | '.join(name.replace('_', ' ') for name in row)} |")
            print(f"|{' ---: |' * len(row)}")
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
        found.append(row)
    print(json.dumps({"bench": "scale", "latency": arguments.latency, "rows": found}))


if __name__ == "__main__":
    main()
