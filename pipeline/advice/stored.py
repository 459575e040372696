"""Advice on what the stages have stored.

It is on the mass that a recipe keeps of its teacher, and on rows that were rejected.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ...stages.recipe.kinds import KINDS
from ...storage.tables.kinds import STRUCTURES
from ..printing.numbers import count, percent
from .remedy import Remedy, accepted, draws, more_entries
from .table import ENOUGH_MASS, MOST_REJECTED, Advice, advice


def stored(recipe: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> Iterator[Advice]:
    """Of each stage what its facts say.

    Args:
        recipe: As records keep it.
        stages: Name -> `rows`, `rejected`, `pending` and `why`; of `score` also `held`
            (`mass.held_mass`) or `kept` (the statistics of its shards), where they are known.
    """
    for name, stage in stages.items():
        if recipe.get("score") and name.partition("/")[0] == "score":
            yield from _mass(name, stage, recipe)
        yield from _rejects(name, stage)


def _mass(name: str, stage: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[Advice]:
    """Entries that hold too little."""
    held = stage.get("held") or _of_shards(stage, recipe["score"])
    if held is None or held["mass"] is None or held["mass"] >= ENOUGH_MASS:
        return
    hold = "entry holds" if held["entries"] == 1 else "entries hold"
    numbers = {"entries": f"{held['entries']:g} {hold}", "mass": percent(held["mass"], 0)}
    seen = held.get("positions")
    numbers["measured_on"] = f", on {count(seen)} held-out tokens" if seen else ""
    remedy = _more(recipe, held.get("enough"))
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


def _more(recipe: Mapping[str, Any], enough: int | None) -> str:
    """What holds more: more entries, or draws where the divergence takes them.

    The mean of draws is the teacher itself.
    """
    score = recipe["score"]
    mean = ", which has the whole teacher as its mean"
    found = accepted(recipe, [draws(recipe, why=mean)])
    wider = "p" in KINDS[score["targets"]].settings and score["p"] < ENOUGH_MASS
    mass = {"score.p": ENOUGH_MASS} if wider else {}
    if enough is not None and enough > score["k"]:
        holds = f", which holds {percent(ENOUGH_MASS, 0)}"
        more = {"score.k": _rounded_up(enough)} | mass
        found += accepted(recipe, more_entries(recipe, more, why=holds))[:1]
    elif mass:
        found += accepted(recipe, [Remedy(changes=mass)])
    again = more_entries(recipe, {"score.k": 8 * score["k"]}, why=", and look again")
    found = found or accepted(recipe, again)[:1]
    return ", or ".join(one.words() for one in found) or "score.k as high as it can be had"


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
