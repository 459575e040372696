"""Kernel tests and all benches of the fast paths on one NVIDIA GPU.

It is one command of under nine minutes.

    python tests/bench/gpu_check.py [--out DIR] [--wheels DIR] [--only PART ...] [--commit NAME]
                                    [--rehearse]

It runs with whatever Python starts it, needs no network and no installed `stillroom`: the checkout
is made importable by links in a temporary folder. Wheels that the machine lacks (README.md beside
this says which) are installed into another one. Each part is a process with a time limit of its
own; one that fails or overruns is reported, and the others go on. After every part the report is
written anew: gpu-DATE-NAME.md and .json, and .log with all that was printed.

Exit status: 0, or 1 where a kernel test failed, 2 where there is no GPU. --rehearse does without
one: tiny sizes on the CPU, kernels interpreted; its figures mean nothing.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 530  # all parts together
KERNEL_TESTS = [
    "tests/stages/losses/test_vocabulary_triton.py",
    "tests/stages/targets/test_block_sums_triton.py",
]
QUICK = "no_rows or lie_apart"  # the kernel tests of a rehearsal
LIMITS = {
    "kernels": 90,
    "traffic": 40,
    "loss": 150,
    "score": 90,
    "train_step": 150,
    "loader": 60,
    "pipeline": 90,
}
"""Seconds of each part; but for the first, a part is the bench of that name."""
IN_REHEARSAL = 5  # times as long: it shows no speed, and may have other work beside it
MORE = {
    "loader": ["--only", "trainer"]
}  # what else it shows has nothing to do with a GPU, and takes minutes
PROBE = """
import json, platform
from importlib.metadata import version
import torch
there = torch.cuda.is_available()
gpu = torch.cuda.get_device_name() if there else None
facts = {"gpu": gpu, "python": platform.python_version()}
facts |= {"memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1)} if there else {}
for name in ("torch", "triton", "transformers", "pyarrow", "numpy", "liger-kernel", "trl"):
    try:
        facts[name] = version(name)
    except Exception:
        facts[name] = None
print(json.dumps(facts))
"""


@dataclass(kw_only=True, slots=True)
class Part:
    """What became of a part."""

    name: str
    status: str
    """`ok`, `failed`, `overran` or `no time left`."""
    seconds: float = 0.0
    output: str = ""
    errors: str = ""
    outcome: dict[str, Any] = field(default_factory=dict)
    """The JSON line at the end of what a bench prints."""
    bars: list[dict[str, Any]] = field(default_factory=list)
    """Of each bar: `what`, `found`, `bar` and `met` (None: not measured)."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the report [results/; of a rehearsal a temporary one]"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    parser.add_argument("--only", nargs="+", choices=LIMITS, help="parts to run")
    parser.add_argument("--commit", help="of the checkout, where git is not at hand")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    words = parser.parse_args()
    with prepared(words.wheels, rehearse=words.rehearse) as environment:
        facts = json.loads(
            subprocess.check_output([sys.executable, "-c", PROBE], env=environment, text=True)
        )
        if facts["gpu"] is None and not words.rehearse:
            sys.stderr.write(
                "gpu-check: torch sees no NVIDIA GPU here. Nothing was run; --rehearse does "
                "without one.\n"
            )
            return 2
        facts |= {
            "date": datetime.date.today().isoformat(),
            "driver": driver(),
            "commit": words.commit or commit(),
        }
        made = (
            tempfile.mkdtemp(prefix="stillroom-rehearsal-")
            if words.rehearse and not words.out
            else None
        )
        out = Path(made) if made else words.out or HERE / "results"
        report = Report(out, facts)
        began, times = time.monotonic(), IN_REHEARSAL if words.rehearse else 1
        for name in words.only or LIMITS:
            limit = min(LIMITS[name] * times, SECONDS * times - (time.monotonic() - began))
            report.add(run(name, limit, environment, rehearse=words.rehearse))
        sys.stdout.write(f"report: {out}\n")
    return 1 if any(part.name == "kernels" and part.status != "ok" for part in report.parts) else 0


@contextmanager
def prepared(wheels: Path | None, *, rehearse: bool) -> Iterator[dict[str, str]]:
    """The environment of the parts.

    It has links to the three packages, wheels, and a home and caches that are gone afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="stillroom-gpu-") as folder:
        tree, site, home = (Path(folder) / name for name in ("tree", "site", "home"))
        (tree / "stillroom").mkdir(parents=True)
        home.mkdir()
        for package in ("pipeline", "stages", "storage"):
            (tree / "stillroom" / package).symlink_to(ROOT / package)
        if wheels:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--no-index",
                "--no-cache-dir",
            ]
            done = subprocess.run(
                [*pip, "--target", str(site), *map(str, sorted(wheels.glob("*.whl")))]
            )
            if done.returncode:  # the kernel tests need none of them
                sys.stderr.write(
                    f"gpu-check: the wheels in {wheels} were not installed; going on without.\n"
                )
        paths = [
            str(tree),
            str(site),
            str(ROOT / "tests"),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
        own = {
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": folder,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
        }
        own |= {
            "TRITON_CACHE_DIR": str(home / "triton"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        if rehearse:
            own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        yield {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
        } | own


def run(name: str, limit: float, environment: dict[str, str], *, rehearse: bool) -> Part:
    """One part, killed with all its children when its time is up."""
    bench = HERE / f"{name}.py"
    if rehearse and name == "kernels":
        environment = environment | {"TRITON_INTERPRET": "1"}
    if limit < 1:
        return Part(name=name, status="no time left")
    if name == "kernels":
        words = [
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *KERNEL_TESTS,
            *(["-k", QUICK] if rehearse else []),
        ]
    elif bench.exists():
        words = [str(bench), *MORE.get(name, []), *(["--tiny"] if rehearse else [])]
    else:
        return Part(name=name, status="failed", errors=f"no {bench.name}")
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=output,
            stderr=errors,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            status = "failed" if process.wait(limit) else "ok"
        except subprocess.TimeoutExpired:
            status = "overran"
        finally:
            stop(process)
        output.seek(0)
        errors.seek(0)
        part = Part(name=name, status=status, output=output.read(), errors=errors.read())
    part.seconds = round(time.monotonic() - began, 1)
    lines = part.output.splitlines()
    if status == "ok" and name != "kernels":
        try:
            part.outcome = json.loads(lines[-1])
            part.output = "\n".join(lines[:-1])
            part.bars = bars(part.outcome.get("bars", []))
            if rehearse:
                part.bars = [bar | {"met": None} for bar in part.bars]
        except (IndexError, ValueError, KeyError, AttributeError, TypeError) as error:
            part.status, part.errors = (
                "failed",
                f"{part.errors}\nthe last line is not what it should be: {error!r}",
            )
    return part


def bars(stated: Any) -> list[dict[str, Any]]:
    """Rows of `what`, `found`, `bar`, `met`, `why`.

    A bench has such rows, or by name `found`, `at_most` or `at_least`.
    """
    if isinstance(stated, list):
        return [
            {name: bar[name] for name in ("what", "found", "bar", "met")} | {"why": bar.get("why")}
            for bar in stated
        ]
    rows = []
    for what, bar in stated.items():
        found, (side, bound) = (
            bar["found"],
            next((s, bar[s]) for s in ("at_most", "at_least") if s in bar),
        )
        met = (
            None if found is None else bool(found <= bound if side == "at_most" else found >= bound)
        )
        sign = "<=" if side == "at_most" else ">="
        rows.append(
            {
                "what": what,
                "found": found,
                "bar": f"{sign} {bound:.4g}",
                "met": met,
                "why": bar.get("why"),
            }
        )
    return rows


def stop(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part's processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def driver() -> str | None:
    """The driver's version as nvidia-smi names it."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    words = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return (
        subprocess.run(words, capture_output=True, text=True).stdout.split("\n")[0].strip() or None
    )


def commit() -> str | None:
    """The commit of the checkout, with a plus sign where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return None if found.returncode else found.stdout.strip() + ("+" if changed.stdout else "")


class Report:
    """What is written: a page, all figures, all output."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or "rehearsal").lower()).strip("-")
        self._stem = folder / f"gpu-{facts['date']}-{slug}"
        self._facts = facts
        self.parts: list[Part] = []

    def add(self, part: Part) -> None:
        """Say what became of a part, and write everything anew."""
        self.parts.append(part)
        sys.stdout.write(f"{part.name:<12}{part.status:<14}{part.seconds:>6.1f} s\n")
        for bar in part.bars:
            sys.stdout.write(
                f"    {shown(bar['met']):<14}{shown(bar['found']):>10}  "
                f"{bar['bar']:<10} {bar['what']}\n"
            )
        if part.status != "ok":
            sys.stdout.write("".join(f"    {line}\n" for line in last(part, 8)))
        sys.stdout.flush()
        figures = {
            p.name: {"status": p.status, "seconds": p.seconds, **p.outcome} for p in self.parts
        }
        self._write(".json", json.dumps({**self._facts, "parts": figures}, indent=1) + "\n")
        self._write(".md", "\n".join(self._page()) + "\n")
        printed = (
            f"===== {p.name}: {p.status}\n{p.output}\n----- stderr\n{p.errors}\n"
            for p in self.parts
        )
        self._write(".log", "\n".join(printed))

    def _write(self, suffix: str, text: str) -> None:
        self._stem.with_name(self._stem.name + suffix).write_text(text)

    def _page(self) -> Iterator[str]:
        facts = self._facts
        yield f"# {facts['gpu'] or 'Rehearsal without a GPU: the figures mean nothing'}\n"
        versions = ", ".join(
            f"{name} {facts[name]}" for name in ("python", "torch", "triton", "transformers")
        )
        yield f"{facts['date']}, commit {facts['commit']}, driver {facts['driver']}, {versions}\n"
        yield "    python tests/bench/gpu_check.py\n"
        yield "| part | | seconds |\n|---|---|---:|"
        yield from (f"| {part.name} | {part.status} | {part.seconds} |" for part in self.parts)
        yield "\n| bar | found | asked | met |\n|---|---:|---|---|"
        for part in self.parts:
            for bar in part.bars:
                met = shown(bar["met"]) + (f" ({bar['why']})" if bar["why"] else "")
                found = shown(bar["found"])
                yield f"| {part.name}: {bar['what']} | {found} | {bar['bar']} | {met} |"
        for part in self.parts:
            yield f"\n## {part.name}\n\n```"
            yield part.output.strip("\n") if part.status == "ok" else "\n".join(last(part, 30))
            yield "```"


def shown(value: Any) -> str:
    """A value as it stands in a table."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "not measured" if value is None else str(value)


def last(part: Part, count: int) -> list[str]:
    """The last lines of a part that did not end well."""
    return (part.output.splitlines() + part.errors.splitlines())[-count:]


if __name__ == "__main__":
    sys.exit(main())
