"""Memory of a rank that trains a sharded student, beside the formula that decides on sharding.

    python tests/bench/sharded_memory.py [--tiny] [--ranks N] [--steps N]

A fresh student of 0.3B parameters (20 blocks, V =
32,768, untied, float32) is under FSDP2 on ranks of one CPU, gloo. Each step has a sample of 128
tokens for each rank, all but the first scored, cross-entropy. Measured is the most that a process
has resident during the steps, less what it had with a student of a hundredth of that size, trained
by the same code: so libraries count for nothing. Formula and measure are of one rank; bar: within
20 % of one another.
"""

import argparse
import gc
import json
import socket
from ctypes import CDLL
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TOKENS = 128
BAR = 0.2
SIZES = {
    "0.3B": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 20,
        "vocab_size": 32768,
    },
    "small": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "vocab_size": 4096,
    },
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the small student alone")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawned = get_context("spawn")
    found: Any = spawned.Queue()
    size = "small" if asked.tiny else "0.3B"
    processes = [
        spawned.Process(target=rank_of, args=(rank, asked.ranks, port, size, asked.steps, found))
        for rank in range(asked.ranks)
    ]
    for process in processes:
        process.start()
    rows = sorted((found.get(timeout=3600) for _ in processes), key=lambda row: row["rank"])
    for process in processes:
        process.join()
    print("| rank | weights at rest | most during steps | formula | off by |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        cells = [f"{row[name] / 2**20:,.0f} MiB" for name in ("at_rest", "most", "formula")]
        print(f"| {row['rank']} | {' | '.join(cells)} | {100 * row['off']:+.1f} % |")
    worst = max(abs(row["off"]) for row in rows)
    parts = {name: round(part / 2**20) for name, part in rows[0]["parts"].items()}
    outcome = {"student": size, "parameters": rows[0]["parameters"], "ranks": rows, "mib": parts}
    print(json.dumps(outcome | {"worst": worst, "bar": BAR, "holds": worst <= BAR}))


def rank_of(rank: int, count: int, port: int, size: str, steps: int, found: Any) -> None:
    """Be one rank: a small student first, so that all libraries are there.

    Then comes the one that is measured.
    """
    import os

    import torch

    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    from stillroom.stages.workers.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.here()
    ranks.open()
    before = trained(ranks, "small", steps)
    row = trained(ranks, size, steps)
    most = row["most"] - before["settled"]
    found.put(
        row
        | {"rank": rank, "most": most, "at_rest": row["at_rest"] - before["settled"]}
        | {"off": most / row["formula"] - 1}
    )
    ranks.close()


def trained(ranks: Any, size: str, steps: int) -> dict[str, Any]:
    """Resident bytes at rest, at most, and once all is gone; and what the formula says."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stillroom.stages.loader.packing import Packing
    from stillroom.stages.loader.samples import Cursor, Sample, Step
    from stillroom.stages.recipe.sections import Loss, Train
    from stillroom.stages.train.together.choice import memory
    from stillroom.stages.train.together.root import sharded
    from stillroom.stages.train.trainer import Trainer

    fields: Any = SIZES[size]
    heads = fields["hidden_size"] // 64
    config = LlamaConfig(**fields, num_attention_heads=heads, tie_word_embeddings=False)
    student = LlamaForCausalLM(config)
    formula = memory(student, "fsdp2", ranks=ranks.count, positions=TOKENS, on_cpu=True)
    parameters = sum(p.numel() for p in student.parameters())
    root = sharded(student, ranks, torch.device("cpu"), torch.float32)
    settled()
    at_rest = status("VmRSS")
    trainer = Trainer(
        root.student,
        packing=Packing(tokens_per_pass=TOKENS, vocab_size=config.vocab_size),
        loss=Loss(soft_weight=0.0, hard_weight=1.0),
        train=Train(tokens=10**6),
        ranks=ranks,
        root=root,
    )
    draw = np.random.default_rng(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    for number in range(1, steps + 1):
        samples = [
            Sample(
                token_ids=draw.integers(0, config.vocab_size, TOKENS).astype(np.int32),
                spans=np.array([[1, TOKENS - 1]]),
                targets=None,
                number=one,
            )
            for one in range(ranks.count)
        ]
        trainer.step(Step(samples=samples, after=Cursor(step=number)), done=number / steps)
    most = status("VmHWM")
    del trainer, root, student
    settled()
    parts = {name: getattr(formula, name) for name in ("state", "whole", "activations", "logits")}
    found = {"at_rest": at_rest, "most": most, "settled": status("VmRSS"), "formula": formula.total}
    return found | {"parameters": parameters, "parts": parts}


def settled() -> None:
    """Give back what is freed, so that it is not counted."""
    gc.collect()
    CDLL("libc.so.6").malloc_trim(0)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
