"""From points to curves, and the plot, as SVG by hand.

A curve gives the bytes at which a family is as good as another's setting.

Sizes of the formats of others, bytes per token at a vocabulary of 50,257 (16 bits per id), without
token ids, tail or the token's own log probability: DistillKit (16 exact_k + 32 terms + 16 K bits),
bf16 values and 16-bit ids, Megatron (5 bytes per entry before zstd, about 3 after).
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

PEERS = {
    "K=50": {"DistillKit": 114, "bf16 values and ids": 200, "Megatron, zstd": 150},
    "K=128": {"DistillKit": 312, "bf16 values and ids": 512, "Megatron, zstd": 381},
}
COLOURS = {
    "topk": "#1b6ca8",
    "topp": "#2a9d63",
    "threshold": "#7a52a1",
    "multinomial": "#d98c1f",
    "systematic": "#b5322a",
}
Point = dict[str, Any]


def metrics(points: list[Point]) -> dict[str, dict[str, float]]:
    """The value of each metric by point name. The less it is, the better."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for point in points:
        name = name_of(point)
        if point["kept_mass"] is not None:
            found["bucket KL: gap to the full KL, nats"][name] = abs(point["kl_bias"])
        for tokens, value in point["kl_rms"].items():
            found[f"KL of {tokens} tokens: rms error, nats"][name] = value
        found["squared error of the target"][name] = point["squared_error"]
        for tokens, (angle, _) in point["gradient"].items():
            found[f"gradient over {tokens} tokens: angle, degrees"][name] = angle
    return found


def name_of(point: Point) -> str:
    """Family, setting and bits."""
    return f"{point['family']} {point['setting']} {point['bits']} bits"


def families(
    points: list[Point], values: dict[str, float]
) -> dict[str, list[tuple[float, float, str]]]:
    """(bytes, value, setting) of each family and number of bits, by bytes.

    A family needs two points.
    """
    found: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for point in points:
        if name_of(point) in values:
            curve = f"{point['family']}, {point['bits']} bits"
            found[curve].append((point["bytes"], values[name_of(point)], point["setting"]))
    return {name: sorted(curve) for name, curve in found.items() if len(curve) > 1}


def bytes_at(curve: list[tuple[float, float, str]], value: float) -> tuple[float, bool] | None:
    """Bytes at which a curve comes down to a value, between its points in logarithms.

    True beside it: its first point is better already, so it is at most that. None: it does not come
    down so far.
    """
    if curve[0][1] <= value:
        return curve[0][0], True
    for (less, worse, _), (more, better, _) in pairwise(curve):
        if better <= value < worse:
            share = (math.log(worse) - math.log(value)) / (math.log(worse) - math.log(better))
            return math.exp(math.log(less) + share * (math.log(more) - math.log(less))), False
    return None


def verdicts(
    points: list[Point], dropped: dict[str, Any]
) -> tuple[list[str], list[dict[str, Any]]]:
    """A table of every point, and the findings.

    They are, by metric, the bytes of the best family that is as good as top-50 and top-128.
    """
    lines = list(_table(points))
    for name, gradient in dropped.items():
        angles = ", ".join(
            f"{angle:.1f} at {tokens} tokens" for tokens, (angle, _) in gradient.items()
        )
        lines.append(f"{name}: angle of its gradient {angles}")
    lines += [
        "",
        "| as good as | in | bytes/token | best | needs | share | of DistillKit | half or less |",
    ]
    lines.append("| --- | --- | ---: | --- | ---: | ---: | ---: | --- |")
    found = []
    sizes = {name_of(point): point["bytes"] for point in points}
    for metric, values in metrics(points).items():
        curves = families(points, values)
        for setting, peers in PEERS.items():
            name = f"topk {setting} 10 bits"
            reached = {curve: bytes_at(line, values[name]) for curve, line in curves.items()}
            best = min((at, curve) for curve, at in reached.items() if at is not None)
            (needed, bound), curve = best
            share = needed / sizes[name]
            found.append(
                {
                    "as_good_as": setting,
                    "metric": metric,
                    "value": values[name],
                    "bytes": sizes[name],
                    "best": curve,
                    "needs": needed,
                    "at_most": bound,
                    "share": share,
                    "share_of_peers": {peer: needed / size for peer, size in peers.items()},
                    "all": {curve: None if at is None else at[0] for curve, at in reached.items()},
                }
            )
            asked = f"| {setting} | {metric} {values[name]:.3g} | {sizes[name]:.1f} | {curve} "
            of_peer, half = needed / peers["DistillKit"], "yes" if share <= 0.5 else "NO"
            ratios = f"{share:.2f} | {of_peer:.2f} | {half} |"
            lines.append(f"{asked}| {'<= ' * bound}{needed:.1f} | {ratios}")
    return lines, found


def _table(points: list[Point]) -> Iterator[str]:
    batches = list(next((p["gradient"] for p in points if p["gradient"]), {}))
    angles = "".join(f" angle, {n} tokens |" for n in batches)
    yield (
        "| kind | setting | bits | entries | bytes/token | squared error | KL gap "
        f"| rms KL error (4096) |{angles}"
    )
    yield "| --- | --- |" + " ---: |" * (6 + len(batches))
    for p in points:
        angles = "".join(
            f" {p['gradient'][n][0]:.2f} |" if n in p["gradient"] else " |" for n in batches
        )
        yield (
            f"| {p['family']} | {p['setting']} | {p['bits']} | {p['entries']:.1f} | "
            f"{p['bytes']:.1f} | {p['squared_error']:.5f} | {p['kl_bias']:.4f} | "
            f"{p['kl_rms']['4096']:.4f} |{angles}"
        )


WIDTH, HEIGHT, LEFT, TOP = 440, 330, 70, 46


def plot(points: list[Point]) -> str:
    """Three panels over bytes/token, both axes in logarithms.

    They show gradient angle, KL error of a batch, and squared error.

    Rings are the formats of others, as if their values were exact: top-50 and top-128 at their
    size.
    """
    at_ten = [point for point in points if point["bits"] == 10]
    chosen = [name for name in metrics(points) if "gradient" in name][-1:]
    chosen += ["KL of 4096 tokens: rms error, nats", "squared error of the target"]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {len(chosen) * WIDTH} {HEIGHT + 34}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, metric in enumerate(chosen):
        values = metrics(at_ten)[metric]
        parts += _panel(families(at_ten, values), metric, number * WIDTH)
    for number, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + number * 150
        parts.append(f'<rect x="{x}" y="{HEIGHT + 10}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{HEIGHT + 17}">{name}</text>')
    letters = "; ".join(f"{peer[0].upper()} {peer}" for peer in PEERS["K=50"])
    parts.append(f'<text x="{LEFT + len(COLOURS) * 150}" y="{HEIGHT + 17}">rings: {letters}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    curves: dict[str, list[tuple[float, float, str]]], title: str, left: int
) -> Iterator[str]:
    xs = [x for curve in curves.values() for x, _, _ in curve]
    ys = [max(y, 1e-9) for curve in curves.values() for _, y, _ in curve]

    def place(value: float, values: list[float], start: float, stop: float) -> float:
        low, high = math.log(min(values)) - 0.08, math.log(max(values)) + 0.08
        return start + (math.log(max(value, 1e-9)) - low) / (high - low) * (stop - start)

    def at(x: float, y: float) -> tuple[float, float]:
        across = place(x, xs, left + LEFT, left + WIDTH - 16)
        return round(across, 1), round(place(y, ys, HEIGHT - TOP, TOP), 1)

    yield f'<text x="{left + LEFT}" y="24" font-weight="bold">{title}</text>'
    box = f'x="{left + LEFT}" y="{TOP}" width="{WIDTH - 16 - LEFT}" height="{HEIGHT - 2 * TOP}"'
    yield f'<rect {box} fill="none" stroke="#999"/>'
    for value in _ticks(min(xs), max(xs)):
        x, _ = at(value, min(ys))
        yield f'<path d="M{x} {TOP}V{HEIGHT - TOP}" stroke="#e4e4e4"/>'
        yield f'<text x="{x}" y="{HEIGHT - TOP + 16}" text-anchor="middle">{value:g}</text>'
    for value in _ticks(min(ys), max(ys)):
        _, y = at(min(xs), value)
        yield f'<path d="M{left + LEFT} {y}H{left + WIDTH - 16}" stroke="#e4e4e4"/>'
        yield f'<text x="{left + LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>'
    middle = left + (LEFT + WIDTH) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">bytes/token</text>'
    for name, curve in curves.items():
        colour = COLOURS[name.split(",")[0]]
        line = " ".join(f"{x},{y}" for x, y in (at(size, value) for size, value, _ in curve))
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for size, value, setting in curve:
            x, y = at(size, value)
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
            label = setting.split("=")[1]
            yield f'<text x="{x + 4}" y="{y - 5}" font-size="9" fill="{colour}">{label}</text>'
            for peer, other in PEERS.get(setting, {}).items():
                x, y = at(other, value)
                if min(xs) <= other <= max(xs):
                    yield f'<circle cx="{x}" cy="{y}" r="4" fill="none" stroke="#444"/>'
                    label = peer[0].upper()
                    at_ring = f'x="{x}" y="{y - 8}" font-size="8" text-anchor="middle"'
                    yield f"<text {at_ring}>{label}</text>"


def _ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    return [s * 10.0**p for p in powers for s in steps if low * 0.95 <= s * 10.0**p <= high * 1.05]
