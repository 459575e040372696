"""Text of others, made harmless: what is shown, and what enters Markdown.

Names and values come from files, stores, models and databases that other people made. All that is
shown goes through `show_line`, `show_text` or a `console.Terminal`, all that enters Markdown
through `inline`, `fenced`, `escaped` or `prose`; HTML has the same `printable` and Jinja's own
escaping.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ...stages.recipe.run_folder import RUN
from ...storage.credentials import shown

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421, 0x2028: 0x2424, 0x2029: 0x2424}
_PICTURES |= dict.fromkeys(
    # Eight-bit controls, marks that turn the text after them round, halves of characters.
    [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)],
    0xFFFD,
)
_IN_LINE = _PICTURES | {ord("\n"): 0x240A, ord("\t"): 0x2409}
_MARKUP = re.compile(
    r"\\(?=[!-/:-@\[-`{-~]|\Z)"  # escapes what follows
    r"|[`*~]|(?<!\w)_|_(?!\w)"  # code, emphasis
    r"|\](?=[(\[:])"  # a link or an image, and what a link refers to
    r"|<(?=[A-Za-z/!?])|&(?=#?\w+;)"  # HTML
    r"|:(?=//)|(?<=www)\."  # addresses that become links by themselves
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KEPT = re.compile(r"((?<!`)`[^`]+`(?!`)|\*\*)")


def printable(text: str) -> str:
    """Text that steers nothing.

    Control characters become pictures of themselves, and line ends and tabs stay as they are.

    What a model writes may hold any character: some clear a terminal, some turn the text after them
    round.
    """
    return text.translate(_PICTURES)


def one_line(text: str) -> str:
    """The same of a name, a value or a message that is shown in one line.

    Nothing in it begins another line.
    """
    return text.translate(_IN_LINE)


def public_name(text: str) -> str:
    """A Hub id or URL without secrets as it is, and the last part of a path.

    What lies above that part is nobody's business.
    """
    if "://" in text:
        return shown(text)
    if text.startswith(RUN):
        return RUN + Path(text.removeprefix(RUN)).name
    if HUB_NAME.fullmatch(text) and not Path(text).exists():
        return text
    return Path(text).name or text


def show_line(text: str, stream: TextIO | None = None) -> None:
    """One line, whatever is in it; on standard output, where no stream is named."""
    (stream or sys.stdout).write(f"{one_line(text)}\n")


def show_text(text: str, stream: TextIO | None = None) -> None:
    """Lines of our own making, in which what is foreign begins none."""
    (stream or sys.stdout).write(printable(text))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A Markdown table.

    Columns after the first `text_columns` are numbers and stand to the right.
    """
    rule = ["---" if number < text_columns else "---:" for number in range(len(headers))]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in (headers, rule, *rows))


def cell(text: str) -> str:
    """A cell of a Markdown table, of `prose`."""
    return prose(text.replace("\n", " ")).replace("|", "\\|")


def fenced(text: str, language: str = "") -> str:
    """Text as it is, behind a fence longer than any run of backticks inside it.

    Its control characters can be seen.
    """
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}"


def inline(text: Any) -> str:
    """A name or path as inline code, in which Markdown knows nothing."""
    return f"`{one_line(str(text)).replace('`', chr(39)) or ' '}`"


def escaped(text: str) -> str:
    """Text as words of a line of Markdown: no link, image, HTML or code."""
    return _MARKUP.sub(lambda mark: f"\\{mark[0]}", one_line(text))


def prose(text: str) -> str:
    """Sentences for Markdown.

    `code` and **strong** words stay as they are, and of all else only the words stay.
    """
    parts = enumerate(_KEPT.split(one_line(text)))
    return "".join(part if number % 2 else escaped(part) for number, part in parts)
