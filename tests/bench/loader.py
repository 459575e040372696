"""How fast a snapshot is read, against `datasets` and mosaicml-streaming on the same rows.

How fast reading resumes.

    python tests/bench/loader.py [--tiny] [--mds-python PYTHON] [--only PART]

Speed: one process, shuffled, batches of 32 rows stacked into arrays by the same function; Stillroom
verifies page checksums and rescales entries and tail to sum to 1, the others hand out what is
stored. `datasets` streams the very same Parquet files in numpy format through its default shuffle
buffer. mosaicml-streaming reads the rows from MDS with zstd (log-probabilities as float16, which
has the same 10 bits of mantissa), its first pass over fresh files, for which it decompresses them;
it pins an older numpy, so it runs with a Python of its own: a virtual environment with
`mosaicml-streaming==0.13.0 torch==2.13.0`. Without --mds-python that row is left out.

Resume: a snapshot of many small shards is opened in a new process at a random sample; milliseconds
from opening the store to the first batch, files opened against shards that the batch's samples lie
in. Imports are not counted.

Trainer: samples of a store (V = 512, K = 64, as long as short stories) read and packed into passes,
and the same training a student of 1M parameters, in turns in one process; tokens/s of the one over
those of the other. Bar: 5.

Check: what a machine does once with each shard before it trains on it (hash, every row), and what
it does later (a look whether the file changed), beside reading the same columns once; in turns in
one process, in CPU seconds. Bar: 3 times.

Features: rows with int8 states of one layer (D = 384) beside their targets, against the targets
alone, shuffled, each way in a process of its own, in turns. CPU seconds, per byte that is stored:
how much dearer a byte of features is than one of targets. Bar: 2. And the memory of both.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

K, T, V = 32, 512, 50_257
BATCH = 32
LOADER_BAR = 5
CHECK_BAR = 3
FEATURES_BAR = 2
WIDTH = 384
PARTS = ("speed", "resume", "trainer", "check", "features")
READ = (
    *("token_ids", "span_start", "span_tokens", "spans", "k", "label", "entries", "ids"),
    *("logprobs", "counts", "weights", "tail_logprob", "token_logprob", "entropy"),
    *("temperatures", "tempered_tails"),
)
"""Columns that a training reads."""
COLUMNS = ("token_ids", "ids", "logprobs", "tail_logprob", "token_logprob", "entropy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="seconds; the figures mean nothing")
    parser.add_argument("--mds-python", help="a Python that has mosaicml-streaming")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument(
        "--rows", type=int, default=12288, help="rows to read; a window is about 2900"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--pass", dest="one_pass", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS
    )
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_pass:
        loader, folder = args.one_pass
        print(json.dumps(PASSES[loader](Path(folder), args.number)))
        return
    outcome: dict[str, Any] = {"python": platform.python_version(), "tiny": args.tiny}
    outcome |= {"cpus": os.cpu_count(), "load_average": os.getloadavg()[0]}
    outcome |= {"versions": {name: version(name) for name in ("numpy", "pyarrow", "datasets")}}
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "speed"):
            rows, repeats = (64, 1) if args.tiny else (args.rows, args.repeats)
            outcome["speed"] = speed(
                Path(folder), rows=rows, repeats=repeats, mds_python=args.mds_python
            )
        if args.only in (None, "trainer"):
            outcome["trainer"] = against_trainer(
                Path(folder), turns=1 if args.tiny else 5, tiny=args.tiny
            )
            found = {"found": outcome["trainer"]["loader_over_trainer"], "at_least": LOADER_BAR}
            if not args.tiny:  # tiny figures mean nothing
                outcome["bars"] = {"loader's tokens/s over a 1M trainer's": found}
        if args.only in (None, "check"):
            rows, repeats = (64, 1) if args.tiny else (2048, 5)
            outcome["check"] = check(Path(folder) / "check", rows=rows, repeats=repeats)
            found = {"found": outcome["check"]["check_over_read"], "at_most": CHECK_BAR}
            if not args.tiny:
                outcome.setdefault("bars", {})["checking a shard over reading it"] = found
        if args.only in (None, "features"):
            size = {"rows": 16, "repeats": 1} if args.tiny else {"rows": 256, "repeats": 5}
            outcome["features"] = features(Path(folder) / "features", **size, apart=not args.tiny)
            found = {"found": outcome["features"]["per_byte_over_targets"], "at_most": FEATURES_BAR}
            if not args.tiny:
                outcome.setdefault("bars", {})["a byte of features over one of targets"] = found
        if args.only in (None, "resume"):
            shards, rows, repeats = (20, 400, 1) if args.tiny else (5000, 1_000_000, 5)
            outcome["resume"] = resume(Path(folder), shards=shards, rows=rows, repeats=repeats)
    print(json.dumps(outcome))


# Speed


def speed(folder: Path, *, rows: int, repeats: int, mds_python: str | None) -> dict[str, Any]:
    """Tokens per second of each loader, in turns; ratios are medians over the turns."""
    write_rows(folder, rows)
    pythons = {"stillroom": sys.executable, "datasets": sys.executable} | (
        {"mds": mds_python} if mds_python else {}
    )
    if mds_python:
        one_pass(mds_python, "mds-write", folder)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for number in range(repeats):
        for name, python in pythons.items():
            turns[name].append(one_pass(python, name, folder, number))
            assert turns[name][-1]["rows"] == rows
    table: dict[str, Any] = {"rows": rows, "tokens": rows * T, "repeats": repeats}
    for name, found in turns.items():
        rates = [turn["tokens"] / turn["seconds"] for turn in found]
        ours = [turn["tokens"] / turn["seconds"] for turn in turns["stillroom"]]
        table[name] = {
            "tokens_per_second": [round(rate) for rate in rates],
            "stillroom_is_times_as_fast": round(
                statistics.median(a / b for a, b in zip(ours, rates, strict=True)), 2
            ),
            "cpu_seconds": [round(turn["cpu_seconds"], 2) for turn in found],
            "first_batch_seconds": [turn["first_batch_seconds"] for turn in found],
            "peak_rss_mb": max(turn["peak_rss_mb"] for turn in found),
            "bytes_per_token": round(found[0]["bytes"] / found[0]["tokens"], 1),
        }
    print(f"{rows} rows, T = {T}, K = {K}, batches of {BATCH}, {repeats} turns")
    print(
        f"{'loader':<12}{'ktok/s':>8}{'stillroom is':>14}"
        f"{'first batch s':>15}{'peak RSS MB':>13}{'bytes/token':>13}"
    )
    for name in pythons:
        row = table[name]
        rate = statistics.median(row["tokens_per_second"]) / 1000
        ratio = f"{row['stillroom_is_times_as_fast']:.2f} x"
        first = statistics.median(row["first_batch_seconds"])
        figures = f"{row['peak_rss_mb']:>13.0f}{row['bytes_per_token']:>13.1f}"
        print(f"{name:<12}{rate:>8.0f}{ratio:>14}{first:>15.2f}{figures}")
    if not mds_python:
        print("mosaicml-streaming: left out, name its Python with --mds-python")
    return table


def one_pass(python: str, name: str, folder: Path, number: int = 0) -> dict[str, Any]:
    """What a loader in a process of its own reports of itself."""
    words = [python, __file__, "--pass", name, str(folder), "--number", str(number)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def consume(samples: Iterator[dict[str, np.ndarray]], stored: int) -> dict[str, Any]:
    """Stack every batch into the same arrays, as into pinned memory.

    The clock runs from before the first row.
    """
    kinds = {name: np.int32 if name in ("token_ids", "ids") else np.float32 for name in COLUMNS}
    arrays: dict[str, np.ndarray] = {}
    first = 0.0
    began, cpu, rows, held = time.perf_counter(), time.process_time(), 0, []
    for sample in samples:
        held.append(sample)
        if len(held) == BATCH:
            arrays = arrays or {
                name: np.empty((BATCH, *held[0][name].shape), kind) for name, kind in kinds.items()
            }
            for name, array in arrays.items():
                np.stack([sample[name] for sample in held], out=array, casting="same_kind")
            rows += BATCH
            held = []
            first = first or time.perf_counter() - began
    rows += len(held)
    clocks = {
        "first_batch_seconds": round(first, 3),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) // 1024
    return clocks | {"rows": rows, "tokens": rows * T, "peak_rss_mb": peak, "bytes": stored}


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_stillroom(folder: Path, number: int) -> dict[str, Any]:
    from stillroom.stages.loader.samples import Samples
    from stillroom.storage.snapshots.snapshot import make_snapshot
    from stillroom.storage.store.store import Store

    store = Store.open(folder / "store")
    places = {
        commit.shard.sha256: range(commit.shard.rows) for commit in store.commits("soft_targets")
    }
    samples = Samples(
        store, make_snapshot(store, "soft_targets", places, {}), soft=True, seed=number
    )

    def rows() -> Iterator[dict[str, np.ndarray]]:
        for sample in samples.read(0, len(samples)):
            targets = sample.targets
            floats = {name: getattr(targets, name) for name in COLUMNS[1:]}
            yield {"token_ids": sample.token_ids, **floats}

    return consume(rows(), stored_bytes(folder / "store" / "data"))


def read_datasets(folder: Path, number: int) -> dict[str, Any]:
    import datasets

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # else each pass ends with a pause of 5 s
    files = sorted(str(path) for path in (folder / "store" / "data").rglob("*.parquet"))
    rows = datasets.load_dataset(
        "parquet", data_files=files, streaming=True, split="train", columns=list(COLUMNS)
    )
    rows = rows.shuffle(seed=number).with_format("numpy")
    return consume(iter(rows), stored_bytes(folder / "store" / "data"))


def mosaic() -> Any:
    # Its part for images asks for a torchvision built for this very torch, and is not needed.
    sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
    import streaming

    return streaming


def write_mds(folder: Path, _: int) -> dict[str, Any]:
    columns = {name: "ndarray:int32" for name in ("token_ids", "ids")}
    columns |= {name: "ndarray:float16" for name in COLUMNS[2:]}
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
    with mosaic().MDSWriter(
        out=str(folder / "mds"), columns=columns, compression="zstd", hashes=["xxh3_64"]
    ) as out:
        for row in range(len(arrays["ids"])):
            out.write(
                {name: array[row].astype(columns[name][8:]) for name, array in arrays.items()}
            )
    return {}


def read_mds(folder: Path, number: int) -> dict[str, Any]:
    stored = stored_bytes(folder / "mds")
    fresh = folder / f"mds-{number}"
    shutil.copytree(folder / "mds", fresh)
    rows = mosaic().StreamingDataset(
        local=str(fresh), shuffle=True, shuffle_seed=number, batch_size=BATCH
    )
    return consume(iter(rows), stored)


def write_rows(folder: Path, rows: int) -> None:
    """Write a store of random targets that look like a teacher's.

    The same columns are written as plain arrays.
    """
    from stillroom.storage.keys import content_key
    from stillroom.storage.store.store import Store

    about = {
        "teacher_id": "t" * 32,
        "tokenizer_id": "k" * 32,
        "vocab_size": V,
        "mantissa_bits": 10,
        "head": "lm",
    }
    shapes = {name: (rows, T * K if name in ("ids", "logprobs") else T) for name in COLUMNS}
    shapes["token_ids"] = (rows, T + 1)
    kinds = {name: np.int32 if name in ("token_ids", "ids") else np.float32 for name in COLUMNS}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kinds[name], shape)
        for name, shape in shapes.items()
    }
    with Store.open(folder / "store", create=True).writer("soft_targets", about=about) as writer:
        for number in range(rows):
            key = content_key("bench", number=number)
            row = random_targets(np.random.default_rng(number)).columns(10)
            row["token_ids"] = np.concatenate([[0], row["ids"].reshape(T, K)[:, 0]]).astype(
                np.int32
            )
            for name in COLUMNS:
                arrays[name][number] = row[name]
            names = dict.fromkeys(
                ("key", "reuse_key", "tokens_key", "generation_key", "prompt_key"), key
            )
            writer.add(
                names | {"teacher_id": about["teacher_id"], "kind": "topk", "span_start": 1} | row
            )


def random_targets(rng: np.random.Generator) -> Any:
    """Zipf ids, log-probabilities that fall like a language model's, some mass outside."""
    from stillroom.storage.tables.soft_targets import SoftTargets

    candidates = np.sort((V ** rng.random((T, K))).astype(np.int64), axis=1) - np.arange(K)
    distinct = np.maximum.accumulate(candidates, axis=1) + np.arange(K)
    ids = rng.permuted(distinct % V, axis=1).astype(np.int32)
    heights = -np.sort(rng.gamma(0.7, 3.0, (T, K)), axis=1) * rng.gamma(2.0, 0.7, (T, 1))
    kept = rng.beta(12.0, 1.0, (T, 1))
    logprobs = heights - np.log(np.exp(heights).sum(axis=1, keepdims=True)) + np.log(kept)
    entropy = -(np.exp(logprobs) * logprobs).sum(axis=1)
    floats = [
        x.astype(np.float32) for x in (logprobs, np.log1p(-kept[:, 0]), logprobs[:, 0], entropy)
    ]
    return SoftTargets(ids, *floats)


# Resume


def resume(folder: Path, *, shards: int, rows: int, repeats: int) -> dict[str, Any]:
    """Time from opening the store to the first batch.

    Each time is in a new process and from another sample.
    """
    snapshot = write_shards(folder / "many", shards=shards, rows=rows)
    (folder / "snapshot").write_text(snapshot)
    found = [one_pass(sys.executable, "resume", folder, number) for number in range(repeats)]
    table = {"shards": shards, "rows": rows, "repeats": repeats, "batch": BATCH}
    table |= {name: [turn[name] for turn in found] for name in found[0]}
    milliseconds = statistics.median(table["milliseconds"])
    print(
        f"\nresume, {shards} shards, {rows} rows, batch of {BATCH}: first batch after "
        f"{milliseconds:.0f} ms (median)"
    )
    print(
        "  of these to load the snapshot: "
        f"{statistics.median(table['snapshot_milliseconds']):.0f} ms"
    )
    print(
        f"  files opened {table['footers_opened']}, shards of the batch {table['footers_needed']}"
    )
    return table


def resume_once(folder: Path, number: int) -> dict[str, Any]:
    from stillroom.stages.loader.samples import Samples
    from stillroom.storage.files.local import LocalFiles
    from stillroom.storage.snapshots.order import Order
    from stillroom.storage.snapshots.snapshot import load_snapshot
    from stillroom.storage.store.store import Store

    opened = []
    real = LocalFiles.source
    LocalFiles.source = lambda self, name: opened.append(name) or real(self, name)
    snapshot_id = (folder / "snapshot").read_text()
    began = time.perf_counter()
    store = Store.open(folder / "many")
    snapshot = load_snapshot(store, snapshot_id)
    loaded = time.perf_counter()
    samples = Samples(store, snapshot, soft=True, seed=7)
    start = int(np.random.default_rng(number).integers(3 * len(samples)))
    batches = samples.batches(
        [range(start, start + BATCH), range(start + BATCH, start + 2 * BATCH)]
    )
    batch = next(batches)
    done = time.perf_counter()
    count = len(opened)
    order, needed, left = Order(snapshot), set(), BATCH
    for window in order.windows(seed=7, start=start):
        part = window.groups[max(0, start - window.first) :][:left]
        needed |= set(order.shards[part].tolist())
        left -= len(part)
        if not left:
            break
    assert len(batch) == BATCH
    return {
        "milliseconds": round((done - began) * 1000, 1),
        "snapshot_milliseconds": round((loaded - began) * 1000, 1),
        "footers_opened": count,
        "footers_needed": len(needed),
    }


def write_shards(root: Path, *, shards: int, rows: int) -> str:
    """A store of small rows and a snapshot of them all.

    They are written past the commit log, which resuming does not read.
    """
    import pyarrow as pa

    from stillroom.storage.keys import content_key
    from stillroom.storage.snapshots.snapshot import make_snapshot, save_snapshot
    from stillroom.storage.store.store import Store
    from stillroom.storage.tables.rows import check_row, rows_to_table
    from stillroom.storage.tables.shard import put_parquet

    store = Store.open(root, create=True)
    about = {
        "table": "soft_targets",
        "teacher_id": "t" * 32,
        "tokenizer_id": "k" * 32,
        "vocab_size": V,
    }
    each = rows // shards
    row = random_targets(np.random.default_rng(0)).positions(slice(8)).columns(10)
    row |= dict.fromkeys(
        ("key", "reuse_key", "tokens_key", "generation_key", "prompt_key"), bytes(16)
    )
    row |= {
        "teacher_id": about["teacher_id"],
        "kind": "topk",
        "span_start": 1,
        "token_ids": np.arange(9),
    }
    alike = rows_to_table("soft_targets", [check_row("soft_targets", row)] * each)
    column = alike.schema.get_field_index("key")
    infos = []
    for shard in range(shards):
        keys = pa.array(
            [content_key("bench", shard=shard, row=i) for i in range(each)], pa.binary(16)
        )
        table = alike.set_column(column, alike.schema.field(column), keys)
        infos.append(
            put_parquet(store.files, table, [each], folder="data/soft_targets", about=about)
        )
    commits = [types.SimpleNamespace(shard=info) for info in infos]
    log = types.SimpleNamespace(commits=lambda table: commits, source_of=lambda table, sha256: "")
    snapshot = make_snapshot(
        log, "soft_targets", {info.sha256: range(info.rows) for info in infos}, {}
    )
    save_snapshot(store, snapshot)
    return snapshot.id


# Check


def read_file(file: Any) -> int:
    """All row groups, as training reads them; rows."""
    opened = file.open()
    for group in range(len(opened.rows_per_group)):
        opened.rows_of(group, READ)
    return opened.rows


def check(folder: Path, *, rows: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of reading the files of a store once.

    Beside it are those of checking them, and of knowing them later.
    """
    from stillroom.storage.integrity.checked import Memory, check_file, held
    from stillroom.storage.store.store import Store

    folder.mkdir()
    write_rows(folder, rows)
    store = Store.open(folder / "store")
    shards = store.commits("soft_targets")
    files = [store.stored("soft_targets", commit.shard.sha256)[0] for commit in shards]
    memory = Memory(None)
    ways = {
        "read": read_file,
        "hash": lambda file: file.files.sha256(file.name),
        "check": lambda file: check_file(file, "soft_targets", Memory(None)),
        "know": lambda file: held(file, "soft_targets", memory),
    }
    for file in files:
        check_file(file, "soft_targets", memory)
    turns: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.process_time()
            for file in files:
                assert way(file)
            turns[name].append(time.process_time() - began)
    ratios = [a / b for a, b in zip(turns["check"], turns["read"], strict=True)]
    table: dict[str, Any] = {"rows": rows, "shards": len(files), "repeats": repeats}
    table |= {"entries": rows * T * K, "bytes": sum(commit.shard.bytes for commit in shards)}
    table |= {f"{name}_cpu_seconds": [round(x, 4) for x in found] for name, found in turns.items()}
    table["check_over_read"] = round(statistics.median(ratios), 2)
    print(f"\ncheck, {len(files)} shards, {rows} rows, T = {T}, K = {K}: CPU seconds, medians")
    for name, found in turns.items():
        print(f"  {name:<8}{statistics.median(found):>9.4f}")
    print(f"  checking takes {table['check_over_read']:.2f} of what reading takes")
    return table


# Features


def features(folder: Path, *, rows: int, repeats: int, apart: bool) -> dict[str, Any]:
    """CPU seconds and memory of reading samples with their features, and without, in turns.

    `apart`: each in a process of its own, without which the memory means nothing.
    """
    folder.mkdir()
    write_rows(folder, rows)
    write_features(folder, rows)
    ways = ("targets", "companions")
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(repeats):
        for way in ways:
            done = (
                one_pass(sys.executable, way, folder, number)
                if apart
                else PASSES[way](folder, number)
            )
            turns[way].append(done)
    alone, both = ([turn["cpu_seconds"] for turn in turns[way]] for way in ways)
    sizes = [turns[way][0]["bytes"] for way in ways]
    more = sizes[1] / sizes[0]
    ratios = [b / a for a, b in zip(alone, both, strict=True)]
    dearer = [(b - a) / a / (more - 1) for a, b in zip(alone, both, strict=True)]
    table: dict[str, Any] = {"rows": rows, "repeats": repeats, "width": WIDTH}
    table |= {
        way: {name: [t[name] for t in found] for name in found[0]} for way, found in turns.items()
    }
    table["cpu_over_targets"] = round(statistics.median(ratios), 2)
    table["bytes_over_targets"] = round(more, 2)
    table["per_byte_over_targets"] = round(statistics.median(dearer), 2)
    print(
        f"\nfeatures, {rows} rows, T = {T}, K = {K}, D = {WIDTH} int8: medians of {repeats} turns"
    )
    for way, found in turns.items():
        cpu = statistics.median(turn["cpu_seconds"] for turn in found)
        peak = max(turn["peak_rss_mb"] for turn in found)
        print(
            f"  {way:<12}{cpu:>9.2f} CPU seconds{peak:>8.0f} MB"
            f"{found[0]['bytes'] / 2**20:>9.1f} MiB"
        )
    print(
        f"  with features {table['cpu_over_targets']} of the time for "
        f"{table['bytes_over_targets']} "
    )
    print(
        f"  of the bytes; a byte of them takes {table['per_byte_over_targets']} of one of targets"
    )
    return table


def write_features(folder: Path, rows: int) -> None:
    """States of one layer for each row of `write_rows`."""
    from stillroom.storage.keys import content_key
    from stillroom.storage.store.store import Store
    from stillroom.storage.tables.row_builders import feature_row, text_key

    about = {"teacher_id": "t" * 32, "tokenizer_id": "k" * 32}
    ids = np.load(folder / "token_ids.npy", mmap_mode="r")
    with Store.open(folder / "store").writer("features", about=about) as writer:
        for number in range(rows):
            key = content_key("bench feature", number=number)
            states = np.random.default_rng(number).standard_normal((T + 1, WIDTH), np.float32)
            row = feature_row(
                key=key,
                reuse_key=key,
                text_key=text_key(ids[number]),
                teacher_id=about["teacher_id"],
                kind="hidden",
                layer=3,
                states=states,
                dtype="int8",
            )
            writer.add(row)


def read_samples(folder: Path, number: int, *, with_features: bool) -> dict[str, Any]:
    """Shuffled, batch after batch stacked into the same arrays."""
    from stillroom.stages.loader.features import open_features
    from stillroom.stages.loader.samples import Samples
    from stillroom.stages.recipe.features import Feature
    from stillroom.storage.files.local import LocalFiles
    from stillroom.storage.snapshots.snapshot import make_snapshot
    from stillroom.storage.store.store import Store

    store = Store.open(folder / "store")
    chosen = {}
    for table in ("soft_targets", "features"):
        places = {c.shard.sha256: range(c.shard.rows) for c in store.commits(table)}
        chosen[table] = make_snapshot(store, table, places, {})
    source = None
    if with_features:
        source = open_features(
            store,
            chosen["soft_targets"],
            chosen["features"],
            wanted=[Feature(kind="hidden", layer=3, bits=8)],
            files=LocalFiles(folder / f"student-{number}"),
        )
    samples = Samples(store, chosen["soft_targets"], soft=True, seed=number, features=source)
    states = np.empty((T + 1, WIDTH), np.float32)
    for sample in samples.read(0, 1):  # what is imported then is no part of it
        sample.states()

    def rows() -> Iterator[dict[str, np.ndarray]]:
        for sample in samples.read(0, len(samples)):
            if with_features:
                states[:] = sample.states()["hidden", 3]
            floats = {name: getattr(sample.targets, name) for name in COLUMNS[1:]}
            yield {"token_ids": sample.token_ids, **floats}

    read = ("soft_targets", "features") if with_features else ("soft_targets",)
    return consume(rows(), sum(stored_bytes(folder / "store" / "data" / table) for table in read))


# Trainer


def against_trainer(folder: Path, *, turns: int, tiny: bool) -> dict[str, Any]:
    """Tokens per second of reading and packing, and of training on it.

    The ratio is the median over the turns.
    """
    import torch
    from train_step import Arm, Scale, make_arm, write_store

    from stillroom.stages.loader.samples import Cursor, steps
    from stillroom.stages.recipe.sections import Loss

    shape = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 5,
    }
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    size = {"rows": 12, "tokens_per_step": 512} if tiny else {"rows": 600, "tokens_per_step": 4096}
    scale = Scale(
        config=shape, k=64, tokens_per_pass=size["tokens_per_step"], steps=1 if tiny else 3, **size
    )
    samples = write_store(folder / "trainer", rows=scale.rows, vocab_size=512, k=scale.k)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arm: Arm = make_arm(scale, samples, Loss(), device)
    rates, waited = [], []
    for _ in range(turns):
        began, tokens = time.perf_counter(), 0
        for step in steps(
            samples, Cursor(), tokens_per_step=scale.tokens_per_step, stop_samples=len(samples)
        ):
            tokens += sum(batch.positions for batch in arm.trainer.passes(step, done=0.5))
        read = tokens / (time.perf_counter() - began)
        arm.turn(scale)
        rates.append((read, arm.turns[-1].tokens / arm.turns[-1].seconds))
        waited.append(arm.turns[-1].rates["waited_share"])
    ratio = statistics.median(read / trained for read, trained in rates)
    table = {
        "rows": scale.rows,
        "turns": turns,
        "parameters": arm.notes["parameters"],
        "device": device.type,
    }
    table |= {
        "loader": [round(read) for read, _ in rates],
        "trainer": [round(trained) for _, trained in rates],
    }
    table |= {"loader_over_trainer": round(ratio, 1), "waited_share": statistics.median(waited)}
    parameters = arm.notes["parameters"] / 1e6
    read, trained = (statistics.median(table[name]) for name in ("loader", "trainer"))
    print(f"\nloader against a trainer of {parameters:.1f}M parameters on {device.type}, tokens/s")
    bar = "" if tiny else f", bar {LOADER_BAR}"
    print(f"  read and packed {read:.0f}, trained {trained:.0f}: {ratio:.1f} times as fast{bar}")
    print(f"  the trainer waited {table['waited_share']:.1%} of its time for it")
    return table


PASSES = {
    "stillroom": read_stillroom,
    "datasets": read_datasets,
    "mds": read_mds,
    "mds-write": write_mds,
    "resume": resume_once,
    "targets": partial(read_samples, with_features=False),
    "companions": partial(read_samples, with_features=True),
}

if __name__ == "__main__":
    main()
