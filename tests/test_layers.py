"""The house rules that imports can show: floors, rooms, sizes.

Heavy libraries in few files, inside functions.
"""

import ast
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import stillroom

ROOT = Path(__file__).parent.parent
FLOORS = {"storage": 0, "stages": 1, "pipeline": 2}
MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})
STAGES = ("data", "generate", "score", "train", "evaluate")
HEAVY = {
    "torch",
    "transformers",
    "vllm",
    "ray",
    "matplotlib",
    "peft",
    "accelerate",
    "datasets",
    "tensorboard",
}
LEAVES = {"torch", "transformers", "peft"}
# What a command reads before its first stage is free of torch; the other rooms of `stages/` may be
# all torch.
LIGHT_ROOMS = ("recipe", "ledger", "workers", "data")
LIGHT_FILES = {
    "models": (
        *("identity", "classes", "rendering", "token_text", "reads"),
        *("config", "files", "fresh", "light", "misfits", "parts", "same_tokenizer", "tensors"),
        *("ahead", "own_code", "token_ids", "uses", "stored_tensors"),
        *("teacher_layers", "kinds", "same_layers"),
    ),
    "engines": ("base", "opening", "vllm"),
}
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "__init__.py",
    "__main__.py",
    "docker",
    "tests",
    *FLOORS,
}
MOST_ENTRIES, MOST_LINES, MOST_FUNCTION_LINES = 14, 400, 30


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def imports(path: Path, *, at_import_time: bool = False) -> tuple[str, ...]:
    """Dotted names a module imports; our own as `stages.losses.definition`, without `stillroom`."""
    return tuple(_imports(path, at_import_time))


def _imports(path: Path, at_import_time: bool) -> Iterator[str]:
    package = path.relative_to(ROOT).parent.parts
    for node in statements(parsed(path), functions=not at_import_time):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("stillroom.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])]).removeprefix(
                "stillroom."
            )
            for alias in node.names:
                yield f"{module}.{alias.name}" if module else alias.name


def statements(node: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """Every statement below a node.

    Without `functions`, only what runs when the module is imported.
    """
    for child in ast.iter_child_nodes(node):
        if not functions:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
        yield child
        yield from statements(child, functions=functions)


@cache
def ours(path: Path, *, at_import_time: bool = False) -> frozenset[Path]:
    """Our own files that a module imports.

    A name in a file counts as the file, a package as its `__init__`.
    """
    found = set()
    for name in imports(path, at_import_time=at_import_time):
        parts = name.split(".")
        if parts[0] not in FLOORS:
            continue
        candidates = [ROOT.joinpath(*parts[:end]) for end in (len(parts), len(parts) - 1) if end]
        files = [
            file
            for c in candidates
            for file in (c.with_suffix(".py"), c / "__init__.py")
            if file.exists()
        ]
        found.update(files[:1])
    return frozenset(found - {path})


def room(path: Path) -> str:
    """`stages/losses` of a file in a room of a floor.

    Files that lie on the floor itself are rooms of their own.
    """
    return "/".join(path.relative_to(ROOT).with_suffix("").parts[:2])


def arrows() -> dict[tuple[str, str], list[str]]:
    """Room to room, with the imports that make each arrow."""
    found = defaultdict(list)
    for path in MODULES:
        for other in ours(path):
            if room(path) != room(other):
                found[room(path), room(other)].append(f"{name_of(path)} imports {name_of(other)}")
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def importers(package: str) -> list[str]:
    return [
        name_of(p) for p in MODULES if any(name.split(".")[0] == package for name in imports(p))
    ]


def reached(path: Path, seen: set[Path]) -> set[str]:
    """Libraries that importing a module loads, through our own modules as well."""
    seen.add(path)
    found = {name.split(".")[0] for name in imports(path, at_import_time=True)} - set(FLOORS)
    for other in ours(path, at_import_time=True) - seen:
        found |= reached(other, seen)
    return found


def is_light(path: Path) -> bool:
    """Whether importing a module must load no model library."""
    floor, name, *_ = (*path.relative_to(ROOT).parts, "")
    if floor != "stages" or name in LIGHT_ROOMS or path.name in ("stage.py", "__init__.py"):
        return True
    return path.stem in LIGHT_FILES.get(name, ())


def test_every_module_says_what_it_is():
    assert not [name_of(path) for path in MODULES if not ast.get_docstring(parsed(path))]


def test_every_folder_is_a_package():
    assert not [name_of(folder) for folder in FOLDERS if not (folder / "__init__.py").exists()]


def test_floors_import_downward():
    upward = [
        f"{name_of(path)} imports {name_of(other)}"
        for path in MODULES
        for other in ours(path)
        if FLOORS[other.relative_to(ROOT).parts[0]] > FLOORS[path.relative_to(ROOT).parts[0]]
    ]
    assert not upward, "storage <- stages <- pipeline"


def test_no_circle_of_files():
    assert not circle({name_of(path): {name_of(other) for other in ours(path)} for path in MODULES})


def test_no_circle_of_rooms():
    graph = defaultdict(set)
    for start, end in arrows():
        graph[start].add(end)
    found = circle(graph)
    assert not found, [
        arrows()[pair] for pair in zip(found[1:], found, strict=False) if pair in arrows()
    ]


def test_no_stage_imports_another():
    doors = {f"stages/{stage}" for stage in STAGES}
    assert not {pair: names for pair, names in arrows().items() if set(pair) <= doors}


def test_what_stages_share_imports_no_stage():
    doors = {f"stages/{stage}" for stage in STAGES}
    assert not [
        names
        for (start, end), names in arrows().items()
        if start.startswith("stages/") and start not in doors and end in doors
    ]


def test_floors_are_crossed_with_relative_imports():
    absolute = re.compile(r"^\s*(from|import) stillroom\b", re.M)
    assert not [name_of(path) for path in MODULES if absolute.search(path.read_text("utf-8"))]


def test_the_face_is_for_users_only():
    """What is inside imports from the rooms, never from the public names."""
    public = set(stillroom.__all__)
    assert not {name_of(path): found for path in MODULES if (found := public & set(imports(path)))}


def test_a_name_with_an_underscore_stays_in_its_file():
    assert not [
        f"{name_of(path)} imports {name}"
        for path in MODULES
        for name in imports(path)
        if name.split(".")[0] in FLOORS and name.rsplit(".", 1)[-1].startswith("_")
    ]


def test_heavy_libraries_load_inside_functions():
    heavy = {}
    for path in MODULES:
        found = reached(path, set()) & HEAVY - (set() if is_light(path) else LEAVES)
        heavy |= {name_of(path): found} if found else {}
    assert not heavy


def test_the_ground_floor_knows_no_models():
    for package in HEAVY | {"tokenizers", "safetensors"}:
        assert not [name for name in importers(package) if name.startswith("storage/")], package


def test_vllm_is_imported_in_one_file():
    assert set(importers("vllm")) <= {"stages/engines/vllm.py"}


def test_duckdb_is_imported_in_two_files_at_most():
    found = importers("duckdb")
    assert len(found) <= 2, found


def test_names_appear_on_disk_in_one_room_only():
    """What makes a file visible under its final name stands in one room only, by any spelling.

    `replace` alone is a method of str too. A finished student is a folder, which no put-if-absent
    can make; it moves to its name in one file as well.
    """
    moving = []
    for path in MODULES:
        if room(path) == "storage/files":
            continue
        spelled = {
            ast.unparse(node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)
        }
        spelled |= set(imports(path))
        assert not {"os.link", "os.replace", "os.rename", "os.renames"} & spelled, name_of(path)
        if any(name.endswith((".rename", ".hardlink_to")) for name in spelled):
            moving.append(name_of(path))
    assert set(moving) <= {"stages/models/students/saving.py"}


def test_a_folder_holds_what_one_sees_at_a_glance():
    """Modules and rooms, without `__init__.py`."""
    full = {}
    for folder in FOLDERS:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        rooms = [path for path in FOLDERS if path.parent == folder]
        if len(modules) + len(rooms) > MOST_ENTRIES:
            full[name_of(folder)] = len(modules) + len(rooms)
    assert not full


def test_files_and_functions_are_short():
    lines = {name_of(path): path.read_text("utf-8").count("\n") for path in MODULES}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}
    functions = [
        node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert statistics.quantiles(functions, n=10)[-1] <= MOST_FUNCTION_LINES


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
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True
    )
    assert found.stdout.split() == []


def test_the_top_level_holds_the_agreed_names_only():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


# Loaders of transformers, datasets and vLLM that may run a model's own code, or ask whether to.
# Adapters (PeftModel) and GenerationConfig are data alone: they have no such argument.
_LOADERS = ("from_pretrained", "from_config", "load_dataset", "LLM", "pipeline")
_DATA_ALONE = ("PeftModel", "GenerationConfig")


def test_who_loads_a_model_says_whether_its_code_may_run() -> None:
    """Explicitly, in every call.

    `LLM` takes it among the arguments that were gathered before it.
    """
    silent = []
    for module in MODULES:
        text = module.read_text()
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            words = ast.unparse(call.func).split(".")
            if words[-1] not in _LOADERS or words[0] in _DATA_ALONE:
                continue
            said = {keyword.arg for keyword in call.keywords}
            if words[-1] == "LLM" and '"trust_remote_code": author.runs_code' in text:
                continue
            if "trust_remote_code" not in said:
                silent.append(f"{module.relative_to(ROOT)}:{call.lineno}")
    assert not silent
