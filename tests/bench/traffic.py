"""How fast the Triton kernels move the bytes that they must.

Beside them are a copy and the three products of the head.

    python tests/bench/traffic.py [--tiny] [--out DIR]

One chunk of a large model's logits: n = 4,096 tokens, V = 151,936, K = 64, bfloat16, random;
products with D = 4,096. Bytes are those that a kernel cannot do without: the logits read once
(`spread`: written once, too) and the block sums. Each kernel is timed alone by events on the
device, after fresh logits were copied to where it works, which are far more than the cache holds;
medians of 20 rounds in turns. Without a GPU only --tiny runs, in Triton's interpreter, so that this
file cannot rot.

It prints a table, then one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from stillroom.stages.losses import vocabulary_triton as passes_triton
from stillroom.stages.losses.vocabulary import Asked, Slopes
from stillroom.stages.targets import block_sums_triton as targets_triton
from stillroom.stages.targets.block_sums import BLOCK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The sizes of a chunk."""

    tokens: int = 4096
    vocabulary: int = 151_936
    entries: int = 64
    hidden: int = 4096
    rounds: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Something that is timed."""

    work: Callable[[], object]
    """Begins with fresh logits."""
    bytes: int = 0
    """Per token."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder for traffic.json")
    words = parser.parse_args()
    if DEVICE == "cpu" and not words.tiny:
        sys.exit("traffic: torch sees no GPU here; --tiny runs without one.")
    sizes = (
        Sizes(tokens=4, vocabulary=1000, entries=5, hidden=16, rounds=1) if words.tiny else Sizes()
    )
    outcome = measured(sizes)
    print(
        f"{'':<26}{'bytes/token':>12}{'us/token':>10}{'TB/s':>7}"
        f"{'of a copy':>11}{'of the products':>17}"
    )
    for name, row in outcome["kernels"].items():
        figures = (
            f"{row['bytes_per_token']:>12}{row['us_per_token']:>10.4f}{row['tb_per_second']:>7.2f}"
        )
        print(f"{name:<26}{figures}{row['of_a_copy']:>11.1%}{row['of_the_products']:>17.1%}")
    if words.out:
        words.out.mkdir(parents=True, exist_ok=True)
        (words.out / "traffic.json").write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome))


def measured(sizes: Sizes) -> dict[str, Any]:
    """Medians of every arm."""
    n, v = sizes.tokens, sizes.vocabulary
    random = torch.Generator(DEVICE).manual_seed(0)
    fresh = torch.empty(n, v, dtype=torch.bfloat16, device=DEVICE).normal_(0, 3, generator=random)
    raw = fresh.clone()
    arms = kernels(raw, sizes, random)
    arms["copy"] = Arm(work=lambda: raw.copy_(fresh), bytes=4 * v)
    arms["three products"] = Arm(work=products(raw, sizes))
    for arm in arms.values():
        seconds(arm, raw, fresh)  # compiles
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(sizes.rounds):
        for name, arm in arms.items():
            times[name].append(seconds(arm, raw, fresh))
    medians = {name: statistics.median(found) / n for name, found in times.items()}
    rates = {name: arm.bytes / medians[name] for name, arm in arms.items()}
    rows = {
        name: {
            "bytes_per_token": arm.bytes,
            "us_per_token": round(1e6 * medians[name], 4),
            "tb_per_second": round(rates[name] / 1e12, 3),
            "of_a_copy": round(rates[name] / rates["copy"], 4),
            "of_the_products": round(medians[name] / medians["three products"], 4),
        }
        for name, arm in arms.items()
    }
    tflops = round(6 * sizes.hidden * v / medians["three products"] / 1e12, 1)
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "sizes": {"n": n, "v": v},
    } | {
        "products_tflops": tflops,
        "kernels": rows,
    }


def kernels(raw: Tensor, sizes: Sizes, random: torch.Generator) -> dict[str, Arm]:
    """The paths of each kernel."""
    n, v, k = sizes.tokens, sizes.vocabulary, sizes.entries
    # Distinct ids without a permutation of the vocabulary for every token: equally far apart, from
    # anywhere.
    first = torch.randint(v, (n, 1), device=DEVICE, generator=random)
    ids = (first + torch.arange(k, device=DEVICE) * (v // k)) % v
    arms = {}
    for name, temperature, softcap in (
        ("", 1.0, None),
        (", T = 2", 2.0, None),
        (", softcap", 1.0, 30.0),
    ):
        asked = Asked(
            ids=ids, labels=first[:, 0], temperature=temperature, scale=1.0, softcap=softcap
        )
        seen = passes_triton.look(raw.clone(), asked)
        ones = torch.ones(n, device=DEVICE)
        slopes = Slopes(
            entries=torch.ones(n, k, device=DEVICE), label=-ones, normaliser=ones, rest=ones
        )
        arms[f"look{name}"] = Arm(work=partial(passes_triton.look, raw, asked), bytes=2 * v)
        arms[f"spread{name}"] = Arm(
            work=partial(passes_triton.spread, raw, asked, seen, slopes), bytes=4 * v
        )
    several: tuple[tuple[float, ...], ...] = ((), (2.0, 4.0))
    for temperatures in several:
        written = (12 + 4 * len(temperatures)) * -(-v // BLOCK)
        arms[f"block_sums, m = {len(temperatures)}"] = Arm(
            work=partial(targets_triton.block_sums, raw, temperatures), bytes=2 * v + written
        )
    return arms


def products(raw: Tensor, sizes: Sizes) -> Callable[[], None]:
    """Logits, gradient of the states, gradient of the head, as plain products in bfloat16."""
    hidden = torch.randn(sizes.tokens, sizes.hidden, device=DEVICE).bfloat16()
    weight = torch.randn(sizes.vocabulary, sizes.hidden, device=DEVICE).bfloat16()
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(raw, weight, out=d_hidden)
        torch.mm(raw.T, hidden, out=d_weight)
        torch.mm(hidden, weight.T, out=raw)

    return run


def seconds(arm: Arm, raw: Tensor, fresh: Tensor) -> float:
    """The seconds of one go, on fresh logits."""
    raw.copy_(fresh)
    if DEVICE == "cpu":
        began = time.perf_counter()
        arm.work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    arm.work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


if __name__ == "__main__":
    main()
