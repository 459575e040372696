"""Entities that tags mark, and how many of them are found whole.

The measures are precision, recall and F1, with standard errors over prompts.

Tags are those of BIO: B-TYPE begins an entity of a type, I-TYPE goes on with it, O is outside. As
`conlleval` and seqeval (its default mode) read them, an entity begins at a B, and at an I that
follows none of its type; it ends before the next word that does not go on with it. An entity is
found where type, first and last word are all as labelled. With h found, s labelled (support) and a
answered

    precision  h / a        recall  h / s        f1  2 h / (s + a)

over all types together. A share of nothing is 0. A standard error is that of the share made linear
in the texts (delta method), as in `confusion.py`.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Self

import numpy as np

from .confusion import SHARES

_TAG = re.compile(r"O|[BI](-.*)?")
Entity = tuple[str, int, int]
"""Type, and the indices of the first and the last word."""

_RIGHT, _LABELLED, _ANSWERED = range(3)


def are_bio(names: Sequence[str]) -> bool:
    """Whether classes are tags that mark entities."""
    return all(map(_TAG.fullmatch, names)) and any(name.startswith("B") for name in names)


def entities_in(tags: Sequence[str]) -> set[Entity]:
    """The entities of a text."""
    found: set[Entity] = set()
    begun: tuple[str, int] | None = None
    for index, tag in enumerate([*tags, "O"]):
        mark, kind = tag[:1], tag[2:] or "_"
        goes_on = mark == "I" and begun is not None and begun[0] == kind
        if begun is not None and not goes_on:
            found.add((begun[0], begun[1], index - 1))
            begun = None
        if mark != "O" and not goes_on:
            begun = kind, index
    return found


class Entities:
    """Counts of entities by text and type."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._units: dict[bytes, np.ndarray] = defaultdict(lambda: np.zeros(3))
        self._types: dict[str, Counter[int]] = defaultdict(Counter)

    def __len__(self) -> int:
        return len(self._units)

    @classmethod
    def of(cls, names: Sequence[str]) -> Self | None:
        """To count those of classes with these names; None where they mark none."""
        return cls(names) if are_bio(names) else None

    def none_yet(self) -> Self:
        """To count those of the same classes elsewhere."""
        return type(self)(self._names)

    def add(self, unit: bytes, labels: Sequence[int], answers: Sequence[int]) -> None:
        """Count a text of a unit, by the classes of its words in their order."""
        labelled = entities_in([self._names[label] for label in labels])
        answered = entities_in([self._names[answer] for answer in answers])
        for column, found in enumerate((labelled & answered, labelled, answered)):
            self._units[unit][column] += len(found)
            for kind, _, _ in found:
                self._types[kind][column] += 1

    def results(self) -> dict[str, float | None]:
        """`entity_precision`, `entity_recall` and `entity_f1`.

        Those with `_se` are their standard errors over units.
        """
        found: dict[str, float | None] = {}
        for name in SHARES:
            value, parts = self._share(name)
            found |= {f"entity_{name}": value, f"entity_{name}_se": _error(parts)}
        return found

    def minus(self, other: Self) -> dict[str, float | None]:
        """Differences of these shares from those of another arm, with paired errors.

        Both are of the same texts.
        """
        found: dict[str, float | None] = {}
        for name in SHARES:
            (mine, parts), (theirs, others) = self._share(name), other._share(name)
            found[f"entity_{name}"] = mine - theirs
            found[f"entity_{name}_se"] = _error(parts - others)
        return found

    def by_type(self) -> dict[str, dict[str, float]]:
        """`support` and the shares of each type that occurs, by name."""
        found: dict[str, dict[str, float]] = {}
        for kind, counts in sorted(self._types.items()):
            sums = np.array([counts[column] for column in range(3)], np.float64)
            shares = {name: _share_of(name, sums)[0] for name in SHARES}
            found[kind] = {"support": counts[_LABELLED], **shares}
        return found

    def _share(self, name: str) -> tuple[float, np.ndarray]:
        """A share, and how each unit moves it [U]."""
        units = np.stack(list(self._units.values()))
        value, below = _share_of(name, units.sum(axis=0))
        if not below:
            return value, np.zeros(len(units))
        at_label, at_answer = SHARES[name]
        above = (at_label + at_answer) * units[:, _RIGHT]
        of_unit = at_label * units[:, _LABELLED] + at_answer * units[:, _ANSWERED]
        return value, (above - value * of_unit) / below


def _share_of(name: str, sums: np.ndarray) -> tuple[float, float]:
    """A share of sums [3], and what it is a share of."""
    at_label, at_answer = SHARES[name]
    below = float(at_label * sums[_LABELLED] + at_answer * sums[_ANSWERED])
    return (float((at_label + at_answer) * sums[_RIGHT] / below) if below else 0.0), below


def _error(parts: np.ndarray) -> float | None:
    units = len(parts)
    if units < 2:
        return None
    return math.sqrt(units / (units - 1) * float(np.square(parts).sum()))
