"""The house rules that imports can show: three floors, heavy libraries in few files and never at import time."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"storage": 0, "stages": 1, "pipeline": 2}
MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
STAGES = ("data", "generate", "score", "train", "evaluate")
HEAVY = {"torch", "transformers", "vllm", "ray", "matplotlib", "peft", "accelerate", "datasets", "tensorboard"}
# What a command reads before its first stage is free of torch; the other rooms of `stages/` may be all torch.
LIGHT_ROOMS = ("recipe", "ledger", "workers", "data")
LIGHT = {"models": ("identity", "classes", "same_tokenizer", "rendering", "token_text"), "engines": ("base", "vllm")}
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "__init__.py",
    "docker",
    "tests",
    *FLOORS,
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Dotted names a module imports; our own as `stages.losses`, without `stillroom`."""
    package = path.relative_to(ROOT).parent.parts
    for node in statements(ast.parse(path.read_text("utf-8")), functions=not at_import_time):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("stillroom.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])]).removeprefix("stillroom.")
            for alias in node.names:
                yield f"{module}.{alias.name}" if module else alias.name


def statements(node: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """Every statement below a node; without `functions`, only what runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not functions:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
        yield child
        yield from statements(child, functions=functions)


def importers(package: str) -> list[str]:
    return [name_of(p) for p in MODULES if any(name.split(".")[0] == package for name in imports(p))]


def reached(path: Path, seen: set[Path]) -> set[str]:
    """Libraries that importing a module loads, through our own modules as well."""
    seen.add(path)
    found: set[str] = set()
    for name in imports(path, at_import_time=True):
        parts = name.split(".")
        if parts[0] not in FLOORS:
            found.add(parts[0])
            continue
        for end in range(1, len(parts) + 1):
            ours = ROOT.joinpath(*parts[:end]).with_suffix(".py")
            if ours.exists() and ours not in seen:
                found |= reached(ours, seen)
    return found


def is_light(path: Path) -> bool:
    """Whether importing a module must load no model library."""
    floor, room, *_ = (*path.relative_to(ROOT).parts, "")
    if floor != "stages" or room in LIGHT_ROOMS or path.name in ("stage.py", "__init__.py"):
        return True
    return path.stem in LIGHT.get(room, ())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
class TestModule:
    def test_says_what_it_is(self, path):
        assert path.read_text("utf-8").startswith('"""'), "the first line of a module says what it is"

    def test_imports_its_own_floor_or_below(self, path):
        floor = FLOORS[path.relative_to(ROOT).parts[0]]
        above = [name for name in imports(path) if FLOORS.get(name.split(".")[0], -1) > floor]
        assert not above, "storage <- stages <- pipeline"

    def test_crosses_floors_with_relative_imports(self, path):
        tree = ast.walk(ast.parse(path.read_text("utf-8")))
        absolute = [node for node in tree if isinstance(node, ast.Import) or not getattr(node, "level", 1)]
        assert not [ast.unparse(node) for node in absolute if re.match(r"(from|import) stillroom\b", ast.unparse(node))]

    def test_imports_no_stage_but_from_above(self, path):
        floor, room, *_ = (*path.relative_to(ROOT).parts, "")
        if floor != "stages":
            return
        others = {("stages", stage, "stage") for stage in STAGES if stage != room}
        assert not [name for name in imports(path) if tuple(name.split(".")[:3]) in others]

    def test_loads_heavy_libraries_inside_functions(self, path):
        allowed = set() if is_light(path) else {"torch", "transformers", "peft"}
        assert reached(path, set()) & HEAVY <= allowed


def test_the_ground_floor_knows_no_models():
    for package in HEAVY | {"tokenizers", "safetensors"}:
        assert not [name for name in importers(package) if name.startswith("storage/")], package


def test_vllm_is_imported_in_one_file():
    assert set(importers("vllm")) <= {"stages/engines/vllm.py"}


def test_duckdb_is_imported_in_two_files_at_most():
    found = importers("duckdb")
    assert len(found) <= 2, found


def test_names_appear_on_disk_in_one_file_only():
    """What makes a file visible under its final name, by any spelling (`replace` alone is a method of str too).

    A finished student is a folder, which no put-if-absent can make; it moves to its name in one file as well.
    """
    moving = []
    for path in MODULES:
        if name_of(path) == "storage/files/local.py":
            continue
        tree = ast.walk(ast.parse(path.read_text("utf-8")))
        spelled = {ast.unparse(node) for node in tree if isinstance(node, ast.Attribute)} | set(imports(path))
        assert not {"os.link", "os.replace", "os.rename", "os.renames"} & spelled, name_of(path)
        if any(name.endswith((".rename", ".hardlink_to")) for name in spelled):
            moving.append(name_of(path))
    assert set(moving) <= {"stages/models/student.py"}


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.cli.main",
        "pipeline.plan.plan",
        "pipeline.demo",
        "stages.recipe.load",
        "stages.data.stage",
        "stages.train.stage",
    ],
)
def test_importing_loads_no_torch(module):
    code = f"import sys, stillroom.{module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert found.stdout.split() == []


def test_the_top_level_holds_the_agreed_names_only():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
