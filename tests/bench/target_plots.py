"""The experiment's plots, as SVG by hand: an arm per line, and angle against batch size."""

import math
from collections.abc import Iterator
from typing import Any

WIDTH, LEFT, TOP, LINE = 420, 170, 44, 20
COLOURS = {
    "ce": "#666666",
    "full": "#111111",
    "drop": "#b5322a",
    "bucket": "#1b6ca8",
    "to_label": "#7a52a1",
    "multinomial": "#d98c1f",
    "systematic": "#2a9d63",
}
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" '
    'font-family="sans-serif" font-size="12">'
    '<rect width="100%" height="100%" fill="white"/>'
)


def colour(name: str) -> str:
    """The colour of an arm, which is that of its tail or way of drawing."""
    return COLOURS.get(name.rpartition("-")[2], "#444444")


def plot_arms(arms: dict[str, dict[str, Any]]) -> str:
    """Two panels, with a line per arm.

    They show the share of the gap with its interval over seeds, and the calibration error.
    """
    names = sorted(arms, key=lambda name: -(arms[name]["share"] or (0.0, None))[0])
    height = TOP + LINE * len(names) + 44
    parts = [HEAD.format(LEFT + 2 * WIDTH, height)]
    for row, name in enumerate(names):
        y = TOP + LINE * row + LINE / 2
        parts.append(
            f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end" '
            f'fill="{colour(name)}">{name}</text>'
        )
    for number, (measure, title, factor) in enumerate(
        (
            ("share", "share of the gap from ce to full, %", 1.0),
            ("ece", "expected calibration error, %", 100.0),
        )
    ):
        values = [[factor * x for x in _ends(arms[name][measure])] for name in names]
        parts += _dots(names, values, title=title, left=LEFT + number * WIDTH)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ends(value: tuple[float, float | None] | None) -> list[float]:
    """Mean, low end, high end; nothing if it is not there."""
    return (
        []
        if value is None
        else [value[0], value[0] - (value[1] or 0.0), value[0] + (value[1] or 0.0)]
    )


def _dots(names: list[str], values: list[list[float]], *, title: str, left: float) -> Iterator[str]:
    means = [value[0] for value in values if value]
    if not means:
        return
    span = max(max(means) - min(0.0, *means), 1e-9)
    low, high = (
        min(0.0, *means) - 0.1 * span,
        max(means) + 0.15 * span,
    )  # intervals may be cut, means are not

    def across(value: float) -> float:
        return round(left + (min(max(value, low), high) - low) / (high - low) * (WIDTH - 30), 1)

    bottom = TOP + LINE * len(names)
    yield f'<text x="{left}" y="24" font-weight="bold">{title}</text>'
    for tick in _even(low, high):
        x = across(tick)
        yield f'<path d="M{x} {TOP}V{bottom}" stroke="{"#999" if tick == 0 else "#e4e4e4"}"/>'
        yield f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        if value:
            y, fill = TOP + LINE * row + LINE / 2, colour(name)
            line = f"M{across(value[1])} {y}H{across(value[2])}"
            yield f'<path d="{line}" stroke="{fill}" stroke-width="2"/>'
            yield f'<circle cx="{across(value[0])}" cy="{y}" r="4" fill="{fill}"/>'


def _even(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 8)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def plot_angles(found: dict[str, Any]) -> str:
    """A panel per point of the training, both axes in logarithms.

    It shows degrees against tokens of the batch.
    """
    height, left = 400, 56
    parts = [HEAD.format(len(found) * WIDTH + 40, height)]
    values = [v for of in found.values() for line in of["angle"].values() for v in line if v > 0]
    low, high = min(values) * 0.9, max(values) * 1.1
    for number, (point, of) in enumerate(found.items()):
        start, stop = number * WIDTH + left, (number + 1) * WIDTH - 70
        first, last = math.log(of["tokens"][0]), math.log(of["tokens"][-1] * 1.001)

        def at(
            tokens: float, angle: float, ends: tuple[float, ...] = (start, stop, first, last)
        ) -> tuple[float, float]:
            begin, end, least, most = ends
            x = begin + (math.log(tokens) - least) / (most - least) * (end - begin)
            share = (math.log(max(angle, low)) - math.log(low)) / (math.log(high) - math.log(low))
            return round(x, 1), round(height - 50 - share * (height - 50 - TOP), 1)

        parts.append(
            f'<text x="{start}" y="24" font-weight="bold">{point}: angle, degrees, '
            "by tokens of the batch</text>"
        )
        for tokens in of["tokens"]:
            x, y = at(tokens, low)
            parts.append(f'<path d="M{x} {TOP}V{y}" stroke="#e4e4e4"/>')
            parts.append(
                f'<text x="{x}" y="{y + 16}" text-anchor="middle">{tokens / 1024:.0f}k</text>'
            )
        for tick in [
            t * 10.0**p for p in range(-3, 3) for t in (1, 2, 5) if low <= t * 10.0**p <= high
        ]:
            (x, y), (end, _) = at(of["tokens"][0], tick), at(of["tokens"][-1], tick)
            parts.append(f'<path d="M{x} {y}H{end}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
        for name, angles in of["angle"].items():
            places = [at(tokens, angle) for tokens, angle in zip(of["tokens"], angles, strict=True)]
            line = " ".join(f"{x},{y}" for x, y in places)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour(name)}" '
                'stroke-width="1.5"/>'
            )
            x, y = places[-1]
            label = name.partition("-")[0].replace("sampled", "N=").replace("top", "K=")
            parts.append(
                f'<text x="{x + 4}" y="{y + 3}" font-size="9" fill="{colour(name)}">{label}</text>'
            )
    for number, name in enumerate(("drop", "bucket", "to_label", "multinomial", "systematic")):
        x = left + number * 120
        parts.append(
            f'<rect x="{x}" y="{height - 14}" width="14" height="4" fill="{COLOURS[name]}"/>'
        )
        parts.append(f'<text x="{x + 20}" y="{height - 8}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
