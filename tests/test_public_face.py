"""`import stillroom`: the names that the documents use, each imported at its first use."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stillroom

ROOT = Path(__file__).parent.parent
FACE = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    + [page for floor in ("storage", "stages", "pipeline") for page in (ROOT / floor).rglob("*.md")]
)


def fresh(code: str) -> list[str]:
    """The words that a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def blocks(page: Path) -> list[str]:
    """The Python code of a document."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def used(code: str) -> set[str]:
    """What a piece of code takes from stillroom: `name`, or `module.name` from deeper within."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stillroom":
            inner = (node.module or "").removeprefix("stillroom").lstrip(".")
            found |= {f"{inner}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            deeper = [a.name for a in node.names if a.name.startswith("stillroom.")]
            found |= {name.removeprefix("stillroom.") for name in deeper}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "stillroom":
            found.add(node.attr)
    return found


def test_importing_it_loads_nothing_but_itself():
    code = (
        "import sys; before = set(sys.modules); import stillroom; print(*set(sys.modules) - before)"
    )
    packages = {name.split(".")[0] for name in fresh(code)}
    assert packages - sys.stdlib_module_names == {"stillroom"}


def test_the_recipe_and_the_store_load_no_torch():
    code = "import sys, stillroom; stillroom.load_recipe; stillroom.open_store; print(*sys.modules)"
    assert "torch" not in fresh(code)


@pytest.mark.parametrize("name", stillroom.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    assert getattr(stillroom, name).__doc__
    assert name in dir(stillroom)


def test_any_other_name_is_none_of_ours():
    with pytest.raises(AttributeError, match="no attribute 'open_stroe'"):
        stillroom.open_stroe  # noqa: B018


def test_type_checkers_see_the_same_names_from_the_same_places():
    (block,) = [node for node in FACE.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: f".{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == stillroom._PLACES
    assert sorted(seen) == sorted(stillroom.__all__)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_documents_use_public_names_only(page):
    assert not {name for code in blocks(page) for name in used(code)} - set(stillroom.__all__)


def test_every_public_name_is_used_in_a_document():
    shown = {name for page in DOCUMENTS for code in blocks(page) for name in used(code)}
    assert shown == set(stillroom.__all__)
