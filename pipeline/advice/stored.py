"""Advice on what the stages have stored.

It is on the mass that a recipe keeps of its teacher, and on rows that were rejected.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ...stages.recipe.kinds import KINDS
from ...storage.tables.kinds import STRUCTURES
from ..printing.numbers import count, percent
from .table import ENOUGH_MASS, MOST_REJECTED, Advice, advice


def stored(recipe: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> Iterator[Advice]:
    """Of each stage what its facts say.

    Args:
        recipe: As records keep it.
        stages: Name -> `rows`, `rejected`, `pending` and `why`; of `score` also `held`
            (`mass.held_mass`) or `kept` (the statistics of its shards), where they are known.
    """
    for name, stage in stages.items():
        if (score := recipe.get("score")) and name.partition("/")[0] == "score":
            yield from _mass(name, stage, score, str(recipe["loss"]["divergence"]))
        yield from _rejects(name, stage)


def _mass(
    name: str, stage: Mapping[str, Any], score: Mapping[str, Any], divergence: str
) -> Iterator[Advice]:
    """Entries that hold too little."""
    held = stage.get("held") or _of_shards(stage, score)
    if held is None or held["mass"] is None or held["mass"] >= ENOUGH_MASS:
        return
    hold = "entry holds" if held["entries"] == 1 else "entries hold"
    numbers = {"entries": f"{held['entries']:g} {hold}", "mass": percent(held["mass"], 0)}
    seen = held.get("positions")
    numbers["measured_on"] = f", on {count(seen)} held-out tokens" if seen else ""
    remedy = _more(score, held.get("enough"), drawn=divergence == "forward_kl")
    yield advice("kept_mass", name, **numbers, remedy=remedy)


def _of_shards(stage: Mapping[str, Any], score: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the shards of this kind say of themselves.

    It is None where some have more entries than the recipe takes.
    """
    if not STRUCTURES[score["targets"]].has_tail:
        return None
    kept = (stage.get("kept") or {}).get(score["targets"])
    if kept is None or kept["entries_per_token"] > score["k"]:
        return None
    return {"entries": kept["entries_per_token"], "mass": kept["kept_mass"]}


def _more(score: Mapping[str, Any], enough: int | None, *, drawn: bool) -> str:
    """What holds more: more entries, or draws where the divergence takes them.

    The mean of draws is the teacher itself.
    """
    found = ["score.targets: sampled, which has the whole teacher as its mean"] if drawn else []
    if enough is not None and enough > score["k"]:
        more = f"score.k: {_rounded_up(enough)}"
        if STRUCTURES[score["targets"]].holds_mass and score["p"] < ENOUGH_MASS:
            more += f" and score.p: {ENOUGH_MASS}"
        found.append(f"{more}, which holds {percent(ENOUGH_MASS, 0)}")
    elif "p" in KINDS[score["targets"]].settings and score["p"] < ENOUGH_MASS:
        found.append(f"score.p: {ENOUGH_MASS}")
    return ", or ".join(found) or f"score.k: {8 * score['k']}, and look again"


def _rounded_up(number: int) -> int:
    """To two digits: what it was estimated from has no more."""
    step: int = 10 ** max(0, int(math.log10(number)) - 1)
    return -(-number // step) * step


def _rejects(name: str, stage: Mapping[str, Any]) -> Iterator[Advice]:
    """More rows rejected than chance rejects."""
    rejected = stage.get("rejected") or 0
    rows = rejected + (stage.get("rows") or 0) + (stage.get("pending") or 0)
    if rejected <= MOST_REJECTED * rows:
        return
    numbers = {"rejected": count(rejected), "rows": count(rows), "share": percent(rejected / rows)}
    why = stage.get("why") or "see `rejects` in the store"
    yield advice("rejects", name, **numbers, why=why.removeprefix(f"{rejected} rejected: "))
