"""A report's blocks as Markdown."""

from collections.abc import Sequence

from ..printing.numbers import decimals
from ..printing.text import escaped, fenced, prose, table
from .blocks import Block, Bullets, Code, Figures, Page, Samples, Section, Table, Text, Tokens
from .token_view import TEACHER, TokenRow, best_of, code, worst

WORST = 8
"""Tokens of a row that are listed."""


def page(content: Page) -> str:
    """A whole report."""
    parts = [
        f"# {escaped(content.title)}",
        *(block(b) for b in content.lead),
        *(block(s) for s in content.sections),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def block(content: Block, *, level: int = 2) -> str:
    """One block; `level` of a section's heading."""
    match content:
        case Text(text):
            return prose(text)
        case Bullets(items):
            return "\n".join(f"- {prose(item)}" for item in items)
        case Table(headers, rows, text_columns):
            return table(headers, rows, text_columns=text_columns)
        case Code(text, language):
            return fenced(text, language)
        case Figures(_, numbers):
            return _joined(numbers, level)
        case Samples():
            return _samples(content, level)
        case Tokens(rows, arms):
            return "\n\n".join(
                _tokens(row, next(a for a in row.arms if a in arms), level) for row in rows
            )
        case Section(title, blocks):
            return f"{'#' * level} {prose(title)}\n\n{_joined(blocks, level + 1)}"


def _joined(blocks: Sequence[Block], level: int) -> str:
    return "\n\n".join(part for part in (block(b, level=level) for b in blocks) if part)


def _samples(content: Samples, level: int) -> str:
    parts = []
    for number, sample in enumerate(content.samples, 1):
        parts.append(f"{'#' * level} Prompt {number}\n\n{fenced(sample.prompt)}")
        parts += [f"{prose(name)}:\n\n{fenced(text)}" for name, text in sample.texts]
    return "\n\n".join(parts)


def _tokens(row: TokenRow, arm: str, level: int) -> str:
    """The text, then the tokens at which the arm is farthest off."""
    rows = [
        [
            str(position.index),
            code(position.text),
            decimals(position.distance(arm), 3),
            best_of(position.said[TEACHER], 3),
            best_of(position.said[arm], 3),
        ]
        for position in worst(row, arm, WORST)
    ]
    headers = ["index", "token", "KL (nats)", "teacher's best", "student's best"]
    text = row.before + "".join(position.before + position.text for position in row.positions)
    listed = table(headers, rows, text_columns=2)
    return (
        f"{'#' * level} Row {prose(row.key[:8])}\n\n{fenced(text)}\n\nFarthest off at:\n\n{listed}"
    )
