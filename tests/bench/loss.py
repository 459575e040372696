"""What soft targets cost a training step, for the fused loss.

It is compared with cross-entropy, its products alone, and its peers.

    python tests/bench/loss.py [--tiny] [--out DIR]

On a GPU in bfloat16 with a vocabulary of 151,936, else on the CPU in float32 with 32,768. Time:
forward and backward of the same problem in turns, medians of each round's ratios. Memory: on a GPU
the allocator's peak, on a CPU the peak of a fresh process, beyond inputs and gradients. Error:
against float64, beside the loss as it is usually written.

Peers that compute something else than KL + CE + tail from stored entries say so in their row. On a
CPU liger's fused kernels and cut-cross-entropy are left out: without a GPU they would only run in
Triton's interpreter.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from loss_ways import (
    Problem,
    Size,
    naive,
    ours,
    ours_hard,
    ours_torch,
    peers,
    plain,
    plain_cross_entropy,
    three_products,
)
from torch import Tensor

CPU = Size(n=2048, d=512, v=32768, k=64, device="cpu", dtype=torch.float32)
GPU = Size(n=8192, d=4096, v=151_936, k=64, device="cuda", dtype=torch.bfloat16)
PEER_ROUNDS = 2  # on a CPU; some take twenty times as long
TINY = {"n": 64, "d": 32, "v": 1024, "k": 8}
WAYS = {
    "ours": ours,
    "ours, hard alone": ours_hard,
    "plain torch CE": plain_cross_entropy,
    "plain torch": plain,
}
PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy")


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="seconds; the figures mean nothing")
    parser.add_argument("--rounds", type=int, help="5 on a CPU, 10 on a GPU")
    parser.add_argument("--out", type=Path, help="folder for the table and the figures, as files")
    parser.add_argument("--alone", nargs=2, metavar=("WAY", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = GPU if torch.cuda.is_available() else CPU
    size = replace(size, **TINY) if args.tiny else size
    if args.alone:
        print(resident(args.alone[0], replace(size, n=int(args.alone[1]))))
        return
    rounds = args.rounds or (2 if args.tiny else 10 if size.device == "cuda" else 5)
    outcome: dict[str, Any] = {
        "bench": "loss",
        "tiny": args.tiny,
        "machine": machine(),
        "rounds": rounds,
    }
    outcome["size"] = {"N": size.n, "D": size.d, "V": size.v, "K": size.k, "dtype": str(size.dtype)}
    outcome["time"], words = speed(size, rounds)
    outcome["memory"] = memory(size, args.tiny)
    outcome["error"] = errors(replace(size, n=min(size.n, 256)))
    outcome["bars"] = bars(outcome)
    outcome["load_average_after"] = round(os.getloadavg()[0], 2)
    table = written(outcome, words)
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"loss-{time.strftime('%Y-%m-%d')}-{'h200' if size.device == 'cuda' else 'cpu'}"
        (args.out / f"{name}.json").write_text(json.dumps(outcome, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(table + "\n")
    print(json.dumps(outcome))


def machine() -> dict[str, Any]:
    """Where this ran, and beside what."""
    found = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    found |= {"cpus": os.cpu_count(), "load_average": round(os.getloadavg()[0], 2)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


# Time


def speed(size: Size, rounds: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Median seconds and ratios of each way, and what each computes."""
    problem = Problem(size)
    ways: dict[str, Callable[[], Any]] = {
        "three products": lambda: three_products(problem),
        **{name: lambda way=way: way(problem).backward() for name, way in WAYS.items()},
    }
    words = {"three products": "logits, dX, dW and nothing else", "ours": "KL + CE + tail"}
    words |= {"ours, hard alone": "CE", "plain torch CE": "CE", "plain torch": "KL + CE + tail"}
    if size.device == "cuda":
        ways["ours, without Triton"] = lambda: ours_torch(problem).backward()
        words["ours, without Triton"] = words["ours"]
    own = set(ways)
    for name, way, what in peers(problem):
        ways[name], words[name] = lambda way=way: way().backward(), what
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in list(ways.items()):
            if size.device == "cpu" and number > PEER_ROUNDS and name not in own:
                continue
            try:
                taken = timed(problem, way)
            except (
                Exception
            ) as error:  # what a peer that does not run here raises has no common type
                if name.startswith(("ours", "three")):
                    raise
                print(f"{name} is left out: {repr(error)[:200]}", file=sys.stderr)
                del ways[name], seconds[name]
                continue
            if number:  # the first round warms up
                seconds[name].append(taken)
    table = {}
    for name, taken in seconds.items():
        table[name] = {"seconds": statistics.median(taken)}
        for base in (
            "three products",
            "ours, hard alone",
            "plain torch CE",
            "liger fused linear CE",
            "plain torch",
        ):
            if base in seconds:
                ratios = [one / other for one, other in zip(taken, seconds[base], strict=False)]
                table[name][f"times {base}"] = round(statistics.median(ratios), 3)
    return table, words


def timed(problem: Problem, way: Callable[[], Any]) -> float:
    """Seconds of one call, gradients fresh."""
    problem.hidden.grad = problem.weight.grad = None
    if problem.size.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    if problem.size.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# Memory


def memory(size: Size, tiny: bool) -> dict[str, Any]:
    """MiB beyond inputs and gradients, by way and tokens.

    On a GPU the float32 sum of dW is not counted either.
    """
    if size.device == "cpu":
        counts = (size.n,) if tiny else (size.n // 2, size.n, 2 * size.n)
        ways = ("ours", "plain torch") if tiny else ("ours", "plain torch CE", "plain torch")
        return {
            way: {str(n): in_process(way, n, tiny) for n in counts if way == "ours" or n == size.n}
            for way in ways
        }
    found: dict[str, Any] = {}
    counts = (size.n, 4 * size.n, 32 * size.n)
    for way, n in [*(("ours", n) for n in counts), *(("plain torch", n) for n in counts[:2])]:
        found.setdefault(way, {})[str(n)] = on_gpu(way, replace(size, n=n))
    return found


def on_gpu(way: str, size: Size) -> dict[str, float] | None:
    """Peak of the allocator; None where it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    problem = Problem(size)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        WAYS[way](problem).backward()
    except torch.OutOfMemoryError:
        return None
    peak, accumulator = torch.cuda.max_memory_allocated(), 4 * size.v * size.d
    beyond = peak - before - size.gradient_bytes - accumulator
    return {"beyond_mib": round(beyond / 2**20, 1), "in_all_mib": round(peak / 2**20, 1)}


def in_process(way: str, n: int, tiny: bool) -> dict[str, float]:
    words = [sys.executable, __file__, "--alone", way, str(n), *(["--tiny"] if tiny else [])]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    return {"beyond_mib": round(float(done.stdout) / 2**20, 1)}


def resident(way: str, size: Size) -> int:
    """Bytes that this process takes at most for one forward and backward pass.

    They are counted beyond inputs and gradients.
    """
    WAYS[way](Problem(replace(size, n=8))).backward()  # what torch allocates once
    problem = Problem(size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    WAYS[way](problem).backward()
    return _status("VmHWM") - before - size.gradient_bytes


def _status(name: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return int(line.split()[1]) * 1024


# Error


def errors(size: Size) -> dict[str, Any]:
    """Relative errors of value, dX and dW against float64.

    Ours and the usual loss are all in the same dtype.
    """
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(replace(size, dtype=dtype))
        exact = [x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight)]
        truth = _gradients(naive(*exact, problem.targets, torch.float64), exact)
        leaves = [problem.hidden, problem.weight]
        for name, total in (
            ("ours", ours(problem)),
            ("usual", naive(*leaves, problem.targets, dtype)),
        ):
            parts = zip(_gradients(total, leaves), truth, strict=True)
            values = [float((one.double() - right).norm() / right.norm()) for one, right in parts]
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = dict(
                zip(("value", "dX", "dW"), values, strict=True)
            )
    return found


def _gradients(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [total.detach(), *torch.autograd.grad(total, leaves)]


# What is shown


def bars(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that the project promises, each with its bound."""
    ours_, memory_, error = outcome["time"]["ours"], outcome["memory"], outcome["error"]
    n = outcome["size"]["N"]
    found: dict[str, tuple[Any, float]] = {}
    if "gpu" in outcome["machine"]:
        found["times liger's fused linear cross-entropy"] = (
            ours_.get("times liger fused linear CE"),
            1.10,
        )
        found["times three products"] = ours_["times three products"], 1.25
        found["MiB beyond, 4N tokens"] = memory_["ours"][str(4 * n)]["beyond_mib"], 2048
        found["MiB in all, 32N tokens"] = memory_["ours"][str(32 * n)]["in_all_mib"], 12 * 1024
        if "plain torch" in outcome["time"]:
            found["share of plain torch's time"] = ours_["times plain torch"], 1 / 3
            plain_ = memory_["plain torch"][str(n)]
            share = plain_ and memory_["ours"][str(n)]["beyond_mib"] / plain_["beyond_mib"]
            found["share of plain torch's memory"] = share, 1 / 15
    else:
        found["times hard alone"] = ours_["times ours, hard alone"], 1.15
        found["times plain torch CE"] = ours_["times plain torch CE"], 1.25
        beyond = {count: figures["beyond_mib"] for count, figures in memory_["ours"].items()}
        found["share of plain torch's memory"] = (
            beyond[str(n)] / memory_["plain torch"][str(n)]["beyond_mib"],
            1 / 6,
        )
        found["memory, most tokens over fewest"] = max(beyond.values()) / min(beyond.values()), 1.1
    found["float32 error"] = max(error["ours, float32"].values()), 1e-5
    worse = [
        error["ours, bfloat16"][part] - error["usual, bfloat16"][part]
        for part in ("value", "dX", "dW")
    ]
    found["bfloat16 error beyond the usual loss's"] = max(worse), 1e-2
    unknown = outcome["tiny"]  # tiny figures mean nothing
    return [
        {
            "what": what,
            "found": value,
            "bar": f"<= {bound:.4g}",
            "met": None if unknown or value is None else value <= bound,
        }
        for what, (value, bound) in found.items()
    ]


_VERDICTS = {True: "met", False: "not met", None: "not judged"}


def written(outcome: dict[str, Any], words: dict[str, str]) -> str:
    """Markdown."""
    size, figures = outcome["size"], outcome["time"]
    bases = [name for name in next(iter(figures.values())) if name != "seconds"]
    lines = [
        f"Forward and backward, N = {size['N']:,}, D = {size['D']:,}, V = {size['V']:,}, K = "
        f"{size['K']}, {size['dtype']}; {outcome['rounds']} rounds in turns, medians; "
        f"{outcome['machine']}",
        "",
        "| way | computes | ms | " + " | ".join(bases) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(bases),
    ]
    for name, row in figures.items():
        ratios = " | ".join(f"{row[base]:.2f}" for base in bases)
        lines.append(f"| {name} | {words[name]} | {row['seconds'] * 1e3:.1f} | {ratios} |")
    lines += ["", "| memory beyond inputs and gradients | tokens | MiB |", "| --- | ---: | ---: |"]
    for way, by_count in outcome["memory"].items():
        for count, found in by_count.items():
            lines.append(
                f"| {way} | {int(count):,} | {found['beyond_mib'] if found else 'out of memory'} |"
            )
    lines += ["", "| error against float64 | value | dX | dW |", "| --- | ---: | ---: | ---: |"]
    for name, row in outcome["error"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.1e}" for value in row.values()) + " |")
    lines += ["", "| bar | found | | |", "| --- | ---: | ---: | --- |"]
    for row in outcome["bars"]:
        found = "-" if row["found"] is None else f"{row['found']:.4g}"
        lines.append(f"| {row['what']} | {found} | {row['bar']} | {_VERDICTS[row['met']]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
