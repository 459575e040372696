"""What a classifier takes for what: a confusion matrix, and measures with standard errors.

The measures are precision, recall and F1. Their errors are over prompts.

Of class c let h_c texts be right (labelled c and answered c), s_c labelled c (its support) and a_c
answered c:

    precision   h_c / a_c
    recall      h_c / s_c
    f1          2 h_c / (s_c + a_c), their harmonic mean

    macro       mean over the classes that occur, as a label or as an answer
    weighted    sum_c s_c / N of the class
    micro       of all classes together; one class a text, so all three are the accuracy

A share of nothing is 0. All as scikit-learn's `classification_report` has them. A standard error is
that of the shares made linear in the texts (delta method), as for the other measures a ratio's is.

Letters: N texts with a label, C classes, U units (prompts).
"""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARES = {"precision": (0, 1), "recall": (1, 0), "f1": (1, 1)}
"""Name -> how often a text is counted below, at its label and at its answer. Above, where it is
right, it is counted as often as both together."""
AVERAGES = ("micro", "macro", "weighted")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, and by how much each text moves it."""

    value: float
    parts: np.ndarray
    """[N] its derivative by the text's weight; they sum to 0."""


class Confusion:
    """Labels and answers of N texts."""

    def __init__(self) -> None:
        self._units: dict[bytes, int] = {}
        self._of, self._labels, self._answers = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._of)

    def add(self, unit: bytes, label: int, answer: int) -> None:
        """Count a text of a unit, which was drawn independently."""
        self._of.append(self._units.setdefault(unit, len(self._units)))
        self._labels.append(label)
        self._answers.append(answer)

    def results(self) -> dict[str, float | None]:
        """The averages by name, `f1_macro` and so on; `_se` is the standard error over units."""
        found: dict[str, float | None] = {}
        for name, estimate in self._averages():
            found |= {name: estimate.value, f"{name}_se": self._error(estimate.parts)}
        return found

    def minus(self, other: "Confusion") -> dict[str, float | None]:
        """Differences of this one's averages from those of another, with paired errors.

        Both are of the same texts.
        """
        found: dict[str, float | None] = {}
        for (name, mine), (_, theirs) in zip(self._averages(), other._averages(), strict=True):
            found[name] = mine.value - theirs.value
            found[f"{name}_se"] = self._error(mine.parts - theirs.parts)
        return found

    def by_class(self, classes: int) -> dict[str, list[float | None]]:
        """`support`, `precision`, `recall` and `f1` of each class, with errors of the shares."""
        support = self._count(self._labels, classes).tolist()
        found: dict[str, list[float | None]] = {"support": support}
        for name in SHARES:
            shares, step = self._shares(name, classes)
            found[name] = shares.tolist()
            found[f"{name}_se"] = [
                self._error(self._parts(name, np.eye(1, classes, number)[0]))
                if step[number]
                else None
                for number in range(classes)
            ]
        return found

    def cells(self) -> list[list[int]]:
        """Label, answer and number of texts, wherever there are some: the confusion matrix."""
        pairs = np.stack([self._labels, self._answers], axis=-1)
        cells, counts = np.unique(pairs, axis=0, return_counts=True)
        found: list[list[int]] = np.column_stack([cells, counts]).tolist()
        return found

    def _averages(self) -> Iterator[tuple[str, Estimate]]:
        labels, answers = np.asarray(self._labels), np.asarray(self._answers)
        texts, classes = len(labels), int(max(labels.max(), answers.max())) + 1
        right = labels == answers
        accuracy = float(right.mean())
        support = self._count(self._labels, classes)
        occurs = support + self._count(self._answers, classes) > 0
        for name in SHARES:
            shares, _ = self._shares(name, classes)
            yield f"{name}_micro", Estimate(accuracy, (right - accuracy) / texts)
            weights = occurs / occurs.sum()
            yield f"{name}_macro", Estimate(float(weights @ shares), self._parts(name, weights))
            weights = support / texts
            mean = float(weights @ shares)
            # The weights move with the texts as well.
            parts = self._parts(name, weights) + (shares[labels] - mean) / texts
            yield f"{name}_weighted", Estimate(mean, parts)

    def _shares(self, name: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """[C] the shares, and what one text more above adds to each."""
        at_label, at_answer = SHARES[name]
        labels, answers = np.asarray(self._labels), np.asarray(self._answers)
        below = at_label * self._count(labels, classes) + at_answer * self._count(answers, classes)
        step = np.divide(1.0, below, out=np.zeros(classes), where=below > 0)
        right = self._count(labels[labels == answers], classes)
        return (at_label + at_answer) * right * step, step

    def _parts(self, name: str, weights: np.ndarray) -> np.ndarray:
        """[N] how each text moves the sum of the shares, weighted [C]."""
        at_label, at_answer = SHARES[name]
        labels, answers = np.asarray(self._labels), np.asarray(self._answers)
        shares, step = self._shares(name, len(weights))
        above, below = weights * step, weights * step * shares
        right = (at_label + at_answer) * (labels == answers)
        parts: np.ndarray = (
            right * above[labels] - at_label * below[labels] - at_answer * below[answers]
        )
        return parts

    def _error(self, parts: np.ndarray) -> float | None:
        units = len(self._units)
        if units < 2:
            return None
        by_unit = np.bincount(np.asarray(self._of), parts, units)
        return math.sqrt(units / (units - 1) * float(np.square(by_unit).sum()))

    def _count(self, of: Any, classes: int) -> np.ndarray:
        return np.bincount(np.asarray(of, np.int64), minlength=classes)
