"""A report's blocks as one HTML file, light or dark as asked.

Styles, script and drawings are inside, so nothing is fetched.
"""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..printing.numbers import decimals
from ..printing.text import printable
from . import plots
from .blocks import Figures, Page, Section, Tokens
from .token_view import Position, Said, TokenRow, shade

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parents[1] / "templates"


def page(content: Page) -> str:
    """A whole report."""
    environment = _environment()
    return environment.get_template("page.html.jinja").render(
        page=content,
        tokens=[_payload(row, block) for block in _tokens(content.sections) for row in block.rows],
        anchors={section.title: _anchor(section.title) for section in content.sections},
    )


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_shown,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # keys in their own order
    environment.filters |= {
        "kind": lambda block: type(block).__name__,
        "words": _words,
        "svg": _svg,
        "legend": _legend,
        "share": lambda position, arm: f"{shade(position.distance(arm)):.3f}",
        "shown": shown,
        "printable": printable,
    }
    return environment


def _shown(value: Any) -> Any:
    """Everything that is put into the page; what is escaped already stays so."""
    return printable(value) if isinstance(value, str) else value


def _words(text: str) -> Any:
    """A line of a block: `code` and **strong** words, all else as it is."""
    from markupsafe import Markup

    escaped = escape(text, quote=False)
    escaped = re.sub(r"`([^`]*)`", lambda found: f"<code>{_breakable(found[1])}</code>", escaped)
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped))


def _breakable(code: str) -> str:
    """A name or a path may go on in the next line after a dot, a slash or an underscore."""
    return re.sub(r"([./_])(?=\w)", r"\1<wbr>", code)


def _svg(panel: plots.Panel) -> Any:
    from markupsafe import Markup

    return Markup(plots.svg(panel))


def _legend(panel: plots.Panel) -> list[tuple[str, str, bool]]:
    """What is drawn, where that is more than one thing."""
    named = plots.legend(panel)
    return named if len(named) > 1 else []


def shown(text: str) -> str:
    """A token in running text; a line's end can be seen, and breaks the line."""
    return printable(text.replace("\r", "").replace("\n", "\u21b5\n")) or "\u2205"


def _tokens(sections: Any) -> Iterator[Tokens]:
    for block in sections:
        if isinstance(block, Tokens):
            yield block
        elif isinstance(block, Section):
            yield from _tokens(block.blocks)
        elif isinstance(block, Figures):
            yield from _tokens(block.numbers)


def _payload(row: TokenRow, block: Tokens) -> list[dict[str, Any]]:
    """What the script shows of each token; numbers are text already."""
    return [_of_position(position, block) for position in row.positions]


def _of_position(position: Position, block: Tokens) -> dict[str, Any]:
    said = {name: _said(found) for name, found in position.said.items()}
    return {
        "i": position.index,
        "t": printable(position.text),
        "said": said,
        "v": {a: round(shade(position.distance(a)), 3) for a in block.arms if a in position.said},
    }


def _said(said: Said) -> dict[str, Any]:
    best = [[printable(text), decimals(p, 3), round(p, 3)] for text, p in said.best]
    return {
        "p": decimals(said.token, 3),
        "kl": None if said.kl is None else decimals(said.kl, 3),
        "best": best,
    }


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
