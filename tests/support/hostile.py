"""A text that does all it can wherever it is shown, and how to see whether it could."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

FORGED = (
    "x\x1b[2J\x1b]0;title\x07\r\nerror: forged\x08\x7f\x9b31m\u202e\u2066\u2028error: again\u2029"
    "<img src=x onerror=alert(1)>![i](http://e.org/i.png)[l](http://e.org)[r]: http://e.org\n\n"
    "</script><script>alert(2)</script>`|`**b**\n```\n<b>http://e.org &lt;"
)
FORGED_NAME = FORGED.replace("/", "\\")
"""The same without what no name of a file can have."""
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def assert_shown(*texts: str, errors: int = 0) -> None:
    """Nothing in them steers a terminal, and no more lines than these begin as an error of ours."""
    for text in texts:
        assert STEERING.findall(text) == []
    lines = [line for text in texts for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == errors, lines


def active(markdown: str) -> list[str]:
    """What of a Markdown text is more than words, code, tables and headings."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    kinds = ("html_block", "html_inline", "image", "link_open")
    return [
        f"{t.type} {t.content or t.attrs}" for t in _all(parser.parse(markdown)) if t.type in kinds
    ]


def _all(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _all(token.children or [])


class Tags(HTMLParser):
    """The elements of a page, and the attributes of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
