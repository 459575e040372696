"""Damaged input, drawn by hypothesis: whether every command answers as documented, or has a bug.

    python tests/bench/fuzz.py [--seconds 3600] [--only NAME ...] [--task TASK] [--seed 0]
                               [--out DIR]

A small store, run, published folder, recipes and data are made once. An example copies them,
damages one thing (`fuzz_targets.py`) and runs one command in this process. It is a finding if

    an exception comes out, which a user would see as a traceback;
    the exit code is none of 0, 2, 3, or 1 with a message of ours;
    it takes more than 10 s of processor time, or 2 GB of address space more than this process had;
    a file beside the copy, or in the working folder, has changed.

Findings are told apart by the place in our code that they come from. Where the interpreter itself
dies, the damaged copy stays in DIR/work. It prints a table, then one line of JSON.
"""

import argparse
import faulthandler
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))

from fuzz_targets import Target, targets
from fuzz_world import ON_STORE, OTHER_TASKS, OtherWorld, Words, World
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from kit import stillroom

SECONDS = 10
BYTES = 2 << 30
CODES = {0, 1, 2, 3}
ROUND = 20
"""Examples of a target before it is the next one's turn."""
LIBRARIES = ("hypothesis", "pyarrow", "duckdb", "torch", "transformers", "datasets", "numpy")


class TooSlow(BaseException):
    """No `Exception`, so that nothing on the way takes it for a failure of its own."""


@dataclass
class Finding:
    """One bug, and how often it was met."""

    target: str
    words: Words
    drawn: str
    what: str
    times: int = 1


@dataclass
class Tally:
    """What was tried, and found."""

    examples: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, finding: Finding, signature: str) -> None:
        """Count a finding under what tells it apart."""
        if signature in self.findings:
            self.findings[signature].times += 1
        else:
            self.findings[signature] = finding
            sys.stderr.write(f"FOUND {signature}: {' '.join(finding.words)[:300]}\n")


def fuzz(world: World, name: str, target: Target, tally: Tally, **how: Any) -> None:
    """So many examples of a target; findings and counts go to the tally.

    Args:
        world: What is damaged.
        name: The target's.
        target: What is drawn, and what is done with it.
        tally: Gets what was found.
        how: `examples`, and `number`, on which alone it depends which they are.
    """

    @seed(how["number"])
    @settings(
        max_examples=how["examples"],
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.drawn, st.integers(0, 2**20))
    def example(drawn: Any, which: int) -> None:
        world.fresh()
        commands = target.damage(world, drawn)
        words = commands[which % len(commands)]
        before = world.outside()
        began = time.process_time()
        found = run_command(words, tally)
        seconds = time.process_time() - began
        tally.examples[name] += 1
        tally.slowest[name] = max(tally.slowest.get(name, 0.0), round(seconds, 2))
        if world.outside() != before or os.listdir():
            found = f"{words[0]} changed a file beside its own", f"outside {words[0]}"
        if found is not None:
            tally.add(Finding(name, words, repr(drawn)[:3000], found[0]), found[1])

    example()


def run_command(words: Words, tally: Tally) -> tuple[str, str] | None:
    """Run a command; what is wrong with how it ended, and what tells that apart, or None."""
    try:
        with _time_limit():
            done = stillroom(*words, expect=None)
    except (TooSlow, Exception) as error:
        tally.codes[f"{words[0]}: {type(error).__name__}"] += 1
        said = "".join(traceback.format_exception(error)[-12:])
        return said[-4000:], f"{type(error).__name__} {_place(error)}"
    tally.codes[f"{words[0]}: {done.returncode}"] += 1
    said = done.stderr[-1500:]
    if "Traceback (most recent" in done.stderr:
        return said, f"traceback {words[0]}"
    if done.returncode not in CODES or (done.returncode == 1 and "error: " not in done.stderr):
        return f"exit code {done.returncode}\n{said}", f"code {done.returncode} {words[0]}"
    if done.returncode == 1:
        return f"exit code 1\n{said}", f"code 1 {re.sub(r'[^a-z ]', '', said)[-60:]}"
    return None


def _place(error: BaseException) -> str:
    """The innermost line of ours that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if re.search(r"/(storage|stages|pipeline)/[\w/]+\.py$", f.filename)]
    last = ours[-1] if ours else frames[-1]
    return f"{'/'.join(Path(last.filename).parts[-3:])} {last.name}"


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TooSlow where Python still runs; else the interpreter ends, saying where it was.

    The limit is of processor time, for others use the machine. The end comes after a minute and a
    half by the clock.
    """
    signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(9 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def _too_slow(number: int, frame: FrameType | None) -> NoReturn:
    raise TooSlow


def limit_memory() -> None:
    """What is held now, and so much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> None:
    """Round after round over the targets until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--only", nargs="*", choices=list(targets()), default=list(targets()))
    parser.add_argument("--task", choices=OTHER_TASKS, help="the store of another task alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true", help="two examples of each target")
    asked = parser.parse_args()
    out = asked.out or Path(tempfile.mkdtemp(prefix="fuzz-"))
    faulthandler.enable()
    world = prepared(out, asked.task)
    names = [name for name in asked.only if asked.task is None or name in ON_STORE]
    tally, began, number = Tally(), time.monotonic(), asked.seed
    while (time.monotonic() - began < asked.seconds) and not (asked.tiny and number > asked.seed):
        for name in names:
            examples = 2 if asked.tiny else ROUND
            fuzz(world, name, targets()[name], tally, examples=examples, number=number)
            if time.monotonic() - began > asked.seconds:
                break
        number += 1
        sys.stderr.write(f"{number}: {tally.examples.total()} {len(tally.findings)} found\n")
    _print(tally, time.monotonic() - began, asked.seed)


def prepared(out: Path, task: str | None) -> World:
    """A world in an empty folder; the working folder is an empty one beside it."""
    shutil.rmtree(out, ignore_errors=True)
    world = World(out / "world") if task is None else OtherWorld(out / "world", task)
    (out / "here").mkdir()
    os.chdir(out / "here")
    world.fresh()
    for words in ("plan", "status"):
        stillroom(words, world.work / "recipe.yaml")  # imports what commands import
    limit_memory()
    return world


def _print(tally: Tally, seconds: float, first: int) -> None:
    for name, examples in tally.examples.items():
        print(f"{name:<18} {examples:>6} examples, slowest {tally.slowest[name]:5.1f} s")
    for signature, finding in tally.findings.items():
        print(f"\nFOUND {finding.times} times: {signature}\n  {' '.join(finding.words)}")
        print(f"  {finding.target}: {finding.drawn}\n{finding.what}")
    result = {
        "seconds": round(seconds),
        "seed": first,
        "examples": dict(tally.examples),
        "codes": dict(sorted(tally.codes.items())),
        "slowest": tally.slowest,
        "findings": {signature: f.times for signature, f in tally.findings.items()},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
