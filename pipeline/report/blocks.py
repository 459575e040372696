"""What a report is made of: sections of blocks, written once, drawn as Markdown and as a page.

All text in blocks is finished: numbers are printed already, so both pages show the same digits. It
may hold `code` and **strong** words, nothing else of Markdown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .plots import Panel
from .token_view import TokenRow


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """Remarks."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """Columns after the first `text_columns` are numbers; no headers where all are empty."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    strong: str = ""
    """The row whose first cell this is stands out."""


@dataclass(frozen=True, slots=True)
class Code:
    """Text as it is; `folded` behind its name where a page can do that."""

    text: str
    language: str = ""
    folded: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Panels side by side, and the same in numbers for who cannot see them."""

    panels: Sequence[Panel]
    numbers: Sequence["Block"] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and everybody's text: (name, text)."""

    prompt: str
    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Samples:
    """Prompts, numbered from 1."""

    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows token by token, coloured by the KL of one of `arms` (arm -> its name)."""

    rows: Sequence[TokenRow]
    arms: dict[str, str]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it; `folded` behind the heading where a page can do that."""

    title: str
    blocks: Sequence["Block"]
    folded: bool = False


Block = Text | Bullets | Table | Code | Figures | Samples | Tokens | Section


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report."""

    title: str
    lead: Sequence[Block]
    """What came of it, before all sections."""
    sections: Sequence[Section]
