"""Entities against an independent reading of the tags, and seqeval; errors against resampling."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.stages.evaluate.by_class.entities import Entities, are_bio, entities_in

FIXTURES = Path(__file__).parents[2] / "fixtures"
OTHERS = json.loads((FIXTURES / "metrics" / "others.json").read_text())
"""What seqeval says of random answers; `made_by.py` beside it asks."""
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def by_definition(tags: list[str]) -> set[tuple[str, int, int]]:
    """The stretches of words that are an entity, of all stretches.

    An entity begins at its first word, goes on all through, and ends at its last.

    It begins at its first word, goes on all through, and ends at its last.
    """
    found = set()
    for first in range(len(tags)):
        kind = tags[first].partition("-")[2]
        before = tags[first - 1] if first else "O"
        begins = tags[first] == f"B-{kind}" or (
            tags[first] == f"I-{kind}" and before not in (f"B-{kind}", f"I-{kind}")
        )
        for last in range(first, len(tags)):
            inside = all(tag == f"I-{kind}" for tag in tags[first + 1 : last + 1])
            ends = last + 1 == len(tags) or tags[last + 1] != f"I-{kind}"
            if tags[first] != "O" and begins and inside and ends:
                found.add((kind, first, last))
    return found


def texts(seed: int, count: int = 40) -> list[tuple[list[int], list[int]]]:
    """Labels and answers of texts; two answers of three are right."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        labels = rng.integers(0, len(TAGS), int(rng.integers(1, 12)))
        answers = np.where(rng.random(len(labels)) < 2 / 3, labels, rng.integers(0, 5, len(labels)))
        found.append((labels.tolist(), answers.tolist()))
    return found


def counted(pairs: list[tuple[list[int], list[int]]], texts_a_unit: int = 1) -> Entities:
    found = Entities(TAGS)
    for number, (labels, answers) in enumerate(pairs):
        found.add((number // texts_a_unit).to_bytes(4, "big"), labels, answers)
    return found


def named(numbers: list[int]) -> list[str]:
    return [TAGS[number] for number in numbers]


def test_by_hand() -> None:
    tags = ["B-PER", "I-PER", "O", "I-LOC", "I-PER", "B-PER", "B-LOC", "I-LOC"]
    expected = {("PER", 0, 1), ("LOC", 3, 3), ("PER", 4, 4), ("PER", 5, 5), ("LOC", 6, 7)}
    assert entities_in(tags) == expected
    assert entities_in(["B", "I", "O", "B"]) == {("_", 0, 1), ("_", 3, 3)}
    assert entities_in(["O", "O"]) == entities_in([]) == set()


def test_any_tags_are_read_as_the_definition_says() -> None:
    for labels, answers in texts(0, 300):
        for tags in (named(labels), named(answers)):
            assert entities_in(tags) == by_definition(tags)


def test_shares_are_those_of_exact_entities() -> None:
    pairs = texts(1)
    right = labelled = answered = 0
    for labels, answers in pairs:
        mine, theirs = by_definition(named(labels)), by_definition(named(answers))
        right, labelled = right + len(mine & theirs), labelled + len(mine)
        answered += len(theirs)
    found = counted(pairs).results()
    assert found["entity_precision"] == pytest.approx(right / answered)
    assert found["entity_recall"] == pytest.approx(right / labelled)
    assert found["entity_f1"] == pytest.approx(2 * right / (labelled + answered))
    by_type = counted(pairs).by_type()
    assert sum(one["support"] for one in by_type.values()) == labelled


@pytest.mark.parametrize("case", OTHERS["words"])
def test_they_are_seqevals(case: dict[str, Any]) -> None:
    found = counted(list(zip(case["labels"], case["answers"], strict=True))).results()
    shares = [found[f"entity_{name}"] for name in ("precision", "recall", "f1")]
    assert shares == pytest.approx(case["means"])


def test_standard_errors_are_the_spread_over_draws_of_prompts() -> None:
    pairs, rng = texts(2, 200), np.random.default_rng(0)
    units = [pairs[2 * n : 2 * n + 2] for n in range(100)]
    drawn = []
    for _ in range(300):
        chosen = [text for n in rng.integers(0, 100, 100) for text in units[n]]
        again = counted(chosen).results()
        drawn.append([again[f"entity_{name}"] for name in ("precision", "recall", "f1")])
    found = counted(pairs, texts_a_unit=2).results()
    expected = [found[f"entity_{name}_se"] for name in ("precision", "recall", "f1")]
    # 300 draws know a spread to 4 %, and shares are linear in the texts to a few percent.
    np.testing.assert_allclose(np.std(drawn, axis=0), expected, rtol=0.2)


def test_differences_are_paired_and_nothing_is_a_share_of_nothing() -> None:
    pairs = texts(3)
    perfect = [(labels, labels) for labels, _ in pairs]
    gap = counted(perfect).minus(counted(pairs))
    assert gap["entity_f1"] == pytest.approx(1 - counted(pairs).results()["entity_f1"])
    assert gap["entity_f1_se"] == pytest.approx(counted(pairs).results()["entity_f1_se"])
    assert counted(pairs, texts_a_unit=100).results()["entity_f1_se"] is None
    assert counted([([0, 0], [0, 0])]).results()["entity_f1"] == 0


@pytest.mark.parametrize(
    ("names", "bio"),
    [
        (TAGS, True),
        (("B", "I", "O"), True),
        (("NAME", "OP", "NUMBER"), False),
        (("O", "I-PER"), False),
        (("O", "B-PER", "E-PER"), False),
        ((), False),
    ],
)
def test_which_tags_mark_entities(names: tuple[str, ...], bio: bool) -> None:
    assert are_bio(names) == bio
    assert (Entities.of(names) is not None) == bio
