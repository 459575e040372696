"""The command line's application, the options that its commands share, and how they print."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..printing.text import show_line

app = typer.Typer(
    name="stillroom",
    help="Offline soft-label distillation: run the teacher once, train any number of students "
    "from disk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL of the store.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: section.key=value. Repeatable.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object as the last line of standard output.")
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Let the code of the recipe's student.factory run.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def words(given: Iterable[str]) -> list[str]:
    """The values of an option that takes several, separated by commas, and may be given again."""
    found = [word.strip() for text in given for word in text.split(",")]
    return [word for word in found if word]


def print_for_people(content: Any, *, columns: int = 400) -> None:
    """Print a line for people, or what rich draws, on standard output, above the JSON line.

    `columns` where that is no terminal.
    """
    if isinstance(content, str):
        show_line(content)
        return
    from ..printing.console import Terminal

    width = None if sys.stdout.isatty() else columns
    Terminal(soft_wrap=width == 400, width=width).print(content)


def print_json(content: dict[str, Any], wanted: bool) -> None:
    """Print the last line of standard output, for programs, where `--json` asks for it."""
    if wanted:
        show_line(json.dumps(content))  # all but ASCII is escaped
