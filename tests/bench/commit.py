"""What a durable, verified commit of 256 rows costs, by step.

It also gives the share of one core that this is at 10k tokens/s.

    python tests/bench/commit.py [--entries 32 64] [--commits 8] [--tiny]

Rows are soft targets of 512 scored tokens with K entries of a vocabulary of 32,000: distinct ids by
Zipf's law, log probabilities of a softmax. Making them is not counted. Everything a writer does is:
checking each row, statistics, the Arrow table, Parquet, fsync, sha256, reading back with page
checksums and comparing, the record. Steps are timed one inside the other and shown without what is
inside, in one thread; in a run a shard is made beside the rest. It prints a table, then one line of
JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa

from stillroom.storage.files import base
from stillroom.storage.files import local as files
from stillroom.storage.keys import content_key
from stillroom.storage.store import commits, writer
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
from stillroom.storage.tables import shard
from stillroom.storage.tables.soft_targets import SoftTargets

ROWS, TOKENS, PROMPT, VOCABULARY, BITS = 256, 512, 32, 32_000, 10
TOKENS_PER_SECOND = 10_000
BAR = 0.03
STEPS = {
    "check rows": [(writer.ShardWriter, "add")],
    "statistics": [(writer, "statistics")],
    "arrow table": [(shard, "rows_to_table")],
    "encode": [(files.LocalFiles, "_write")],
    "fsync": [(files.LocalFiles, "_sync_file"), (files.LocalFiles, "_sync_folder")],
    "sha256": [(base, "file_sha256")],
    "read back": [(shard, "write_shard"), (writer, "write_shard")],
    "record": [(commits.CommitLog, "append")],
    "leave": [(writer.ShardWriter, "flush")],
}


class InTurn:
    """A stand-in for the writer's thread.

    A shard is made while its owner waits, so that the steps can be told apart.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes what the thread pool takes."""

    def submit(self, make: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Do it now."""
        made: Future[Any] = Future()
        made.set_result(make(*arguments))
        return made

    def shutdown(self) -> None:
        """Nothing to end."""


class Clock:
    """Time of each step without the steps inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = [0.0]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        self._inside.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[name] += spent - self._inside.pop()
            self._inside[-1] += spent

    def watch(self) -> None:
        """Time every step of `STEPS` from now on."""
        for name, places in STEPS.items():
            for owner, attribute in places:
                setattr(owner, attribute, self._timed(name, getattr(owner, attribute)))

    def _timed(self, name: str, function: Any) -> Any:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.step(name):
                return function(*arguments, **keywords)

        return timed


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--commits", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="one commit of 8 rows")
    words = parser.parse_args()
    if words.tiny:
        words.entries, words.commits = [32], 1
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    clock = Clock()
    clock.watch()
    setattr(writer, "ThreadPoolExecutor", InTurn)  # noqa: B010
    results = {
        str(k): _measure(clock, k, words.commits, rows=8 if words.tiny else ROWS)
        for k in words.entries
    }
    _print(results)


def _measure(clock: Clock, k: int, count: int, *, rows: int) -> dict[str, Any]:
    about = {
        "teacher_id": "t" * 32,
        "tokenizer_id": "k" * 32,
        "vocab_size": VOCABULARY,
        "mantissa_bits": BITS,
    }
    made = _rows(k, rows)
    walls, cpus = [], []
    with tempfile.TemporaryDirectory(prefix="stillroom-commit-", dir=".") as folder:
        store = Store.open(Path(folder) / "store", create=True)
        limits = CommitLimits(rows=rows, seconds=1e9, bytes=1 << 40)
        with store.writer("soft_targets", about=about, limits=limits) as open_writer:
            for number in range(count + 1):
                batch = [
                    {**row, "key": content_key("bench", number=number, row=i)}
                    for i, row in enumerate(made)
                ]
                if number == 1:  # the first one warms up
                    clock.seconds.clear()
                wall, cpu = time.perf_counter(), time.process_time()
                for row in batch:
                    open_writer.add(row)
                open_writer.flush()
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
        size = store.commits("soft_targets")[-1].shard.bytes
    walls, cpus = walls[1:], cpus[1:]
    tokens = rows * TOKENS
    return {
        "rows": rows,
        "tokens": tokens,
        "megabytes": round(size / 1e6, 2),
        "milliseconds": {name: round(1e3 * clock.seconds[name] / count, 1) for name in STEPS},
        "commit_milliseconds": round(1e3 * float(np.median(walls)), 1),
        "commit_milliseconds_max": round(1e3 * max(walls), 1),
        "cpu_milliseconds": round(1e3 * float(np.median(cpus)), 1),
        "share_of_one_core": round(float(np.median(cpus)) * TOKENS_PER_SECOND / tokens, 4),
        "share_of_wall": round(float(np.median(walls)) * TOKENS_PER_SECOND / tokens, 4),
    }


def _rows(k: int, count: int) -> list[dict[str, Any]]:
    """Rows that pass every check, without the key."""
    rng = np.random.default_rng(0)
    return [_row(rng, k, index) for index in range(count)]


def _row(rng: np.random.Generator, k: int, index: int) -> dict[str, Any]:
    token_ids = (rng.zipf(1.3, PROMPT + TOKENS) % VOCABULARY).astype(np.int32)
    logits = np.sort(rng.gumbel(0, 3, (TOKENS, 8 * k)).astype(np.float32), axis=1)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(rng.random((TOKENS, 8 * k)), axis=1) * (VOCABULARY // (8 * k)) + index % 7
    here = np.full(TOKENS, -20.0, np.float32)
    match = ids[:, :k] == token_ids[PROMPT:, None]
    here[match.any(axis=1)] = logprobs[:, :k][match]
    targets = SoftTargets(
        ids=np.ascontiguousarray(ids[:, :k].astype(np.int32)),
        logprobs=np.ascontiguousarray(logprobs[:, :k]),
        tail_logprob=np.log(np.exp(logprobs[:, k:]).sum(axis=1)),
        token_logprob=here,
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1),
    )
    names = {
        name: content_key("bench", name=name, index=index)
        for name in ("reuse_key", "tokens_key", "prompt_key")
    }
    return {
        **names,
        "generation_key": names["reuse_key"],
        "teacher_id": "t" * 32,
        "kind": "topk",
        "token_ids": token_ids,
        "span_start": PROMPT,
        **targets.columns(BITS),
    }


def _print(results: dict[str, dict[str, Any]]) -> None:
    sys.stdout.write(
        f"{'milliseconds a commit':<24}" + "".join(f"{'K = ' + k:>10}" for k in results) + "\n"
    )
    for name in STEPS:
        sys.stdout.write(
            f"{name:<24}"
            + "".join(f"{r['milliseconds'][name]:>10}" for r in results.values())
            + "\n"
        )
    for name in ("commit_milliseconds", "commit_milliseconds_max", "cpu_milliseconds", "megabytes"):
        sys.stdout.write(f"{name:<24}" + "".join(f"{r[name]:>10}" for r in results.values()) + "\n")
    for name in ("share_of_one_core", "share_of_wall"):
        sys.stdout.write(
            f"{name:<24}" + "".join(f"{r[name]:>10.2%}" for r in results.values()) + "\n"
        )
    sys.stdout.write(
        json.dumps({"tokens_per_second": TOKENS_PER_SECOND, "bar": BAR, "by_entries": results})
        + "\n"
    )


if __name__ == "__main__":
    main()
