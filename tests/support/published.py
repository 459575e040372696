"""A small store to publish, and its snapshots.

It has prompts, generations and targets of every kind that a run may leave.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import samples

from stillroom.storage.snapshots.snapshot import Snapshot, make_snapshot, save_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits

TEACHER = samples.ABOUT["teacher_id"]
ROWS, HELD_OUT = 24, 4
CLASSES_ABOUT = samples.ABOUT | {"head": "classes", "class_names": ["bad", "fair", "good"]}


def make_store(
    root: Path | str, *, kind: str = "topk", rows: int = ROWS, commit_rows: int = 8
) -> Store:
    """`rows` prompts, each with a generation and targets.

    The last few are held out, with whole distributions.
    """
    store = Store.open(root, create=True)
    limits = CommitLimits(rows=commit_rows)
    keep_teacher(store)
    with store.writer("prompts", about=samples.GENERATIONS_ABOUT, limits=limits) as writer:
        for index in range(rows):
            writer.add(samples.prompt_row(index))
    about = samples.GENERATIONS_ABOUT | {
        "settings": {"temperature": 1.0},
        "versions": {"vllm": "0"},
    }
    with store.writer("generations", about=about, limits=limits) as writer:
        for index in reversed(
            range(rows)
        ):  # as a store has them: in another order than the targets
            writer.add(generation_row(index))
    with store.writer(
        "soft_targets", about=samples.ABOUT | {"head": "lm", "class_names": None}, limits=limits
    ) as writer:
        for index in range(rows):
            writer.add(target_row(index, kind if index < rows - HELD_OUT else "full"))
    table = store.index("prompts", ["key", "prompt_key"])
    inputs = pa.table(
        {
            "key": table["key"],
            "prompt_key": table["prompt_key"],
            "split": ["train"] * rows,
            "windows": pa.array([1] * rows, pa.int32()),
            "first": [True] * rows,
        }
    )
    store.put_inputs(
        "d" * 32, inputs, {"source": "/home/somebody/secret/prompts.jsonl", "format": "messages"}
    )
    return store


def generation_row(index: int) -> dict[str, Any]:
    """Its tokens and spans are those of `target_row`."""
    targets = target_row(index, "topk")
    tokens = targets["token_ids"]
    return samples.generation_row(index) | {
        "token_ids": tokens,
        "spans": targets["spans"],
        "completion_tokens": len(tokens) - 2,
        "text": f"text {index} of the teacher",
    }


def target_row(index: int, kind: str) -> dict[str, Any]:
    """Three to seven scored tokens; the shape of a distribution of this kind."""
    return samples.target_row(index, tokens=3 + index % 5, k=6, kind=kind)


def class_row(index: int) -> dict[str, Any]:
    """A distribution over three classes at the last token."""
    row = samples.target_row(index, kind="full")
    tokens, logprobs = row["token_ids"], np.log(np.float32([0.5, 0.25, 0.25]))
    one = {
        "span_start": len(tokens) - 1,
        "spans": None,
        "span_tokens": 1,
        "k": 3,
        "logprobs": logprobs,
        "label": index % 3,
    }
    floats = {
        "tail_logprob": [-np.inf],
        "token_logprob": logprobs[[index % 3]],
        "entropy": [1.04],
    }
    return (
        row | one | {name: np.float32(value) for name, value in floats.items()} | {"kept_mass": 1.0}
    )


def keep_teacher(store: Store) -> None:
    """A tokenizer of words and a config, as a store keeps them."""
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(samples.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    parts = {
        "config": {"architectures": ["LlamaForCausalLM"], "vocab_size": samples.VOCABULARY},
        "dtype": "float32",
    }
    contents = {
        "tokenizer.json": tokenizer.to_str(),
        "config.json": json.dumps(parts["config"] | {"_name_or_path": "/home/somebody/m"}),
    }
    paths = {
        "tokenizer_file": "/home/somebody/tokenizer.json",
        "parts": [{"name_or_path": "/home/somebody/m"}],
    }
    contents["tokenizer_config.json"] = json.dumps(paths | {"name_or_path": None})
    contents["identity.json"] = json.dumps(parts)
    store.put_teacher(TEACHER, {name: content.encode() for name, content in contents.items()})


def snapshots_of(
    store: Store, *, held_out: int = HELD_OUT, left_out: Sequence[int] = ()
) -> dict[str, Snapshot]:
    """Train and test, kept as a run keeps them: each knows the other.

    `left_out`: numbers of training rows.
    """
    index = store.index("soft_targets", ["key"])
    pairs = list(zip(index["shard"].to_pylist(), index["row"].to_pylist(), strict=True))
    parts = {"train": pairs[: len(pairs) - held_out], "test": pairs[len(pairs) - held_out :]}
    parts["train"] = [pair for number, pair in enumerate(parts["train"]) if number not in left_out]
    made = {}
    for split, chosen in parts.items():
        places: dict[str, list[int]] = {}
        for shard, row in chosen:
            places.setdefault(shard, []).append(row)
        if places:
            made[split] = make_snapshot(
                store, "soft_targets", places, {"split": split, "teacher_id": TEACHER}
            )
    splits = {split: snapshot.id for split, snapshot in made.items()}
    for split, snapshot in made.items():
        about = {**snapshot.about, "splits": splits}
        made[split] = Snapshot(snapshot.id, snapshot.table, snapshot.shards, about)
        save_snapshot(store, made[split])
    return made


DATASETS_441 = os.environ.get("STILLROOM_DATASETS_441")
"""A folder with `datasets` 4.4.1 (`pip install --target`), or nothing."""
_READ = """
import hashlib, json, sys
if sys.argv[1]:
    sys.path.insert(0, sys.argv[1])
import datasets
datasets.disable_progress_bars()
found = {}
for folder in sys.argv[3:]:
    for config in datasets.get_dataset_config_names(folder):
        loaded = datasets.load_dataset(folder, config, cache_dir=sys.argv[2])
        for split, rows in loaded.items():
            digest = hashlib.sha256(repr(list(rows)).encode()).hexdigest()
            found[f"{folder} {config} {split}"] = [len(rows), digest]
print(json.dumps([datasets.__version__, found]))
"""


def read_by_datasets(
    folders: Sequence[Path], cache: Path, *, installed_in: str = ""
) -> tuple[str, dict[str, list[Any]]]:
    """The version of `datasets`, and what it reads of each folder, config and split.

    That is how many rows, and their hash.
    """
    words = [installed_in, str(cache), *map(str, folders)]
    done = subprocess.run(
        [sys.executable, "-c", _READ, *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    version, found = json.loads(done.stdout.splitlines()[-1])
    return version, found
