"""How a checkout is built.

It shows files in a folder, imports, circles, statements, names, and the density of its lines.

`python tests/bench/house.py [CHECKOUT ...]` prints a column for each and ends with one JSON line.
Sources are parsed, not imported. Lines of code are neither blank nor comments nor docstrings.
"""

import argparse
import ast
import io
import json
import subprocess
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import Any

FLOORS = ("storage", "stages", "pipeline")
Graph = dict[str, set[str]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parents[2]
    parser.add_argument("checkouts", nargs="*", type=Path, default=[here], help="folders")
    checkouts = parser.parse_args().checkouts
    found = {str(checkout): measure(checkout) for checkout in checkouts}
    print(table(found))
    print(json.dumps(found))


def measure(checkout: Path) -> dict[str, Any]:
    """All numbers of a checkout."""
    sources = {
        path.relative_to(checkout).as_posix(): path.read_text("utf-8")
        for floor in FLOORS
        for path in sorted((checkout / floor).rglob("*.py"))
    }
    trees = {name: ast.parse(source) for name, source in sources.items()}
    files = {name: imported(name, tree, set(sources)) for name, tree in trees.items()}
    rooms = between_rooms(files)
    lines = sum(bool(line.strip()) for source in sources.values() for line in source.splitlines())
    comments = sum(comment_lines(source) for source in sources.values())
    docstrings = sum(docstring_lines(trees[name], source) for name, source in sources.items())
    code = lines - comments - docstrings
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    return {
        "commit": commit(checkout),
        "entries": {floor: entries(checkout / floor) for floor in FLOORS},
        "fullest folder": max(
            entries(folder)
            for floor in FLOORS
            for folder in (checkout / floor, *(checkout / floor).rglob("*/"))
        ),
        "arrows of files": {floor: arrows(files, floor) for floor in FLOORS},
        "arrows of rooms": {floor: arrows(rooms, floor) for floor in FLOORS},
        "circles of files": circles(files),
        "circles of rooms": circles(rooms),
        "files": len(sources),
        "lines, none blank": lines,
        "lines of code": code,
        "statements": sum(isinstance(node, ast.stmt) for node in nodes),
        "top-level names": sum(len(top_level(tree)) for tree in trees.values()),
        "nodes a line": round(len(nodes) / code, 2),
        "comment lines, %": round(100 * comments / lines, 2),
    }


def commit(checkout: Path) -> str | None:
    """The commit that is checked out; None outside of git."""
    words = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or None


def entries(folder: Path) -> int:
    """Modules and rooms in a folder, without `__init__.py`."""
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    rooms = [path for path in folder.glob("*/") if (path / "__init__.py").exists()]
    return len(modules) + len(rooms)


def imported(name: str, tree: ast.Module, files: set[str]) -> set[str]:
    """Our own files that a file imports; a package stands for its `__init__.py`."""
    package = name.split("/")[:-1]
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue  # floors are crossed with relative imports only
        base = package[: len(package) - node.level + 1]
        module = [*base, *(node.module.split(".") if node.module else [])]
        for alias in node.names:
            found |= first_file([*module, alias.name], files) or first_file(module, files)
    return found - {name}


def first_file(parts: list[str], files: set[str]) -> set[str]:
    """The file that a dotted name is, if it is one."""
    path = "/".join(parts)
    return {name for name in (f"{path}.py", f"{path}/__init__.py") if name in files}


def room(name: str) -> str:
    """`stages/losses` of a file in a room; a file that lies on its floor is a room of its own."""
    return "/".join(name.removesuffix(".py").split("/")[:2])


def between_rooms(files: Graph) -> Graph:
    """The same imports, room to room."""
    found: Graph = defaultdict(set)
    for name, others in files.items():
        found[room(name)] |= {room(other) for other in others} - {room(name)}
    return found


def arrows(graph: Graph, floor: str) -> int:
    """Imports within a floor."""
    inside = [name for name in graph if name.startswith(f"{floor}/")]
    return sum(other.startswith(f"{floor}/") for name in inside for other in graph[name])


def circles(graph: Graph) -> int:
    """Groups of files that all import one another, directly or through others of the group."""
    below = {name: reached(name, graph) for name in graph}
    groups = {
        frozenset(other for other in below[name] if name in below[other])
        for name in graph
        if name in below[name]
    }
    return len(groups)


def reached(name: str, graph: Graph) -> set[str]:
    """All that a file imports, through others as well."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def top_level(tree: ast.Module) -> set[str]:
    """Names that a module defines itself: functions, classes, constants."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = [n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            found |= {name.id for name in named if isinstance(name.ctx, ast.Store)}
    return found


def comment_lines(source: str) -> int:
    """Lines that hold nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return sum(token.line.lstrip().startswith("#") for token in comments)


def docstring_lines(tree: ast.Module, source: str) -> int:
    """Lines of docstrings that are not blank."""
    lines = source.splitlines()
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [n.body[0] for n in ast.walk(tree) if isinstance(n, owners) and ast.get_docstring(n)]
    spans = [lines[node.lineno - 1 : node.end_lineno] for node in found]
    return sum(bool(line.strip()) for span in spans for line in span)


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row for each number, a column for each checkout."""
    names = list(next(iter(found.values())))
    rows = [["", *found], *([name, *(shown(f[name]) for f in found.values())] for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def shown(value: Any) -> str:
    """A number for people; the three floors' beside one another."""
    if isinstance(value, dict):
        return ", ".join(str(number) for number in value.values())
    return str(value)


if __name__ == "__main__":
    main()
