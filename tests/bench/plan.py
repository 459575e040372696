"""How long, and in how much memory, is a large job planned?

Ten million prompts, six million of them answered.

    python tests/bench/plan.py DIR [--prompts 10000000] [--done 6000000] [--runs 3] [--tiny]
        [--commit-rows 256]

Makes a store in DIR whose rows are as a run writes them (256 to a commit, keys random as hashes
are; the texts are short, a plan does not read them), then runs `stillroom plan` on it in a process
of its own. The source is hashed before anything else, so that is measured beside it: reading the
source once.
"""

import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from stillroom.pipeline.plan.resolve import bind
from stillroom.stages.ledger.requests import sampling_id, sampling_settings
from stillroom.stages.recipe.load import load_recipe
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.store.commits import CommitLog
from stillroom.storage.store.segments import keep_last_segment
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import SCHEMAS, TableName
from stillroom.storage.tables.shard import put_parquet, shard_folder

PROMPT_TOKENS, COMPLETION_TOKENS, MAX_TOKENS = 12, 20, 256


class UnsyncedFiles(LocalFiles):
    """Making the store is not what is measured."""

    def _sync_file(self, path: Path) -> None:
        pass

    def _sync_folder(self, folder: Path) -> None:
        pass


def make_teacher(folder: Path) -> None:
    """The files of a model that a plan looks at."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "llama",
        "vocab_size": 32_000,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    save_file({"w": np.zeros(4, np.float32)}, folder / "model.safetensors")


def make_source(path: Path, count: int) -> None:
    """Prompts, one JSON object a line."""
    with path.open("w") as file:
        for start in range(0, count, 100_000):
            numbers = range(start, min(count, start + 100_000))
            file.writelines(
                f'{{"prompt": "Tell me something about number {n} in plain words."}}\n'
                for n in numbers
            )


def make_recipe(folder: Path) -> Path:
    """A white-box recipe over the source."""
    path = folder / "recipe.yaml"
    tree = {
        "run": {"dir": str(folder / "run")},
        "storage": {"dir": str(folder / "store")},
        "teacher": {"model": str(folder / "teacher")},
        "student": {"config": {"num_hidden_layers": 1}},
        "data": {"source": str(folder / "prompts.jsonl"), "format": "prompt", "holdout": 200},
        "generate": {"engine": "hf", "max_tokens": MAX_TOKENS},
        "score": {"k": 32},
        "train": {"epochs": 1},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def keys(count: int, rng: np.random.Generator) -> pa.Array:
    """Random keys of 16 bytes."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), count, [None, pa.py_buffer(rng.bytes(16 * count))]
    )


def commit(store: Store, log: CommitLog, data: pa.Table) -> None:
    """One commit of rows given as columns, made as the writer makes it."""
    table: TableName = log.table
    about = {"table": table, "author_id": "", "settings": {}}
    shard = put_parquet(store.files, data, [data.num_rows], folder=shard_folder(table), about=about)
    fields = {"writer": "bench", "tokens": 0, "seconds": 0.0, "stage": table, "versions": {}}
    assert log.append(fields, shard, data["key"].to_pylist()) is not None
    keep_last_segment(store.files, log)


def columns(table: TableName, given: dict[str, Any], rows: int) -> pa.Table:
    """A table of the schema: columns given, or one value repeated."""
    arrays = []
    for field in SCHEMAS[table]:
        value = given.get(field.name)
        if isinstance(value, pa.Array):
            arrays.append(value)
        else:
            arrays.append(pa.array([value] * rows, type=field.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMAS[table])


def make_store(recipe_file: Path, prompts: int, done: int, commit_rows: int) -> None:
    """Prompts, inputs, and generations of the first `done` prompts."""
    recipe = load_recipe(recipe_file, [])
    store = Store.from_files(UnsyncedFiles(Path(recipe.storage.dir)), create=True)
    binding = bind(recipe, write=True).binding
    rng = np.random.default_rng(0)
    prompt_keys = keys(prompts, rng)
    log = CommitLog(store.files, "prompts")
    for start in range(0, prompts, 8192):
        mine = prompt_keys.slice(start, 8192)
        constant = {"format": "prompt", "text": "Tell me something.", "source": "bench"}
        commit(
            store, log, columns("prompts", {"key": mine, "prompt_key": mine, **constant}, len(mine))
        )
    held_out = np.zeros(prompts, bool)
    held_out[:: max(1, prompts // 200)] = True
    inputs = {
        "key": prompt_keys,
        "prompt_key": prompt_keys,
        "split": pa.DictionaryArray.from_arrays(held_out.astype(np.int8), ["train", "test"]),
        "windows": pa.array(np.ones(prompts, np.int32)),
        "first": pa.array(np.ones(prompts, bool)),
    }
    store.put_inputs(
        binding.data_id, pa.table(inputs), {"source": "bench", "rejected": 0, "format": "prompt"}
    )
    assert recipe.generate is not None
    constant = {
        "author_id": binding.author_id,
        "sampling_id": sampling_id(
            binding.author_id, sampling_settings(recipe.generate, recipe.data)
        ),
        "sample_index": 0,
        "token_ids": [1] * (PROMPT_TOKENS + COMPLETION_TOKENS),
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS,
        "text": "",
        "finish_reason": "stop",
        "max_tokens": MAX_TOKENS,
        "row_seed": 0,
    }
    log = CommitLog(store.files, "generations")
    for start in range(0, done, commit_rows):
        rows = min(commit_rows, done - start)
        named = {name: keys(rows, rng) for name in ("key", "reuse_key", "tokens_key")}
        given = constant | named | {"prompt_key": prompt_keys.slice(start, rows)}
        commit(store, log, columns("generations", given, rows))


def measure(recipe_file: Path) -> dict[str, Any]:
    """One plan in a process of its own: seconds, peak memory, and what it says."""
    began = time.monotonic()
    words = [
        sys.executable,
        "-m",
        "stillroom",
        "plan",
        str(recipe_file),
        "--json",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = time.monotonic() - began
    lines = json.loads(done.stdout.splitlines()[-1])["stages"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_gib": peak, "stages": lines}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--prompts", type=int, default=10_000_000)
    parser.add_argument("--done", type=int, default=6_000_000)
    parser.add_argument("--commit-rows", type=int, default=256, help="of generations")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    prompts, done, runs = (
        (3000, 1800, 1) if options.tiny else (options.prompts, options.done, options.runs)
    )
    folder: Path = options.dir
    folder.mkdir(parents=True, exist_ok=True)
    recipe_file = make_recipe(folder)
    if not (folder / "made").exists():
        make_teacher(folder / "teacher")
        make_source(folder / "prompts.jsonl", prompts)
        make_store(recipe_file, prompts, done, options.commit_rows)
        (folder / "made").touch()
    began = time.monotonic()
    with (folder / "prompts.jsonl").open("rb") as file:
        hashlib.file_digest(file, "sha256")
    reading = time.monotonic() - began
    plans = [measure(recipe_file) for _ in range(runs)]
    line = plans[0]["stages"]["generate"]
    assert (line["committed"], line["pending"]) == (done, prompts - done), line
    result = {
        "prompts": prompts,
        "done": done,
        "commits": -(-done // options.commit_rows) + -(-prompts // 8192),
        "plan_seconds": [round(p["seconds"], 2) for p in plans],
        "median_seconds": round(statistics.median(p["seconds"] for p in plans), 2),
        "peak_gib": round(max(p["peak_gib"] for p in plans), 3),
        "reading_the_source_seconds": round(reading, 2),
        "stages": {
            name: {k: s[k] for k in ("planned", "committed", "pending")}
            for name, s in plans[0]["stages"].items()
        },
    }
    print(
        f"{'prompts':>12} {'done':>12} {'commits':>8} {'plan, s':>8} {'peak, GiB':>10} "
        f"{'reading source, s':>18}"
    )
    print(
        f"{prompts:>12,} {done:>12,} {result['commits']:>8,} {result['median_seconds']:>8} "
        f"{result['peak_gib']:>10} {result['reading_the_source_seconds']:>18}"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
