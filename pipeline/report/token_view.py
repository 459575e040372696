"""Rows token by token: what teacher and students say at each token.

They are drawn for a page, for Markdown and for a terminal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp
from typing import TYPE_CHECKING, Any

from ..printing.numbers import decimals
from ..printing.text import inline, printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

TEACHER = "teacher"
DARK, HOT = (38, 36, 33), (232, 93, 47)
"""Red, green and blue behind a token at which a model is not off at all, and far off, on a
terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What a model says at one position."""

    token: float
    """Probability of the token that is there."""
    best: Sequence[tuple[str, float]]
    """Its best tokens as text, with probabilities."""
    kl: float | None = None
    """nats, of the teacher from it; None: it is the teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """One scored token."""

    index: int
    """In the row's token ids."""
    text: str
    before: str
    """Unscored text between the token before and this one; what precedes the first is the row's."""
    said: Mapping[str, Said]
    """By model: `teacher` and the arms."""

    def distance(self, arm: str) -> float:
        """KL of the teacher from an arm, nats; 0 of the teacher itself."""
        return self.said[arm].kl or 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """One row: what stands before its first scored token, and the scored tokens."""

    key: str
    before: str
    positions: Sequence[Position]
    cut_before: int = 0
    """Tokens before that are not shown."""
    cut_after: int = 0
    """Scored tokens that are not shown."""
    arms: Sequence[str] = field(default=())
    """Of whom there is a KL, the trained student first."""


def rows_of(evaluation: Mapping[str, Any]) -> list[TokenRow]:
    """The rows that an evaluation holds token by token.

    One without a teacher's distribution holds none.
    """
    views = evaluation.get("views") or {}
    pieces = views.get("pieces", {})
    return [_row(row, pieces) for row in views.get("rows", [])]


def _row(row: Mapping[str, Any], pieces: Mapping[str, str]) -> TokenRow:
    parties = {TEACHER: row["teacher"], **row["arms"]}
    start = row["cut_before"] + len(row["before"])
    gaps = {gap["after"]: gap for gap in row.get("between", ())}
    # Unscored tokens up to each scored one, the first gap aside.
    passed = accumulate(
        gaps[n]["cut"] + len(gaps[n]["token_ids"]) if n in gaps else 0
        for n in range(len(row["token_ids"]))
    )
    positions = [
        Position(
            index=start + unscored + n,
            text=pieces[str(token)],
            before=_between(gaps[n], pieces) if n in gaps else "",
            said={name: _said(party, n, pieces) for name, party in parties.items()},
        )
        for n, (token, unscored) in enumerate(zip(row["token_ids"], passed, strict=True))
    ]
    first = ("student", "baseline", "student_before")
    return TokenRow(
        key=row["key"],
        before="".join(pieces[str(token)] for token in row["before"]),
        positions=positions,
        cut_before=row["cut_before"],
        cut_after=row["cut_after"],
        arms=[arm for arm in first if arm in row["arms"]],
    )


def _between(gap: Mapping[str, Any], pieces: Mapping[str, str]) -> str:
    text = "".join(pieces[str(token)] for token in gap["token_ids"])
    return f"\u2026 {text}" if gap["cut"] else text


def _said(party: Mapping[str, Any], n: int, pieces: Mapping[str, str]) -> Said:
    best = zip(party["ids"][n], party["probabilities"][n], strict=True)
    kl = party["kl"][n] if "kl" in party else None
    return Said(token=party["token"][n], best=[(pieces[str(i)], p) for i, p in best], kl=kl)


def shade(nats: float) -> float:
    """0 to 1, how strongly a token is coloured: 1 - exp(-nats).

    So it is half at 0.7 nats, and nearly all at 3.
    """
    return 1 - exp(-max(nats, 0.0))


def visible(text: str) -> str:
    """A token in a table: its spaces, line ends and control characters can be seen."""
    return (
        printable(text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5"))
        or "\u2205"
    )


def code(text: str) -> str:
    """A token for Markdown, where it can mean nothing."""
    return inline(visible(text))


def best_of(said: Said, entries: int) -> str:
    """The best tokens in one line of Markdown."""
    return ", ".join(f"{code(text)} {decimals(p, 3)}" for text, p in said.best[:entries])


def fitting(best: Sequence[tuple[str, ...]], width: int) -> str:
    """As many of the best as fit into `width` columns, one at least; each a text and numbers."""
    from rich.cells import cell_len, set_cell_size

    line = ""
    for text, *numbers in best:
        longer = (
            f"{line}  {' '.join([visible(text), *numbers])}"
            if line
            else " ".join([visible(text), *numbers])
        )
        if line and cell_len(longer) > width:
            break
        line = longer
    return line if cell_len(line) <= width else set_cell_size(line, width - 1) + "\u2026"


def worst(row: TokenRow, arm: str, many: int) -> list[Position]:
    """The positions at which an arm is farthest off, farthest first."""
    return sorted(row.positions, key=lambda position: -position.distance(arm))[:many]


def drawn(row: TokenRow, *, columns: int, colours: bool) -> list["RenderableType"]:
    """A row for a terminal `columns` wide: its text, then a line per scored token.

    The text is coloured by the first arm's KL.

    `colours`: False for a pipe; the text is plain there.
    """
    from rich.text import Text

    arm = row.arms[0]
    shown: list[tuple[str, float | None]] = [(row.before, None)]
    for position in row.positions:
        shown += [(position.before, None), (position.text, position.distance(arm))]
    text = coloured(shown, colours=colours)
    parts: list[RenderableType] = [text, Text(""), _table(row, arm, (columns - 30) // 2)]
    if row.cut_after:
        parts.append(Text(f"({row.cut_after} more scored tokens are not shown)"))
    return parts


def coloured(parts: Sequence[tuple[str, float | None]], *, colours: bool) -> "Text":
    """Running text for a terminal: its parts, each with the nats that colour it.

    A part with None is not scored.
    """
    from rich.text import Text

    if not colours:
        return Text(printable("".join(text for text, _ in parts)))
    found = Text()
    for text, nats in parts:
        if nats is None:
            found.append(printable(text), style="dim")
            continue
        strength = shade(nats)
        colour = ",".join(
            str(round(dark + (hot - dark) * strength)) for dark, hot in zip(DARK, HOT, strict=True)
        )
        found.append(
            printable(text), style=f"{'#000000' if strength > 0.8 else '#ffffff'} on rgb({colour})"
        )
    return found


def _table(row: TokenRow, arm: str, width: int) -> "RenderableType":
    """`width`: characters of a column of best tokens."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("index", justify="right", no_wrap=True)
    table.add_column("token", no_wrap=True, max_width=12, overflow="ellipsis")
    table.add_column("KL", justify="right", no_wrap=True)
    for name in ("the teacher's best", "the student's best"):
        table.add_column(name, no_wrap=True, max_width=width, overflow="ellipsis")
    for position in row.positions:
        entries = [
            [(text, decimals(p, 3)) for text, p in position.said[name].best]
            for name in (TEACHER, arm)
        ]
        best = [Text(fitting(found, width)) for found in entries]
        table.add_row(
            str(position.index),
            Text(visible(position.text)),
            decimals(position.distance(arm), 3),
            *best,
        )
    return table
