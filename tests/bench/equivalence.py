"""How far training from a store is from training with the live teacher.

The difference is given for each number of mantissa bits that the store keeps.

    python tests/bench/equivalence.py [--tiny] [--steps 60] [--seeds 3] [--learning-rate 1e-3]

A teacher scores texts with `full` targets; a student is trained from the store by the product, and
with the live teacher by a plain loop (`tests/support/live.py`), on the same samples in the same
order (each store has its own), in float32. Also with targets shifted by one position, for the size
of what must not go unseen. The teacher (stories260k) and the texts (TinyStories) are
among the assets; --tiny makes a random teacher, which draws the text itself.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
import torch
from assets import ASSETS
from kit import recipe_tree, write_jsonl
from live import LiveRun, live_training, saved_weights
from planting import planted
from tiny_jobs import done_until_score, scored_store
from tiny_llama import save_tiny_llama
from tiny_store import SilentProgress, snapshot_of

from stillroom.stages.loader.samples import Samples
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.store.store import Store

BITS = (23, 13, 10, 7)
TEXTS = 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="seconds; the figures mean nothing")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps, about")
    parser.add_argument(
        "--seeds", type=int, default=3, help="students, each with an order of its own"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    steps, all_bits, seeds = (6, (23, 10), 1) if args.tiny else (args.steps, BITS, args.seeds)
    outcome: dict[str, Any] = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "tiny": args.tiny,
    }
    outcome |= {"threads": torch.get_num_threads(), "learning_rate": args.learning_rate}
    outcome |= {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "by_bits": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for bits in all_bits:
            part = folder / str(bits)
            part.mkdir()
            how = {
                "tokens": steps * (64 if args.tiny else 1024),
                "learning_rate": args.learning_rate,
                "audit": "warn",  # it refuses what is shifted
            }
            recipe, store, teacher_id = (tiny if args.tiny else stories)(part, bits=bits, how=how)
            runs = [
                measured(recipe, store, teacher_id, folder=part / f"run-{s}", seed=s)
                for s in range(seeds)
            ]
            outcome["by_bits"][bits] = runs
            if bits == all_bits[0]:
                outcome["scored_tokens"] = sum(
                    commit.tokens for commit in store.commits("soft_targets")
                )
                shifted = planted(store, part / "shifted", "shifted")
                outcome["shifted"] = [
                    measured(recipe, shifted, teacher_id, folder=part / "shifted-run", seed=0)
                ]
    show(outcome)
    print(json.dumps(outcome))


def stories(folder: Path, *, bits: int, how: dict[str, Any]) -> tuple[Recipe, Store, str]:
    """TinyStories, read by stories260k (V = 512); a student of one layer."""
    import pyarrow.parquet as pq

    texts = (
        pq.read_table(ASSETS / "text" / "tinystories-8k" / "train.parquet")
        .slice(0, TEXTS)["text"]
        .to_pylist()
    )
    source = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts])
    teacher = ASSETS / "models" / "stories260k-llama-hd32"
    recipe = Recipe.model_validate(
        recipe_tree(
            folder,
            teacher,
            source,
            generate=None,
            data={"source": str(source), "format": "text", "window_tokens": 256, "holdout": 2},
            storage={"dir": str(folder / "store"), "mantissa_bits": bits},
            score={"targets": "full"},
            student={"config": {"num_hidden_layers": 1}},
            train=how | {"tokens_per_step": 1024},
        )
    )
    store, teacher_identity = done_until_score(recipe)
    return recipe, store, teacher_identity.id


def tiny(folder: Path, *, bits: int, how: dict[str, Any]) -> tuple[Recipe, Store, str]:
    """A random teacher and text that it drew."""
    teacher = save_tiny_llama(folder / "teacher", initializer_range=0.5)
    storage = {"dir": str(folder / "store"), "mantissa_bits": bits}
    student = {"config": {"num_hidden_layers": 1}}
    sections = {
        "score": {"targets": "full"},
        "student": student,
        "train": how | {"tokens_per_step": 64},
    }
    recipe, store, identity = scored_store(folder, teacher, rows=12, storage=storage, **sections)
    return recipe, store, identity.id


def trained_live(recipe: Recipe, store: Store) -> LiveRun:
    """Train by the plain loop, on what `Samples` gives in this order until the tokens are fed."""
    samples = Samples(store, snapshot_of(store), soft=False, seed=recipe.run.seed)
    assert recipe.train.tokens is not None
    texts, held, fed = [], 0, 0
    for sample in samples.read(0):
        if held + len(sample) > recipe.train.tokens_per_step:
            fed, held = fed + held, 0
            if fed >= recipe.train.tokens:
                break
        held += len(sample)
        texts.append((sample.token_ids.tolist(), int(sample.spans[0, 0])))
    return live_training(recipe, texts, total_tokens=recipe.train.tokens)


def measured(
    recipe: Recipe, store: Store, teacher_id: str, *, folder: Path, seed: int
) -> dict[str, Any]:
    """A training from a store against the live one."""
    changed = {"storage": {"dir": str(store.root)}, "run": {"dir": str(folder), "seed": seed}}
    tree = recipe.model_dump(mode="json", exclude_none=True) | changed
    live = trained_live(Recipe.model_validate(tree), store)
    snapshots = {"train": snapshot_of(store).id}
    ids: dict[str, Any] = {
        "teacher_id": teacher_id,
        "train_dirs": {"student": folder},
        "snapshots": snapshots,
    }
    job = Job(recipe=Recipe.model_validate(tree), progress=SilentProgress(), stop=StopFlag(), **ids)
    train.run(job)
    history = json.loads((folder / "train.json").read_text())["history"]
    losses = np.array([point["loss"] for point in history])
    apart = np.abs(losses - np.array(live.losses))
    weights = saved_weights(folder / "student")
    off = [float((weights[name] - live.weights[name]).abs().max()) for name in weights]
    return {
        "steps": len(losses),
        "first_loss": live.losses[0],
        "last_loss": live.losses[-1],
        "loss_first": float(apart[0]),
        "loss_worst": float(apart.max()),
        "loss_mean": float(apart.mean()),
        "loss_bias": float((losses - np.array(live.losses)).mean()),
        "weights_worst": max(off),
        "bytes_per_token": round(bytes_per_token(store), 1),
    }


def bytes_per_token(store: Store) -> float:
    commits = store.commits("soft_targets")
    return sum(commit.shard.bytes for commit in commits) / sum(commit.tokens for commit in commits)


def show(outcome: dict[str, Any]) -> None:
    """Worst over the seeds; the biases one by one, because their signs differ."""
    names = ("loss_first", "loss_worst", "loss_mean", "weights_worst", "bytes_per_token")
    print(f"{'mantissa bits':<14}" + "".join(f"{name:>16}" for name in names) + "   loss_bias")
    for bits, runs in {**outcome["by_bits"], "23, shifted": outcome["shifted"]}.items():
        worst = [max(run[name] for run in runs) for name in names]
        biases = "  ".join(f"{run['loss_bias']:.1e}" for run in runs)
        print(f"{bits!s:<14}" + "".join(f"{value:>16.3g}" for value in worst) + f"   {biases}")


if __name__ == "__main__":
    main()
