"""What loads: torch with the GPUs that it sees, and the engines that write text.

It is tried in a process of its own. These libraries take seconds to import, and what is broken in
them may end the process that tries it. So it is started first, does its work beside the other
checks, and is waited for at the end.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Self

from ...stages.recipe.engines import ENGINES
from ...stages.workers.devices import VISIBLE
from .finding import Finding, fault, ok, warning

DEADLINE_SECONDS = 60.0
"""From the start: vLLM takes 9 seconds on two cores, and several times that the first time after it
was installed, which is when a doctor is asked. What hangs is not waited for longer."""
_MARK = "doctor:"
_SCRIPT = f"""
import importlib, json, sys
def say(name, **found):
    print({_MARK!r} + json.dumps({{"name": name}} | found), flush=True)
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        found = {{"version": str(getattr(module, "__version__", ""))}}
        if name == "torch":
            gpus = range(module.cuda.device_count() if module.cuda.is_available() else 0)
            found["cuda"] = module.version.cuda or getattr(module.version, "hip", None)
            found["gpus"] = [module.cuda.get_device_name(gpu) for gpu in gpus]
        say(name, **found)
    except BaseException as error:
        say(name, error=f"{{type(error).__name__}}: {{error}}"[:300])
"""


class Libraries:
    """The process that imports them, from its start to what it found; it ends with the block."""

    def __init__(self) -> None:
        self._engines = [engine for engine in ENGINES if engine.needs and find_spec(engine.needs)]
        names = [
            "torch",
            *(engine.needs for engine in reversed(self._engines)),
        ]  # vLLM, the slow one, last
        self._began = time.monotonic()
        quiet = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=quiet,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def look(self) -> Iterator[Finding]:
        """First torch and the GPUs, then each engine."""
        found = self._said()
        yield from _torch(found.get("torch"))
        for engine in ENGINES:
            if engine.needs:
                installed = engine in self._engines
                yield _engine(engine.name, engine.install, found.get(engine.needs), installed)
            else:
                yield ok(f"engine {engine.name}", "is always there", "It writes by transformers")

    def _said(self) -> dict[str, dict[str, Any]]:
        """By library; nothing of one that was not done in time."""
        left = max(0.1, DEADLINE_SECONDS - (time.monotonic() - self._began))
        try:
            output, _ = self._process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            self._process.kill()
            output, _ = self._process.communicate()
        lines = [line for line in output.splitlines() if line.startswith(_MARK)]
        said = [json.loads(line.removeprefix(_MARK)) for line in lines]
        return {one["name"]: one for one in said}


def _torch(found: dict[str, Any] | None) -> Iterator[Finding]:
    if found is None:
        yield warning(
            "torch",
            f"not imported within {DEADLINE_SECONDS:.0f} s",
            "Disk or processor are slow or busy, or its process was ended",
            "Try again, or see what `python -c 'import torch'` says",
        )
        return
    if "error" in found:
        do = "Install it again: pip install --force-reinstall torch"
        yield fault("torch", f"does not load: {found['error']}", "Nothing is scored or trained", do)
        return
    build = (
        f"built for {'CUDA' if '.' in str(found['cuda']) else ''} {found['cuda']}"
        if found["cuda"]
        else "built for CPUs"
    )
    yield ok("torch", f"{found['version']}, {build}")
    yield _gpus(_driver(), found["gpus"], found["cuda"])


def _gpus(driver: list[str], seen: list[str], cuda: str | None) -> Finding:
    """What the driver has against what torch sees."""
    if seen:
        return ok("GPU", f"torch sees {len(seen)}: {', '.join(sorted(set(seen)))}")
    slow = "Teacher and student run on the processor: right for small models, slow for others"
    if not driver:
        return ok("GPU", "none", slow)
    there = f"{len(driver)} by nvidia-smi ({', '.join(sorted(set(driver)))}), none seen by torch"
    if os.environ.get(VISIBLE) in ("", "-1"):
        return warning("GPU", f"{there}: {VISIBLE} hides them", slow, f"unset {VISIBLE}")
    if cuda is None:
        do = "Install a build of torch for CUDA (pip install --force-reinstall torch)"
        return warning("GPU", f"{there}, which is a build for CPUs", slow, do)
    do = "Compare the CUDA version that nvidia-smi shows with torch's: the driver must be as new"
    return warning("GPU", there, slow, do)


def _driver() -> list[str]:
    """The NVIDIA GPUs that the driver names."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    ask = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _engine(name: str, install: str, found: dict[str, Any] | None, installed: bool) -> Finding:
    what = f"engine {name}"
    if not installed:
        return ok(
            what,
            "not installed",
            "A recipe that names it is refused",
            f"If you want it, install {install}",
        )
    if found is None:
        return warning(
            what,
            f"not imported within {DEADLINE_SECONDS:.0f} s",
            "It is installed, and whether it loads is not known",
            f"See what `python -c 'import {name}'` says",
        )
    if "error" in found:
        return warning(
            what,
            f"is installed and does not load: {found['error']}",
            "A recipe that leaves the engine open takes it where it is installed, and fails",
            "Mend it (vLLM on CPUs needs libnuma1 and the CPU build of torch), or set "
            "generate.engine: hf",
        )
    return ok(what, f"loads, {found['version']}".rstrip(", "))
