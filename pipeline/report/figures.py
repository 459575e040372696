"""The figures of a report, made from its JSON.

Each is a panel, with a table where it needs one of its own.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ...stages.recipe.kinds import KINDS
from ..printing.numbers import count, percent
from .blocks import Table
from .plots import Bars, Line, Lines, Panel, Stacks, short
from .results import of_classes

LEGEND = {
    "teacher": "teacher",
    "student_before": "before training",
    "baseline": "baseline",
    "student": "student",
}
RARE = 0.005
"""Bins of the reliability diagram with a smaller share of the tokens are in its table only."""
Named = tuple[str, str, Mapping[str, Any]]
"""The name of a curve, its colour, and the train.json that it is of."""
_PARTS = (
    ("loss", "Loss"),
    ("soft", "Divergence"),
    ("hard", "Cross-entropy"),
    ("learning_rate", "Learning rate"),
    ("soft_weight", "Soft weight"),
    ("hard_weight", "Hard weight"),
    ("temperature", "Temperature"),
)


def losses(trained: Sequence[Named], *, of: str = "token") -> list[Panel]:
    """A panel per part of the loss, learning rate and whatever else is scheduled, over tokens.

    Validation is dashed.

    `of`: what the losses are means over, `token` or `text`.
    """
    panels: list[Panel] = []
    trained = [(name, colour, _with_features(train)) for name, colour, train in trained]
    matched = {key for _, _, train in trained for p in train["history"] for key in p["features"]}
    parts = [*_PARTS[:3], *((key, key.replace("_", " ")) for key in sorted(matched)), *_PARTS[3:]]
    for field, title in parts:
        lines = [
            line for name, colour, train in trained for line in _curves(field, name, colour, train)
        ]
        if len({(*line.x, *line.y) for line in lines}) == 1:  # one learning rate for all
            lines = lines[-1:]
        alone = field == "loss" and not any(
            _points("soft", train.get("history") or []) for _, _, train in trained
        )
        if lines and not alone:  # the loss of cross-entropy alone is the cross-entropy
            panels.append(
                Lines(
                    title=title,
                    x="tokens trained on",
                    y=f"nats/{of}" if field in ("loss", "soft", "hard") else "",
                    lines=lines,
                )
            )
    return panels


def _with_features(train: Mapping[str, Any]) -> dict[str, Any]:
    """With what is matched of the features as parts like the others."""
    found = {
        name: [{"features": {}} | p | p.get("features", {}) for p in train.get(name) or []]
        for name in ("history", "validation")
    }
    return {**train, **found}


def _curves(field: str, name: str, colour: str, train: Mapping[str, Any]) -> list[Line]:
    found = []
    for points, what in (
        (train.get("history") or [], ""),
        (train.get("validation") or [], ", validation"),
    ):
        if values := _points(field, points):
            x, y = zip(*values, strict=True)
            found.append(
                Line(name=name + what, colour=colour, x=x, y=y, dashed=bool(what), dots=bool(what))
            )
    return found


def _points(field: str, history: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(point["tokens"], point[field]) for point in history if point.get(field) is not None]


def by_position(arms: Sequence[tuple[str, str, str, Mapping[str, Any]]]) -> Lines | None:
    """The KL (without a teacher's distribution, the cross-entropy) by position in the scored span.

    Args:
        arms: Of each curve its name, colour, arm, and an evaluation's `by_position`.
    """
    lines = []
    for name, colour, arm, about in arms:
        bins = [
            (edge + 1, b)
            for edge, b in zip(about["edges"], about["arms"].get(arm, ()), strict=False)
            if b["tokens"]
        ]
        if bins:
            errors = [b["se"] for _, b in bins]
            spread = [2 * (e or 0.0) for e in errors] if any(errors) else ()
            lines.append(
                Line(
                    name=name,
                    colour=colour,
                    x=[x for x, _ in bins],
                    y=[b["mean"] for _, b in bins],
                    spread=spread,
                    dots=True,
                )
            )
    if not lines or max(len(line.x) for line in lines) < 2:
        return None
    values = [y for line in lines for y in line.y]
    kl = arms[0][3]["measure"] == "kl_teacher"
    title = ("KL to the teacher" if kl else "Cross-entropy") + " by position"
    far = min(values) > 0 and max(values) > 12 * min(values)
    return Lines(
        title=title,
        x="scored token, counted from 1",
        y="nats/token",
        lines=lines,
        log_x=True,
        log_y=far,
    )


def position_names(edges: Sequence[int], bins: int) -> list[str]:
    """The scored tokens that each bin holds, counted from 1."""
    names = []
    for low, high in pairwise(edges[: bins + 1]):
        names.append(str(low + 1) if high == low + 1 else f"{low + 1} to {high}")
    return names


def reliability(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Lines:
    """How often the most likely token is right, by how likely the model says it is.

    Bins that hold next to nothing are left out.
    """
    least = {arm: sum(b["tokens"] for b in bins) * RARE for arm, bins in arms.items()}
    lines = [
        Line(
            name=LEGEND[arm],
            colour=arm,
            x=[b["confidence"] for b in bins if b["tokens"] >= least[arm]],
            y=[b["accuracy"] for b in bins if b["tokens"] >= least[arm]],
            dots=True,
        )
        for arm, bins in arms.items()
    ]
    return Lines(
        title="Reliability",
        x="confidence in the best token",
        y="how often it is right",
        lines=lines,
        diagonal=True,
    )


def distributions(
    views: Mapping[str, Any], measured: Mapping[str, Any]
) -> list[tuple[Panel, Table]]:
    """Histograms of the held-out rows: kept mass, the teacher's entropy and lengths.

    The kept mass by number of entries is among them.
    """
    found: list[tuple[Panel, Table]] = []
    if about := views.get("kept_mass"):
        kept = KINDS[about["kind"]].kept.format(**about)
        what = f"Mass kept ({kept})"
        found.append(
            _histogram(what, "mass of the entries", bins=(about["edges"], about["tokens"]))
        )
    if about := views.get("mass_by_k"):
        found.append(_ladder(about["best"]))
    if about := views.get("entropy"):
        of = measured.get("of", "tokens")
        bins = about["edges"], about["tokens"]
        found.append(_histogram("Entropy of the teacher", "nats", bins=bins, unit=of, merge=4))
    if (about := views.get("lengths")) and sum(c > 0 for c in about["rows"]) > 1:
        of = "tokens of the text" if of_classes(measured) else "scored tokens"
        found.append(_histogram("Lengths", of, bins=(about["edges"], about["rows"]), unit="rows"))
    return found


def _histogram(
    title: str,
    x: str,
    *,
    bins: tuple[Sequence[float], Sequence[int]],
    unit: str = "tokens",
    merge: int = 1,
) -> tuple[Panel, Table]:
    """Shares per bin (edges, counts), empty ends left out.

    `merge` is how many bins the table takes together.
    """
    edges, counts = bins
    there = [n for n, c in enumerate(counts) if c]
    first, last = there[0] // merge * merge, there[-1]
    whole = sum(counts)
    labels = [f"{edge:g}" if edge < 1000 else short(edge) for edge in edges]
    bars = Bars(
        title=title,
        x=x,
        y=f"share of {unit}",
        labels=labels[first : last + 1],
        values=[c / whole for c in counts[first : last + 1]],
        colour="teacher",
    )
    rows = []
    for low in range(first, last + 1, merge):
        high = labels[low + merge] if low + merge < len(labels) else ""
        held = sum(counts[low : low + merge])
        rows.append(
            [
                f"{labels[low]} to {high}" if high else f"{labels[low]} or more",
                count(held),
                percent(held / whole),
            ]
        )
    return bars, Table([x, unit, "share"], rows)


def _ladder(best: Sequence[Mapping[str, Any]]) -> tuple[Panel, Table]:
    line = Line(
        name="teacher",
        colour="teacher",
        x=[b["k"] for b in best],
        y=[b["mass"] for b in best],
        dots=True,
    )
    panel = Lines(
        title="Mass of the best K entries", x="K", y="mean mass", lines=[line], log_x=True
    )
    return panel, Table(["K", "mean mass"], [[count(b["k"]), percent(b["mass"], 2)] for b in best])


def clocks(found: Mapping[str, Mapping[str, float]], parts: Sequence[str]) -> Stacks:
    """The seconds of each stage by what they were spent on."""
    values = [(part, part, [clock.get(part, 0.0) for clock in found.values()]) for part in parts]
    return Stacks(title="Where the time went", x="seconds", labels=list(found), parts=values)
