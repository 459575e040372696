"""What classifiers take for what.

The section has averages of precision, recall and F1, numbers by class, and confusion matrices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..printing.numbers import count, percent
from ..printing.text import inline
from .blocks import Block, Section, Table, Text
from .results import ARMS, LINES, unit_of

FEW_CLASSES = 12
"""Of which the whole confusion matrix is shown; of more the cells where most is wrong."""
WORST = 20
_SHARES = {"precision": "precision", "recall": "recall", "f1": "F1"}

Cells = Sequence[Sequence[int]]
"""Label, answer, and number of texts."""


def by_class(evaluation: Mapping[str, Any]) -> Section | None:
    """The student's numbers in full, those of the other arms folded.

    None: no text has a label.
    """
    found = evaluation.get("classes")
    if not found or not found["arms"]:
        return None
    names, arms = [inline(name) for name in found["names"]], found["arms"]
    unit = unit_of(evaluation["measured_on"])
    about = (
        f"Precision, recall and F1 of the {unit}s with a label, ± one standard error. Macro is the "
        f"mean over the classes that occur, weighted the mean by their {unit}s. Micro is the "
        f"accuracy in all three, since each {unit} has one class."
    )
    blocks: list[Block] = [Text(about), _averages(evaluation["results"], list(arms))]
    blocks += _entities(evaluation["results"], arms)
    blocks += [
        Section(f"By class: {ARMS[arm]}", _of_arm(arms[arm], names, unit), folded=arm != "student")
        for arm in sorted(arms, key=lambda arm: arm != "student")
    ]
    return Section("By class", blocks)


def _averages(results: Mapping[str, Mapping[str, Any]], arms: Sequence[str]) -> Table:
    measures = [
        (f"{how} {_SHARES[s]}", f"{s}_{how}") for how in ("macro", "weighted") for s in _SHARES
    ]
    rows = [
        [
            LINES[arm],
            *(_shown(results[arm].get(m), results[arm].get(f"{m}_se")) for _, m in measures),
        ]
        for arm in arms
    ]
    return Table(["arm", *(words for words, _ in measures)], rows, strong=ARMS["student"])


def _entities(
    results: Mapping[str, Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]
) -> list[Block]:
    """How many of the entities that the classes mark are found whole.

    The list is empty where they mark none.
    """
    if not any("entities" in numbers for numbers in arms.values()):
        return []
    said = (
        "Entities that the tags mark (BIO), found where type, first and last word are as labelled: "
        "precision, recall and F1 over all of them, ± one standard error over texts."
    )
    overall = [
        [
            LINES[arm],
            *(_shown(results[arm][f"entity_{s}"], results[arm][f"entity_{s}_se"]) for s in _SHARES),
        ]
        for arm in arms
    ]
    types = [
        [inline(kind), LINES[arm], count(one["support"]), *(percent(one[s]) for s in _SHARES)]
        for arm, numbers in arms.items()
        for kind, one in numbers["entities"].items()
    ]
    by_type = Table(["type", "arm", "entities", *_SHARES.values()], types, text_columns=2)
    return [
        Text(said),
        Table(["arm", *_SHARES.values()], overall, strong=ARMS["student"]),
        Section("By type of entity", [by_type], folded=True),
    ]


def _of_arm(numbers: Mapping[str, Any], names: Sequence[str], unit: str) -> list[Block]:
    """The measures of each class, and a table of what was taken for what."""
    shares = [
        [
            name,
            count(numbers["support"][n]),
            *(_shown(numbers[s][n], numbers[f"{s}_se"][n]) for s in _SHARES),
        ]
        for n, name in enumerate(names)
    ]
    table = Table(["class", f"{unit}s", *_SHARES.values()], shares)
    if len(names) > FEW_CLASSES:
        folded = Section(f"All {len(names)} classes", [table], folded=True)
        return [*_worst(numbers, names, unit), folded]
    return [table, _matrix(numbers["confusion"], names)]


def _shown(value: float | None, error: float | None) -> str:
    return percent(value, error=error)


def _matrix(cells: Cells, names: Sequence[str]) -> Table:
    """All labels by all answers."""
    texts = {(label, answer): number for label, answer, number in cells}
    rows = [
        [name, *(count(texts.get((label, answer), 0)) for answer in range(len(names)))]
        for label, name in enumerate(names)
    ]
    return Table(["label, by answer", *names], rows)


def _worst(numbers: Mapping[str, Any], names: Sequence[str], unit: str) -> list[Block]:
    """The wrong answers that are given most often."""
    wrong = sorted(
        (cell for cell in numbers["confusion"] if cell[0] != cell[1]), key=lambda c: -c[2]
    )
    if not wrong:
        return [Text(f"No {unit} was taken for one of another class.")]
    rows = [
        [names[label], names[answer], count(texts), percent(texts / numbers["support"][label])]
        for label, answer, texts in wrong[:WORST]
    ]
    headers = ["label", "answered as", f"{unit}s", "of the label's"]
    said = f"What is taken for what most often: {len(rows)} of {count(len(wrong))} pairs."
    return [Text(said), Table(headers, rows, text_columns=2)]
