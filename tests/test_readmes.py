"""The pages of rooms.

A floor's page names every file of it, no page is long, and paths in pages exist.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("storage", "stages", "pipeline")
PAGES = sorted(page for floor in FLOORS for page in (ROOT / floor).rglob("README.md"))
MOST_LINES = 200


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(floor: str) -> dict[str, set[str]]:
    """Folder -> the files that the floor's page lists below it; "" is the floor itself."""
    text = ROOT.joinpath(floor, "README.md").read_text("utf-8")
    found: dict[str, set[str]] = {"": set()}
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        folder = ""
        for line in block.splitlines():
            if not line.startswith(" "):
                folder = (re.findall(r"^(\w+)/", line) or [""])[0]
            names = re.findall(r"\b\w+\.py\b", line)
            found.setdefault(folder, set()).update(names)
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floors_page_names_every_file(floor: str) -> None:
    listed = tree(floor)
    missing = []
    for path in (ROOT / floor).rglob("*.py"):
        parts = path.relative_to(ROOT / floor).parts
        room = parts[0] if len(parts) > 1 else ""
        if path.name != "__init__.py" and path.name not in listed.get(room, set()):
            missing.append(name_of(path))
    assert not missing, f"{floor}/README.md has no line for these"


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floors_page_names_no_file_that_is_gone(floor: str) -> None:
    gone = []
    for room, names in tree(floor).items():
        there = {path.name for path in (ROOT / floor / room).rglob("*.py")}
        gone += [f"{room}/{name}" for name in names - there]
    assert not gone


def test_no_page_is_long() -> None:
    lengths = {name_of(page): page.read_text("utf-8").count("\n") for page in PAGES}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name_of
)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


FRONT = ROOT / "README.md"


def prose(text: str) -> str:
    """A page without blocks of code, tables, pictures and where its links lead."""
    text = re.sub(
        r"^```.*?^```|^ {4}.*?$|^\|.*?$|^!\[.*?$", "", text, flags=re.MULTILINE | re.DOTALL
    )
    return re.sub(r"\]\([^)]*\)", "]", text)


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence.

    Headings, list items and what ends in a colon stand for themselves.
    """
    parts = re.split(r"(?<=[.:?])\s|^#+.*$|^\* |\n\n|·", prose(text), flags=re.MULTILINE)
    return [words for part in parts if len(words := re.findall(r"\w[\w'.-]*", part)) > 1]


def test_the_front_page_is_short() -> None:
    text = FRONT.read_text("utf-8")
    shown = re.sub(r"^```.*?^```|^ {4}.*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    lengths = [len(words) for words in sentences(text)]
    assert text.count("\n") <= 150
    assert len(re.findall(r"\w[\w'.-]*", re.sub(r"\]\([^)]*\)", "]", shown))) <= 1500
    assert sum(lengths) / len(lengths) <= 20


def test_the_front_page_has_a_recipe_and_its_limits_early() -> None:
    lines = FRONT.read_text("utf-8").splitlines()
    assert lines.index("```yaml") < 60
    assert lines.index("## Limits") < len(lines) / 2


def test_commands_of_the_front_page_are_there() -> None:
    import typer

    from stillroom.pipeline.cli.main import app

    known = typer.main.get_command(app).commands
    lines = re.findall(r"^ {4}((?:stillroom|make) [^#\n]+)", FRONT.read_text("utf-8"), re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for line in lines:
        program, command, *words = line.split()
        assert command in (known if program == "stillroom" else targets), line
        if program == "stillroom":
            options = {name for option in known[command].params for name in option.opts}
            assert {word for word in words if word.startswith("--")} <= options, line
