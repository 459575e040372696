"""Random kill -9 over 1 to 4 workers on one store.

It counts how many rows are lost, duplicated, or have to be made again.

    python tests/bench/kills.py [--kills 1000] [--seed 0] [--tiny]

Workers are processes forked from this one (so that a thousand of them cost minutes), each with a
writer of its own and all rows of the store in an order of its own. Each is killed at a random
moment of its life, most often in the middle of a commit. When all are dead the store is verified,
and other workers go on, until every row is there; then another store begins. A worker says what it
adds before it adds it, and what is committed once the writer says so.

Rows lost: said to be committed, and not there. Duplicated: in two commits. Redone: added by a
killed worker and not in the store, so that somebody has to make them again; at most two commit
intervals, the rows that wait and the shard in the making. It prints a table, then one line of JSON.
"""

import argparse
import json
import os
import random
import selectors
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import samples

from stillroom.storage.integrity.verify import verify
from stillroom.storage.keys import KEY_BYTES
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
from stillroom.storage.tables.rows import check_row, rows_to_table

ROWS = 96
COMMIT_ROWS = 8
BOUND = 2 * COMMIT_ROWS
"""Rows to be made again after a kill: those that wait, and those of the shard in the making."""
LIFE_SECONDS = 0.25
"""A worker is killed at a moment between 0 and this after its start; alone and undisturbed it lives
about as long."""


@dataclass
class Worker:
    """A process that adds rows."""

    pid: int
    line: int
    dies: float
    said: bytes = b""
    killed: bool = False

    def added(self) -> list[int]:
        """Rows that it added, the last commit and before too."""
        return [int(word[1:]) for word in self._words() if word.startswith(b"a")]

    def committed(self) -> list[int]:
        """Rows that it said are committed."""
        return [int(word[1:]) for word in self._words() if word.startswith(b"c")]

    def _words(self) -> list[bytes]:
        return self.said.split(b"\n")[
            :-1
        ]  # what follows the last line end was cut short by the kill


@dataclass
class Tally:
    """What was counted."""

    kills: int = 0
    ended: int = 0
    stores: int = 0
    verified: int = 0
    problems: int = 0
    lost: int = 0
    duplicated: int = 0
    redone: list[int] = field(default_factory=list)
    workers: Counter[int] = field(default_factory=Counter)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--tiny", action="store_true", help="30 kills")
    words = parser.parse_args()
    kills = 30 if words.tiny else words.kills
    rng = random.Random(words.seed)
    rows = [samples.target_row(index, tokens=4) for index in range(ROWS)]
    rows_to_table(
        "soft_targets", [check_row("soft_targets", row) for row in rows]
    )  # what Arrow loads late, load once
    tally = Tally()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stillroom-kills-") as folder:
        while tally.kills < kills:
            tally.stores += 1
            _one_store(Path(folder) / str(tally.stores), rows, rng, tally, kills=kills)
    _print(tally, time.monotonic() - began)


def _one_store(
    root: Path, rows: list[dict[str, Any]], rng: random.Random, tally: Tally, *, kills: int
) -> None:
    """Workers, killed and followed by others, until every row is in the store."""
    committed: set[int] = set()
    done = False
    while not done:
        count = rng.randint(1, 4)
        spared = tally.kills >= kills
        workers = [_start(root, rows, rng, spared=spared) for _ in range(count)]
        _watch(workers)
        tally.workers[count] += 1
        tally.kills += sum(worker.killed for worker in workers)
        tally.ended += sum(not worker.killed for worker in workers)
        done = _count(root, rows, workers, committed, tally)


def _start(root: Path, rows: list[dict[str, Any]], rng: random.Random, *, spared: bool) -> Worker:
    order = rng.sample(range(ROWS), ROWS)
    dies = float("inf") if spared else time.monotonic() + rng.uniform(0, LIFE_SECONDS)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Worker(pid, reading, dies)
    try:
        _work(root, [rows[i] for i in order], order, writing)
        os._exit(0)
    finally:
        os._exit(1)


def _work(root: Path, rows: list[dict[str, Any]], order: list[int], line: int) -> None:
    store = Store.open(root, create=True)
    limits = CommitLimits(rows=COMMIT_ROWS)
    with store.writer("soft_targets", about=samples.ABOUT, limits=limits) as writer:
        committed = 0
        added: dict[int, bytes] = {}
        for index, row in zip(order, rows, strict=True):
            if writer.committed(row["key"]):
                continue
            os.write(line, b"a%d\n" % index)
            writer.add(row)
            added[index] = row["key"]
            if writer.rows > committed:
                committed = writer.rows
                known = [index for index, key in added.items() if writer.committed(key)]
                os.write(line, b"".join(b"c%d\n" % index for index in known))
    os.write(line, b"".join(b"c%d\n" % index for index in added))


def _watch(workers: list[Worker]) -> None:
    """Read what the workers say and kill each when its time has come, until none lives."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.line, selectors.EVENT_READ, worker)
        while selector.get_map():
            living = [key.data for key in selector.get_map().values()]
            next_death = min((w.dies for w in living if not w.killed), default=float("inf"))
            wait = None if next_death == float("inf") else max(0.0, next_death - time.monotonic())
            for key, _ in selector.select(wait):
                chunk = os.read(key.data.line, 1 << 16)
                key.data.said += chunk
                if not chunk:
                    selector.unregister(key.data.line)
                    os.close(key.data.line)
                    status = os.waitpid(key.data.pid, 0)[1]
                    key.data.killed = os.WIFSIGNALED(status)
                    assert key.data.killed or os.waitstatus_to_exitcode(status) == 0, (
                        "a worker failed"
                    )
            for key in list(selector.get_map().values()):
                if time.monotonic() >= key.data.dies and not key.data.killed:
                    key.data.killed = True
                    os.kill(key.data.pid, signal.SIGKILL)


def _count(
    root: Path, rows: list[dict[str, Any]], workers: list[Worker], committed: set[int], tally: Tally
) -> bool:
    """Verify the store and compare it with what the workers said; whether every row is there."""
    there, problems = _verified(root)
    numbers = {row["key"]: index for index, row in enumerate(rows)}
    found = Counter(numbers[key] for key in there)
    for worker in workers:
        committed.update(worker.committed())
        if worker.killed:
            redone = len([index for index in worker.added() if index not in found])
            assert redone <= BOUND, f"{redone} rows to be made again after one kill"
            tally.redone.append(redone)
    tally.verified += 1
    tally.problems += problems
    tally.lost += len([index for index in committed if index not in found])
    tally.duplicated += sum(count - 1 for count in found.values())
    return len(found) == ROWS


def _verified(root: Path) -> tuple[list[bytes], int]:
    """Keys in the store, and problems.

    They are found in a process of its own, for a forked one must not inherit Arrow's threads.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            store = Store.open(root, create=True)
            keys = store.index("soft_targets", ["key"])["key"].to_pylist()
            with os.fdopen(writing, "wb") as line:
                line.write(len(verify(store).problems).to_bytes(4, "big") + b"".join(keys))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as line:
        said = line.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "verifying failed"
    keys = [said[i : i + KEY_BYTES] for i in range(4, len(said), KEY_BYTES)]
    return keys, int.from_bytes(said[:4], "big")


def _print(tally: Tally, seconds: float) -> None:
    redone = tally.redone or [0]
    result = {
        "kills": tally.kills,
        "workers_that_ended": tally.ended,
        "rounds_by_workers": {str(n): tally.workers[n] for n in sorted(tally.workers)},
        "stores": tally.stores,
        "verified": tally.verified,
        "problems": tally.problems,
        "rows_lost": tally.lost,
        "rows_duplicated": tally.duplicated,
        "rows_redone_mean": round(sum(redone) / len(redone), 2),
        "rows_redone_max": max(redone),
        "rows_redone_bound": BOUND,
        "seconds": round(seconds, 1),
    }
    for name, value in result.items():
        sys.stdout.write(f"{name:<22} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
