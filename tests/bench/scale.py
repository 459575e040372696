"""How do 1 to 1,024 workers on one store behave, with an object store's latencies and failures?

    python tests/bench/scale.py [--tiny] [--workers 1,16,128] [--blocks 16] [--claims-only]
    python tests/bench/scale.py --commits 512,2048

Simulated: each worker is a thread with the real `Claims`, `ShardWriter`, `CommitLog` and
`ObjectFiles`, on a bucket in memory whose requests take time on one clock that no second passes on;
one thread runs at a time, so a run is the same each time. A block is 512 rows and takes a worker a
minute, give or take a fifth; it commits 256 rows at once, or what it has after 30 seconds. Workers
begin within a minute of one another (`--start`). Of the requests that fail a third get no answer at
all, a third are refused (503) and tried again by the driver after a second, and a third are done
and their answer is lost: `put_if_absent` has to find out. Not simulated are the rows themselves and
their shards. `--claims-only` leaves out the log of commits, whose simulation grows with the square
of the workers: each then knows at once what the others did.

Asked are, for each number of workers: how many claims another worker took first; rows made twice;
the commits that one worker a second makes, how often another took the number, and the rows of a
commit; requests a second; and how much of the time workers worked.

`--commits` counts what else a store is asked for: requests of a plan that finds no index segments,
of making these, of a plan that finds them, and of a snapshot of all rows, on real shards.
"""

import heapq
import json
import random
import struct
import threading
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from stillroom.stages.workers import claims
from stillroom.stages.workers.claims import Claims, in_turn
from stillroom.storage.files import objects
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.files.objects import ObjectFiles
from stillroom.storage.keys import KEY_BYTES, content_key
from stillroom.storage.snapshots.snapshot import make_snapshot, save_snapshot
from stillroom.storage.store import commits, writer
from stillroom.storage.store.commits import CommitLog
from stillroom.storage.store.index import Index
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits, ShardWriter
from stillroom.storage.tables.shard import ShardInfo, shard_folder

BLOCK_SECONDS, SPREAD = 60.0, 0.2
PIECES, PIECE_ROWS = 4, 128
"""Rows are counted in pieces, the least that two workers can share of a block."""
LIMITS = CommitLimits(rows=256 // PIECE_ROWS, seconds=30.0)
LOOK_SECONDS, LOOK_SHARE = 2.0, 20  # as `share.py` looks
AGAIN_SECONDS, TIMEOUT_SECONDS = 1.0, 5.0
PAGE = 1000
"""Names that one request lists."""
BEGINNING = 5
"""Of a prefix that is asked for."""


class World:
    """One clock for all; whoever's moment is next runs, and the others wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self._next: list[tuple[float, int, threading.Semaphore]] = []
        self._numbers = count()

    def sleep(self, me: threading.Semaphore, seconds: float) -> None:
        """Let the others go on for so long."""
        self.put(self.now + seconds, me)
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


class Bucket:
    """What a driver of fsspec does for `ObjectFiles`, with a request's time and its failures."""

    def __init__(self, latency: float, failures: float) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        """By folder and name."""
        self._named: dict[tuple[str, str], list[str]] = {}
        self.counts: Counter[str] = Counter()
        self._latency, self._failures = latency, failures
        self._random = random.Random(0)

    def _takes(self, kind: str, requests: int = 1, *, at_once: bool = False) -> bool:
        """Pass the time of so many requests, with the driver's own tries.

        Whether the last one's answer is lost.
        """
        self.counts[kind] += requests
        seconds = self._latency * self._random.uniform(0.5, 1.5) * (1 if at_once else requests)
        lost = False
        if self._random.random() < 1 - (1 - self._failures) ** requests:
            how = self._random.choice(("silent", "refused", "lost"))
            lost = how == "lost"
            seconds += AGAIN_SECONDS if how == "refused" else TIMEOUT_SECONDS
        thread = threading.current_thread()
        if isinstance(thread, Worker):
            thread.pass_time(seconds)
        return lost

    def _found(self, key: str) -> bytes:
        folder, _, name = key.rpartition("/")
        try:
            return self.files[folder][name]
        except KeyError:
            raise FileNotFoundError(key) from None

    def cat_file(self, key: str, start: int, end: int | None) -> bytes:
        self._takes("read")
        return self._found(key)[start:end]

    def cat(self, keys: list[str], *, on_error: str, start: int) -> dict[str, Any]:
        self._takes("read", len(keys), at_once=True)
        found: dict[str, Any] = {}
        for key in keys:
            try:
                found[key] = self._found(key)
            except FileNotFoundError as error:
                found[key] = error
        return found

    def find(self, key: str, *, detail: bool, prefix: str = "") -> dict[str, Any]:
        names = self._named.get((key, prefix), ()) if prefix else self.files.get(key, {})
        self._takes("list", 1 + len(names) // PAGE)
        return {f"{key}/{name}": {"name": f"{key}/{name}", "type": "file"} for name in names}

    def ls(self, key: str, *, detail: bool) -> list[Any]:
        return list(self.find(key, detail=True).values())

    def info(self, key: str) -> dict[str, Any]:
        self._takes("read")
        return {"type": "file", "size": len(self._found(key))}

    def pipe_file(self, key: str, data: bytes, mode: str = "overwrite") -> None:
        folder, _, name = key.rpartition("/")
        kind = folder.rpartition("/")[2] if "/claims/" not in key else "claims"
        lost = self._takes("put")
        there = self.files.setdefault(folder, {})
        if mode == "create" and name in there:
            self.counts[f"{kind} refused"] += 1
            raise FileExistsError(key)
        if name not in there:
            self._named.setdefault((key.rpartition("/")[0], name[:BEGINNING]), []).append(name)
        there[name] = data
        self.counts[kind] += 1
        if lost:
            raise TimeoutError(key)

    def put_file(self, path: str, key: str) -> None:
        self.pipe_file(key, Path(path).read_bytes())


class Stored(ObjectFiles):
    """The files of the simulated bucket."""

    def __init__(self, bucket: Bucket, cache: Path) -> None:
        self.root, self._path, self._exclusive = "simulated://store", "store", True
        self._bucket, self._cache = bucket, LocalFiles(cache)

    def _open(self) -> tuple[Any, str]:
        return self._bucket, self._path

    @property
    def cache(self) -> LocalFiles:
        return self._cache


class Keys:
    """In place of a `KeySet`: all logs have the same keys in the same order.

    So how many there are says which.
    """

    order: ClassVar[dict[bytes, int]] = {}

    def __init__(self, joined: bytes = b"") -> None:
        self._known = 0

    def update(self, joined: bytes) -> None:
        """More keys are known."""
        for at in range(0, len(joined), KEY_BYTES):
            Keys.order.setdefault(joined[at : at + KEY_BYTES], self._known)
            self._known += 1

    def __contains__(self, key: bytes) -> bool:
        return self.order.get(key, self._known) < self._known


class AtOnce:
    """In place of the pool in which a writer makes its shards."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        """Done when it is asked for."""
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self) -> None:
        """There is nothing to end."""


class NoLog:
    """In place of a `ShardWriter`: what one has done all know at once."""

    def __init__(self, done: set[bytes]) -> None:
        self._done, self._own = done, 0

    @property
    def others(self) -> int:
        """What others have done, though none of it is a commit."""
        return len(self._done) - self._own

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def committed(self, key: bytes) -> bool:
        """Whether anybody has done it."""
        return key in self._done

    def add(self, row: dict[str, Any]) -> None:
        """It is done."""
        self._own += row["key"] not in self._done
        self._done.add(row["key"])

    def refresh(self) -> None:
        """Nothing is to be read."""

    tick = flush = refresh


class Worker(threading.Thread):
    """Claims blocks and commits their rows, as `stages/workers/share.py` does."""

    def __init__(self, world: World, number: int, blocks: int) -> None:
        super().__init__(daemon=True)
        self.world, self.turn = world, threading.Semaphore(0)
        self.random = random.Random(number)
        self.made = 0
        self.worked = self.ended = 0.0
        self.failure: BaseException | None = None
        self.files: Any = None
        self.writer: Any = None
        self._number, self._blocks, self._next_look = number, blocks, 0.0

    def pass_time(self, seconds: float) -> None:
        """A request, or work."""
        self.world.sleep(self.turn, seconds)

    def run(self) -> None:
        """Its whole life."""
        self.turn.acquire()
        try:
            with self.writer:
                self._work()
        except BaseException as error:
            self.failure = error
        self.ended = self.world.now
        self.world.wake()

    def _work(self) -> None:
        mine = Claims(self.files, "generate", work="simulated")
        mine._random, mine._worker = self.random, str(self._number)
        while True:
            for had, pieces in mine.blocks(range(self._blocks), look=self._look, left=self._left):
                for key in in_turn(had, pieces):
                    if self.world.now >= self._next_look:
                        self._look(False)
                    if not self.writer.committed(key):
                        self._make(key)
            if mine.wait is None:
                return
            self.pass_time(min(max(mine.wait, 0.01), LOOK_SECONDS))
            self.writer.tick()

    def _left(self, block: int) -> list[bytes]:
        keys = (struct.pack(">QQ", block, piece) for piece in range(PIECES))
        return [key for key in keys if not self.writer.committed(key)]

    def _look(self, commit: bool) -> int:
        began = self.world.now
        if commit:
            self.writer.flush()
        self.writer.refresh()
        took = self.world.now - began
        self._next_look = self.world.now + max(LOOK_SECONDS, LOOK_SHARE * took)
        return self.writer.others

    def _make(self, key: bytes) -> None:
        seconds = BLOCK_SECONDS / PIECES * self.random.uniform(1 - SPREAD, 1 + SPREAD)
        self.worked += seconds
        self.pass_time(seconds)
        self.made += 1
        self.writer.tick()
        self.writer.add({"key": key, "completion_tokens": 1})


def shard_of(_: Any, __: Any, rows: list[dict[str, Any]], **___: Any) -> ShardInfo:
    """A shard that nobody reads."""
    sha256 = (rows[0]["key"].hex() + f"{len(rows):032x}")[:64]
    name = f"{shard_folder('generations')}/{sha256[:2]}/{sha256[:32]}.parquet"
    return ShardInfo(name, sha256, 1000 * len(rows), len(rows), (len(rows),))


def simulate(arguments: Any, workers: int) -> dict[str, Any]:
    """All workers on one store, until every block is done."""
    world, bucket = World(), Bucket(arguments.latency, arguments.failures)
    blocks, done = arguments.blocks * workers, set[bytes]()
    crew = [Worker(world, number, blocks) for number in range(workers)]
    with simulated(world):
        for worker in crew:
            worker.files = Stored(bucket, Path())
            log = CommitLog(worker.files, "generations", track_keys=True)
            real = ShardWriter(worker.files, log, about={}, limits=LIMITS)
            worker.writer = NoLog(done) if arguments.claims_only else real
            worker.start()
            world.put(worker.random.uniform(0, arguments.start), worker.turn)
        world.wake()
        for worker in crew:
            worker.join()
    for worker in crew:
        if worker.failure is not None:
            raise worker.failure
    committed = len(done) if arguments.claims_only else sum(w.writer.rows for w in crew)
    if committed != blocks * PIECES:
        raise SystemExit(f"{committed} rows of {blocks * PIECES}: lost, or there twice")
    return measured(crew, bucket.counts, pieces=committed)


def measured(crew: list[Worker], counts: Counter[str], *, pieces: int) -> dict[str, Any]:
    """What they did, and what it took."""
    lasted = max(worker.ended for worker in crew)
    made, commits_made = sum(w.made for w in crew), counts["generations"]
    rates = {f"{kind}s_per_second": counts[kind] / lasted for kind in ("list", "read", "put")}
    found = {
        "claims_refused_percent": 100 * counts["claims refused"] / (pieces / PIECES),
        "claims_per_block": counts["claims"] / (pieces / PIECES),
        "made_twice_percent": 100 * (made - pieces) / pieces,
    }
    if commits_made:
        found["commits_per_second"] = commits_made / lasted
        found["commits_refused_per_commit"] = counts["generations refused"] / commits_made
        found["rows_per_commit"] = PIECE_ROWS * pieces / commits_made
    return {
        "workers": len(crew),
        **{name: round(value, 2) for name, value in (found | rates).items()},
        "at_work_percent": round(100 * sum(w.worked for w in crew) / (lasted * len(crew)), 1),
        "minutes": round(lasted / 60, 1),
    }


@contextmanager
def simulated(world: World) -> Iterator[None]:
    """The clock, and what is not simulated: rows, shards, and parsing a record more than once."""
    read, known = commits._read_record, dict[int, Any]()

    def once(data: bytes, table: Any, seq: int) -> Any:
        if seq not in known:
            known[seq] = read(data, table, seq)
        return known[seq]

    def sleep(seconds: float) -> None:
        thread = threading.current_thread()
        if seconds and isinstance(thread, Worker):
            thread.pass_time(seconds)

    Keys.order = {}
    clock = SimpleNamespace(monotonic=lambda: world.now, sleep=sleep)
    with ExitStack() as stack:
        for module, name, instead in (
            (writer, "time", clock),
            (objects, "time", clock),
            (claims, "time", clock),
            (commits, "KeySet", Keys),
            (commits, "_read_record", once),
            (writer, "ThreadPoolExecutor", AtOnce),
            (writer, "write_shard", shard_of),
            (writer, "check_row", lambda _, row: row),
            (writer, "check_shape", lambda *_: None),
            (writer, "row_bytes", lambda _: 0),
            (writer, "keep_last_segment", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(module, name, instead))
        yield


def asked_for(made: int) -> dict[str, Any]:
    """Requests of plan, segments and snapshot of a store of so many commits.

    Real code makes them, on real shards.
    """
    bucket = Bucket(0.0, 0.0)
    found: dict[str, Any] = {"commits": made}
    with TemporaryDirectory() as folder:
        with mock.patch.object(writer, "keep_last_segment"):
            store = Store.from_files(Stored(bucket, Path(folder, "a")), create=True)
            rows = CommitLimits(rows=1)
            with store.writer("prompts", about={"stage": "data"}, limits=rows) as prompts:
                for number in range(made):
                    key = content_key("prompt", number=number)
                    row = {"key": key, "prompt_key": key, "format": "prompt", "text": "a"}
                    prompts.add(row | {"source": "bench"})
        for what, write in (("plan without segments", False), ("segments", True), ("plan", False)):
            fresh = Store.from_files(Stored(bucket, Path(folder, what)))
            before = bucket.counts.total()
            Index(fresh, write=write).close()
            found[f"{what}_requests"] = bucket.counts.total() - before
        before = bucket.counts.total()
        shards = {shard.sha256: np.arange(shard.rows) for shard in fresh.shards("prompts")}
        save_snapshot(fresh, make_snapshot(fresh, "prompts", shards, {}))
        found["snapshot_requests"] = bucket.counts.total() - before
    return found


def numbers(text: str) -> list[int]:
    """`1,16` -> [1, 16]."""
    return [int(part) for part in text.split(",")]


def results(arguments: Any) -> Iterator[dict[str, Any]]:
    """A row for each number of workers, or of commits."""
    for number in arguments.commits or arguments.workers:
        began = time.perf_counter()
        found = asked_for(number) if arguments.commits else simulate(arguments, number)
        yield found | {"seconds_to_simulate": round(time.perf_counter() - began, 1)}


def main() -> None:
    """Parse the command line, simulate, print."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few workers; shows nothing")
    parser.add_argument("--workers", type=numbers, default=[1, 16, 128])
    parser.add_argument("--blocks", type=int, default=16, help="for each worker")
    parser.add_argument("--claims-only", action="store_true", help="without the log of commits")
    parser.add_argument("--commits", type=numbers, help="count requests of plan and snapshot")
    parser.add_argument("--start", type=float, default=60.0, help="seconds in which workers begin")
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
