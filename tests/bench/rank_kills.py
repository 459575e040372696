"""Random kill -9 of ranks that train together: samples missing or twice, and losses.

    python tests/bench/rank_kills.py [--kills 100] [--seed 0] [--seconds N] [--tiny]

The losses stand beside those of the undisturbed training. A training of a tiny student goes on by 2
ranks, 1, 2 with its weights sharded, 4 sharded, and 2, one after another. Each time but the last
one rank, drawn, is killed at a moment drawn: before, within or after a step, or after any file of a
checkpoint. Then another training begins, until there were so many kills or the time is over. Of
each step the samples and the loss that lasted are laid beside those of one process that nobody
disturbs. It prints a table, then one line of JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from killed_ranks import WAYS, Outcome, World


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    wanted, ways = (1, WAYS[:2]) if args.tiny else (args.kills, WAYS)
    began, found = time.monotonic(), list[Outcome]()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        while sum(one.kills for one in found) < wanted and time.monotonic() - began < args.seconds:
            number = len(found)
            found.append(world.killed(f"training-{number}", args.seed + number, ways))
            print(f"training {number}: {found[-1]}", file=sys.stderr, flush=True)
    dead: Counter[str] = sum((one.dead for one in found), Counter())
    outcome = {
        "trainings": len(found),
        "kills": sum(one.kills for one in found),
        "dead": dict(sorted(dead.items())),
        "steps": sum(one.steps for one in found),
        "steps_again": sum(one.again for one in found),
        "samples_missing": sum(one.missing for one in found),
        "samples_twice": sum(one.twice for one in found),
        "largest_relative_loss_difference": max(one.apart for one in found),
        "seconds": round(time.monotonic() - began, 1),
    }
    for name, value in outcome.items():
        print(f"| {name} | {value} |")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
