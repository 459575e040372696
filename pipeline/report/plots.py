"""Plots of a report: lines and bars by matplotlib, as SVG.

They lie inside a page and follow its colours.

Colours are names of CSS variables (`--student`, `--ink` ...), so that one drawing serves light and
dark; text is text.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ..printing.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 440, 264
"""Of a panel, CSS pixels at its natural size."""
_DPI = 72
_COLOURS = ["ink", "soft-ink", "grid", "teacher", "student_before", "baseline", "student"]
_COLOURS += ["start", "model", "tokenizer", "disk", "other", *(f"run-{n}" for n in range(6))]
# No other colour of matplotlib's is so dark: each stands for one variable, and is replaced by it in
# the drawing.
_STANDS_FOR = {name: f"#0000{number + 1:02x}" for number, name in enumerate(_COLOURS)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve; `spread` is drawn as a band around it."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Curves over a common axis."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    diagonal: bool = False
    """Both axes from 0 to 1 with the line of equality."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """A histogram: a bar per label."""

    title: str
    x: str
    y: str
    labels: Sequence[str]
    values: Sequence[float]
    colour: str = "student"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacks:
    """Horizontal bars made of parts: (name, colour, a value per label)."""

    title: str
    x: str
    labels: Sequence[str]
    parts: Sequence[tuple[str, str, Sequence[float]]] = field(default=())


Panel = Lines | Bars | Stacks


def legend(panel: Panel) -> list[tuple[str, str, bool]]:
    """(name, colour, dashed) of what needs a name."""
    if isinstance(panel, Lines):
        found = [(line.name, line.colour, line.dashed) for line in panel.lines]
        return [*found, ("perfect calibration", "soft-ink", True)] if panel.diagonal else found
    return (
        [(name, colour, False) for name, colour, _ in panel.parts]
        if isinstance(panel, Stacks)
        else []
    )


def svg(panel: Panel) -> str:
    """The panel as an `<svg>` element; its legend is the page's."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    height = HEIGHT if not isinstance(panel, Stacks) else 76 + 26 * len(panel.labels)
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "stillroom",
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "text.color": _STANDS_FOR["ink"],
        "axes.labelcolor": _STANDS_FOR["soft-ink"],
        "axes.edgecolor": _STANDS_FOR["grid"],
        "xtick.color": _STANDS_FOR["grid"],
        "ytick.color": _STANDS_FOR["grid"],
        "xtick.labelcolor": _STANDS_FOR["soft-ink"],
        "ytick.labelcolor": _STANDS_FOR["soft-ink"],
        "grid.color": _STANDS_FOR["grid"],
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "path.simplify": True,
    }
    with mpl.rc_context():
        mpl.rcdefaults()  # not the user's style
        mpl.rcParams.update(settings)
        figure = Figure(
            figsize=(WIDTH / _DPI, height / _DPI), dpi=_DPI, layout="constrained", facecolor="none"
        )
        axes = figure.add_subplot(facecolor="none")
        if isinstance(panel, Lines):
            _draw_lines(axes, panel)
        elif isinstance(panel, Bars):
            _draw_bars(axes, panel)
        else:
            _draw_stacks(axes, panel)
        drawn = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(drawn, metadata=metadata)  # `savefig` draws all twice
    return _inline(drawn.getvalue(), panel.title)


def _draw_lines(axes: "Axes", panel: Lines) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if panel.diagonal:
        axes.plot([0, 1], [0, 1], color=_STANDS_FOR["soft-ink"], linewidth=1, linestyle=(0, (3, 3)))
        axes.set(xlim=(0, 1), ylim=(0, 1))
    for line in panel.lines:
        colour: Any = _STANDS_FOR[line.colour]
        if line.spread:
            low, high = (
                [y + sign * s for y, s in zip(line.y, line.spread, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(line.x, low, high, color=colour, alpha=0.18, linewidth=0)
        style: Any = (0, (4, 2)) if line.dashed else "-"
        marker = "o" if line.dots or len(line.x) == 1 else ""
        axes.plot(line.x, line.y, color=colour, linestyle=style, marker=marker, markersize=3.5)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.grid(axis="y")
    if panel.log_x:
        axes.set_xscale("log", base=2)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    if panel.log_y:
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if not panel.log_y:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _draw_bars(axes: "Axes", panel: Bars) -> None:
    from matplotlib.ticker import FuncFormatter

    places = range(len(panel.labels))
    axes.bar(places, panel.values, width=0.86, color=_STANDS_FOR[panel.colour])
    step = max(1, -(-len(panel.labels) // 9))
    axes.set_xticks([p - 0.5 for p in places[::step]], _plain(panel.labels[::step]))
    axes.set(xlabel=panel.x, ylabel=panel.y, xlim=(-0.7, len(panel.labels) - 0.3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.grid(axis="y")


def _draw_stacks(axes: "Axes", panel: Stacks) -> None:
    from matplotlib.ticker import FuncFormatter

    places = range(len(panel.labels))
    left = [0.0] * len(panel.labels)
    for _, colour, values in panel.parts:
        axes.barh(places, values, left=left, height=0.68, color=_STANDS_FOR[colour])
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(places, _plain(panel.labels))
    axes.set(xlabel=panel.x)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.grid(axis="x")


def _plain(labels: Sequence[str]) -> list[str]:
    """Names, in which a dollar sign begins no formula."""
    return [one_line(label).replace("$", r"\$") for label in labels]


def short(value: float) -> str:
    """A number on an axis: 200000 is 200k."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}".replace("e-0", "e-")


def _inline(drawn: str, title: str) -> str:
    """An SVG file of matplotlib's as an element of a page.

    Its colours are variables, its font is the page's, and its size fits its box.
    """
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--sans)", drawn)
    for name, colour in _STANDS_FOR.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    drawn = re.sub(r"\s+", " ", drawn).replace("> <", "><")
    # Many drawings share a page: ids of one are not those of another.
    prefix = "p" + sha256(f"{title} {drawn}".encode()).hexdigest()[:8]
    drawn = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', drawn)
    drawn = re.sub(r'(xlink:href="#|url\(#)([^")]+)', rf"\1{prefix}-\2", drawn)
    opening = re.search(r'viewBox="([^"]+)"', drawn)
    assert opening is not None
    body = drawn[drawn.index(">") + 1 :]
    named = title.replace("&", "&amp;").replace("<", "&lt;")
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" role="img" viewBox="{opening[1]}">'
    return f"{head}<title>{named}</title>{body.strip()}"
