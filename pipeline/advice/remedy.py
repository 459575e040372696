"""What an advice asks for: settings that the recipe it is of would accept."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ...stages.recipe.checks.together import check_together
from ...stages.recipe.engines import ENGINES, USUAL_ENTRIES
from ...stages.recipe.kinds import KINDS, Score
from ...stages.recipe.sections import Recipe

DRAWN = "sampled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """One thing to do."""

    changes: Mapping[str, Any]
    """Settings by their dotted paths."""
    without: tuple[str, ...] = ()
    """Settings that are to be removed, for they belong to what is changed."""
    why: str = ""
    """What comes of it, after a comma or semicolon of its own."""

    def words(self) -> str:
        """It as a recipe spells it."""
        found = " and ".join(f"{path}: {value}" for path, value in self.changes.items())
        without = f", without {' and '.join(self.without)}" if self.without else ""
        return found + without + self.why

    def of(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe that follows it."""
        tree = deepcopy(dict(recipe))
        for path in (*self.without, *self.changes):
            *sections, name = path.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place.pop(name, None)
            if path in self.changes:
                place[name] = self.changes[path]
        return tree


def more_entries(
    recipe: Mapping[str, Any], changes: Mapping[str, Any], *, why: str = ""
) -> list[Remedy]:
    """Ways to have more entries; where text is written with fewer, that must keep as many too.

    Of an endpoint no more than the usual entries are asked.
    """
    alone = Remedy(changes=changes, why=why)
    generate = recipe.get("generate") or {}
    remote = any(kind.remote and kind.name == generate.get("engine") for kind in ENGINES)
    if not generate.get("keep") or (remote and changes["score.k"] > USUAL_ENTRIES):
        return [alone]
    too = {"generate.keep.k": changes["score.k"]}
    return [alone, Remedy(changes={**changes, **too}, why=why)]


def draws(recipe: Mapping[str, Any], *, why: str) -> Remedy:
    """Draws in place of entries, without the settings that only entries have."""
    score, fields = recipe["score"], Score.model_fields
    entries = [name for name in KINDS[score["targets"]].settings if name in score]
    gone = [name for name in entries if name not in KINDS[DRAWN].settings]
    without = [f"score.{name}" for name in gone if score[name] != fields[name].default]
    without += ["loss.tail"] if recipe["loss"].get("tail", "bucket") != "bucket" else []
    return Remedy(changes={"score.targets": DRAWN}, without=tuple(without), why=why)


def accepted(recipe: Mapping[str, Any], remedies: Iterable[Remedy]) -> list[Remedy]:
    """Those that the recipe would accept; all, of a recipe that is no longer accepted itself."""
    tried = list(remedies)
    return [one for one in tried if _loads(one.of(recipe))] if _loads(recipe) else tried


def _loads(tree: Mapping[str, Any]) -> bool:
    try:
        return not check_together(Recipe.model_validate(tree))
    except ValidationError:
        return False
