"""A terminal for tables and bars, which text of others cannot steer."""

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from typing_extensions import override

from .text import printable


class Terminal(Console):
    """A console whose text is printable: only rich itself moves a cursor or sets a colour."""

    def __init__(self, file: IO[str] | None = None, **how: Any) -> None:
        super().__init__(file=file, highlight=False, markup=False, emoji=False, **how)

    @override
    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
